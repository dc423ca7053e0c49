"""What one sequence over several GPUs costs: a forward and backward of NativeSparseAttention, beside one GPU.

    torchrun --nproc-per-node 2 tests/benchmarks/context.py                       # 64k and 256k tokens, both layouts
    torchrun --nproc-per-node 2 tests/benchmarks/context.py --tokens 65536 --layouts zigzag
    torchrun --nproc-per-node 2 tests/benchmarks/context.py --heads 16 --kv-heads 1 --longest    # that fits, in steps

bf16, batch 1, the paper's block sizes, rotary positions. A step is timed from this rank's x to the gradients of x and
of all parameters, which are not summed over the ranks. Medians of device events on the slowest rank; GiB are the peak
of the rank that needs the most, above weights and x.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gpu import PAPER, milliseconds  # noqa: E402

from native_sparse_attention import NativeSparseAttention, NSAConfig, context_parallel  # noqa: E402

STEP = 32768  # tokens between two tries of the longest


def build(args: argparse.Namespace, tokens: int) -> NativeSparseAttention:
    torch.manual_seed(0)
    sizes = {"dim": args.dim, "heads": args.heads, "kv_heads": args.kv_heads, "dim_head": 128, "rope_theta": 1e6}
    cfg = NSAConfig(**sizes, **PAPER, seq_len=tokens, gate_mode="q_cond", separate_kv=args.separate_kv)
    return NativeSparseAttention(cfg).to(args.device, torch.bfloat16)


def cost(args: argparse.Namespace, tokens: int, context: context_parallel | None) -> tuple[float, float]:
    """Milliseconds of a step and GiB at its peak, on this rank."""
    model = build(args, tokens)
    with context or nullcontext():
        x = torch.randn(1, tokens // (context.size if context else 1), args.dim, device=args.device).bfloat16()
        x.requires_grad_()

        def step() -> None:
            model(x).sum().backward()
            model.zero_grad()
            x.grad = None

        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        return milliseconds(step, args.repeats), peak


def compare(args: argparse.Namespace, tokens: int) -> None:
    """A line for one GPU, and one for all of them in each layout."""
    if dist.get_rank() == 0:
        alone = cost(args, tokens, None)
        print(f"{tokens:>8,} tokens, one GPU: {alone[0]:.1f} ms, {alone[1]:.1f} GiB", flush=True)
    for layout in args.layouts:
        dist.barrier()
        worst = torch.tensor(cost(args, tokens, context_parallel(dist.group.WORLD, layout)), device=args.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            ms, peak = worst.tolist()
            ratios = f"{alone[0] / ms:.2f}× as fast, {peak / alone[1]:.2f} of the memory"
            print(f"{tokens:>8,} tokens, {layout}: {ms:.1f} ms, {peak:.1f} GiB: {ratios}", flush=True)


def longest(args: argparse.Namespace, context: context_parallel | None) -> int:
    """Tokens of the longest sequence that trains, by steps; all ranks stop at the same."""
    fits = 0
    while True:
        failed = torch.zeros(1, device=args.device)
        try:
            args.repeats = 1
            cost(args, fits + STEP, context)
        except torch.OutOfMemoryError:
            failed += 1
        torch.cuda.empty_cache()
        if context:
            dist.all_reduce(failed)
        if failed.item():
            return fits
        fits += STEP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536, 262144])
    parser.add_argument("--layouts", nargs="+", choices=("contiguous", "zigzag"), default=("zigzag", "contiguous"))
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=1024, help="width of x, which decides what the projections cost")
    parser.add_argument("--separate-kv", action="store_true")
    parser.add_argument("--longest", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl")
    args.device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(args.device)
    if args.longest:
        for context in (None, context_parallel(dist.group.WORLD, "zigzag")):
            tokens, of = longest(args, context), "one GPU" if context is None else f"{context.size} GPUs"
            if dist.get_rank() == 0:
                print(f"longest on {of}: {tokens:,} tokens", flush=True)
    else:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {' '.join(sys.argv[1:]) or 'defaults'}")
        for tokens in args.tokens:
            compare(args, tokens)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
