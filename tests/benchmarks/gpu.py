"""What the kernels cost on a GPU, beside PyTorch's fastest dense attention (cuDNN's) in the same run.

    python tests/benchmarks/gpu.py                 # the paper's setting: whole, parts, memory
    python tests/benchmarks/gpu.py long            # the setting for long sequences, 2k to 128k tokens
    python tests/benchmarks/gpu.py --shapes 2 3    # some of the shapes

Medians of device events, bf16, batch 1; `nsa_attention` is timed from q, k, v, compressed k, v and gates to the output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import native_sparse_attention as nsa  # noqa: E402

PAPER = {"block_size": 32, "stride": 16, "select_block_size": 64, "topk_blocks": 16, "init_blocks": 1,
         "local_blocks": 2, "local_window": 512}  # fmt: skip
LONG = {"block_size": 64, "stride": 64, "select_block_size": 64, "topk_blocks": 8, "local_window": 256}
SHAPES = [(64, 4, 128, 65536), (64, 4, 128, 8192), (32, 8, 128, 65536), (16, 16, 64, 32768)]  # H, K, D, T


def milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(2):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in events)[repeats // 2]


def forward_backward(attention: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[float, float, float]:
    """ms of a forward and of its backward, and the GiB that both take above the inputs at their peak."""
    with torch.no_grad():
        forward = milliseconds(lambda: attention(*leaves))
    output = [attention(*leaves)]
    upstream = torch.randn_like(output[0])
    backward = milliseconds(lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True))
    output.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(attention(*leaves), leaves, upstream)
    torch.cuda.synchronize()
    return forward, backward, (torch.cuda.max_memory_allocated() - before) / 2**30


def leaves_of(heads: int, kv_heads: int, dim: int, tokens: int, setting: dict[str, int]) -> list[Tensor]:
    """q, k, v, k_cmp, v_cmp, gates; keys vary from block to block, so that some blocks do matter more."""
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(1, *shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = make(tokens, heads, dim), make(tokens, kv_heads, dim), make(tokens, kv_heads, dim)
    k = k + make(-(-tokens // 64), kv_heads, dim).repeat_interleave(64, 1)[:, :tokens]
    windows = (x.unfold(1, setting["block_size"], setting["stride"]).mean(-1) for x in (k, v))
    gates = torch.rand(1, tokens, heads, 3, device="cuda", dtype=torch.bfloat16)
    return [x.contiguous().requires_grad_() for x in (q, k, v, *windows, gates)]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def whole(shape: tuple[int, int, int, int], setting: dict[str, int]) -> str:
    leaves = leaves_of(*shape, setting)
    ours = forward_backward(lambda *x: nsa.nsa_attention(*x, **setting), leaves)
    theirs = forward_backward(dense, leaves[:3])
    heads, kv_heads, dim, tokens = shape
    name = f"{heads} q / {kv_heads} kv, D {dim}, T {tokens // 1024}k"
    cells = [f"{theirs[0]:.2f} / {theirs[1]:.2f}", f"{ours[0]:.2f} / {ours[1]:.2f}"]
    cells += [f"{theirs[0] / ours[0]:.2f}× / {theirs[1] / ours[1]:.2f}×", f"{theirs[2]:.1f} / {ours[2]:.1f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def parts(shape: tuple[int, int, int, int], setting: dict[str, int]) -> str:
    q, k, v, k_cmp, v_cmp, gates = leaves_of(*shape, setting)
    blocks = {name: setting[name] for name in ("block_size", "stride")}
    choice = {name: value for name, value in setting.items() if name != "local_window"}
    o, lse = (x.detach() for x in nsa.compressed_attention(q, k_cmp, v_cmp, **blocks))
    chosen = nsa.select_blocks(q, k_cmp, lse, **choice)
    branches = [
        (lambda q, k, v: nsa.compressed_attention(q, k, v, **blocks)[0], [q, k_cmp, v_cmp]),
        (lambda q, k, v: nsa.selective_attention(q, k, v, chosen, setting["select_block_size"]), [q, k, v]),
        (lambda q, k, v: nsa.local_attention(q, k, v, setting["local_window"]), [q, k, v]),
    ]
    times = [forward_backward(f, x)[:2] for f, x in branches]
    times.insert(1, (milliseconds(lambda: nsa.select_blocks(q, k_cmp, lse, **choice)), 0.0))
    return " | ".join(f"{forward:.2f} / {backward:.2f}" for forward, backward in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("paper", "long"), default="paper")
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="of the paper's setting")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {nsa.triton.__version__}\n")
    shapes = [SHAPES[i] for i in args.shapes] if args.what == "paper" else [(8, 8, 64, 2**i) for i in range(11, 18)]
    setting = PAPER if args.what == "paper" else LONG
    columns = ("shape", "dense, ms", "NSA, ms", "dense / NSA", "peak GiB, dense / NSA")
    print("forward / backward\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for shape in shapes:
        print(whole(shape, setting), flush=True)
    if args.what == "paper":
        print("\n| shape | compressed | choice | selective | local |\n|---|---|---|---|---|")
        for shape in shapes:
            print("| {} q / {} kv, D {}, T {} | ".format(*shape) + parts(shape, setting) + " |", flush=True)


if __name__ == "__main__":
    main()
