"""What one sequence over several GPUs costs: a forward and backward of NativeSparseAttention, beside one GPU.

    torchrun --nproc-per-node 2 tests/benchmarks/context.py                       # 64k and 256k tokens, both layouts
    torchrun --nproc-per-node 2 tests/benchmarks/context.py --tokens 65536 --layouts zigzag
    python tests/benchmarks/context.py --longest 1 2 --heads 16 --kv-heads 1      # that trains, on 1 and on 2 GPUs

bf16, batch 1, the paper's block sizes, rotary positions. A step is timed from this rank's x to the gradients of x and
of all parameters, which are not summed over the ranks. Medians of device events on the slowest rank; GiB are the peak
of the rank that needs the most, above weights and x. The longest sequence starts processes of its own, and counts
weights and x; its seconds are those of a first step.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gpu import PAPER, milliseconds  # noqa: E402

from native_sparse_attention import NativeSparseAttention, NSAConfig, context_parallel  # noqa: E402


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


def train_once(rank: int, args: argparse.Namespace, tokens: int, ranks: int, folder: str) -> None:
    """A forward and backward in this process; its seconds and GiB, or what went wrong, are left in the folder."""
    try:
        if args.device == "cuda":
            args.device = torch.device("cuda", rank)
            torch.cuda.set_device(args.device)
        backend = "gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
        model = build(args, tokens)
        begin = time.monotonic()
        with context_parallel(dist.group.WORLD, "zigzag"):
            x = torch.randn(1, tokens // ranks, args.dim, device=args.device).bfloat16().requires_grad_()
            if args.limit is not None and rank == ranks - 1 and tokens > args.limit * ranks:
                raise torch.OutOfMemoryError("out of memory, as --limit says")
            model(x).sum().backward()
        peak = 0.0
        if args.device != "cpu":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30
        Path(folder, f"{rank}.cost").write_text(f"{time.monotonic() - begin} {peak}")
    except Exception as error:
        Path(folder, f"{rank}.failure").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)  # an orderly end would wait for the others, and they wait for this process
    dist.destroy_process_group()


def trial(args: argparse.Namespace, tokens: int, ranks: int) -> tuple[str, float, float]:
    """The reason why a sequence does not train, or ""; and if it does, seconds and GiB of the worst rank.

    Each trial has processes of its own, which are ended when one of them fails or when time is up: a rank that runs out
    of memory alone leaves the others in a collective.
    """
    with tempfile.TemporaryDirectory() as folder:
        done, end = False, time.monotonic() + args.seconds
        processes = torch.multiprocessing.spawn(train_once, (args, tokens, ranks, folder), ranks, join=False)
        try:
            while not done and time.monotonic() < end:
                done = processes.join(timeout=max(0.0, end - time.monotonic()))
        except torch.multiprocessing.ProcessExitedException:
            pass  # the failures say why
        finally:
            for process in processes.processes:
                process.kill()
                process.join()
        if done:
            costs = [map(float, file.read_text().split()) for file in Path(folder).glob("*.cost")]
            return "", *map(max, zip(*costs, strict=True))
        failures = [file.read_text() for file in Path(folder).glob("*.failure")]
        if any("out of memory" in failure.lower() for failure in failures):
            return "out of memory", 0.0, 0.0
        return failures[0].splitlines()[0] if failures else f"not done in {args.seconds} s", 0.0, 0.0


def longest(args: argparse.Namespace, ranks: int) -> str:
    """Row of the longest sequence that trains on a number of GPUs: doubled, then bisected to an eighth or --step."""
    fits, fails, why, costs, tokens = 0, None, "", (0.0, 0.0), args.step * args.first * ranks
    while fails is None or fails - fits > max(args.step, fits // 8):
        failure, *these = trial(args, tokens, ranks)
        print(f"{ranks} × {tokens // ranks:,}: {failure or 'trains, {:.1f} s, {:.1f} GiB'.format(*these)}", flush=True)
        if failure:
            fails, why = tokens, failure
        else:
            fits, costs = tokens, these
        tokens = fits * 2 if fails is None else (fits + fails) // 2 // args.step * args.step
    return f"| {ranks} | {fits:,} | {costs[0]:.1f} | {costs[1]:.1f} | {fails:,}: {why} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536, 262144])
    parser.add_argument("--layouts", nargs="+", choices=("contiguous", "zigzag"), default=("zigzag", "contiguous"))
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=1024, help="width of x, which decides what the projections cost")
    parser.add_argument("--separate-kv", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--longest", type=int, nargs="+", metavar="GPUS", help="numbers of GPUs, without torchrun")
    parser.add_argument("--first", type=int, default=16, help="steps of the first sequence to try, for each GPU")
    parser.add_argument("--step", type=int, default=32768, help="tokens of which the longest is to be a multiple")
    parser.add_argument("--seconds", type=float, default=90, help="of a trial of the longest")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=int, help="tokens of a rank beyond which the last one fails: a rehearsal")
    args = parser.parse_args()
    if args.longest:
        rows = [longest(args, ranks) for ranks in args.longest]
        columns = ("GPUs", "longest, tokens", "seconds", "peak GiB", "does not train")
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", *rows, sep="\n")
        return
    dist.init_process_group("cpu:gloo,cuda:nccl")
    args.device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(args.device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {' '.join(sys.argv[1:]) or 'defaults'}")
    for tokens in args.tokens:
        compare(args, tokens)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
