"""What the kernels cost on a GPU, beside PyTorch's fastest dense attention (cuDNN's) in the same run.

    python tests/benchmarks/gpu.py                 # the paper's setting: whole, parts, memory
    python tests/benchmarks/gpu.py memory          # memory of the passes, with and without recompute
    python tests/benchmarks/gpu.py long            # the setting for long sequences, 2k to 128k tokens
    python tests/benchmarks/gpu.py lengths --json docs/speed.json    # wall time, 1k to 128k tokens; draw.py plots it
    python tests/benchmarks/gpu.py --shapes 2 3    # some of the shapes
    python tests/benchmarks/gpu.py decode          # one decoding step in a CUDA graph, and a prompt of 64k tokens
    python tests/benchmarks/gpu.py decode --sweep  # a decoding step with other launch settings
    python tests/benchmarks/gpu.py packed          # packed sequences against rows: attention alone, and a block
    python tests/benchmarks/gpu.py block           # a block beside a dense one: eager, compiled, in a CUDA graph
    python tests/benchmarks/gpu.py block --tokens 2048 --modes eager graph    # some of the lengths and modes
    python tests/benchmarks/gpu.py step            # a decoding step of 12 blocks beside dense ones
    python tests/benchmarks/gpu.py pieces          # a prompt of 32k tokens in pieces, into a cache

Medians of device events, but of the wall clock for `lengths`, `block`, `step`, `pieces` and the blocks of `packed`;
bf16, batch 1. `nsa_attention` is timed from q, k, v, compressed k, v and gates to the output. In `decode`, a step is
timed from one new q a row and the cache to the output, in turn on several caches: with one cache alone, the GPU's L2
would still hold it from the step before. Dense and sparse steps take turns, as a card near its power limit changes its
clock within a second; a graph holds as many steps as a model has layers.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import native_sparse_attention as nsa  # noqa: E402
from nsa_gpt_training import DenseBlock  # noqa: E402

DEVICE, DTYPE = "cuda", torch.bfloat16

PAPER = {"block_size": 32, "stride": 16, "select_block_size": 64, "topk_blocks": 16, "init_blocks": 1,
         "local_blocks": 2, "local_window": 512}  # fmt: skip
MEDIUM = {"block_size": 32, "stride": 32, "select_block_size": 32, "topk_blocks": 4, "local_window": 128}
LONG = {"block_size": 64, "stride": 64, "select_block_size": 64, "topk_blocks": 8, "local_window": 256}
RATE = 790e12  # operations a second in bfloat16 matrix products, as measured on an H200
# H, K, D, T
SHAPES = [(heads, kv_heads, dim, tokens) for heads, kv_heads, dim, longest in
          ((64, 4, 128, 65536), (32, 8, 128, 65536), (16, 16, 64, 32768)) for tokens in (8192, longest)]  # fmt: skip
MILLION = (16, 1, 128, 2**20)


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


class Captured:
    """Calls in a CUDA graph, one after the other."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):  # nodes of autograd remember the stream where they were first used
            for call in calls:
                call()
        with torch.cuda.graph(self.graph, stream=stream):
            self.outputs = [call() for call in calls]  # kept: their memory is not to be shared
        self.calls = calls  # and so are their inputs

    def replay(self) -> None:
        self.graph.replay()

    def milliseconds(self, repeats: int = 20) -> float:
        """ms of one of the calls."""
        return milliseconds(self.graph.replay, repeats) / len(self.outputs)


def replayed(attention: Callable[..., Tensor], leaves: list[Tensor]) -> float:
    """ms of a forward and its backward together, in a CUDA graph: what the GPU needs when no host holds it up."""
    upstream = torch.randn_like(attention(*leaves))
    return Captured([lambda: torch.autograd.grad(attention(*leaves), leaves, upstream)]).milliseconds()


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


def measure_whole(shape: tuple[int, int, int, int], setting: dict[str, int]) -> tuple[tuple[float, ...], ...]:
    """`forward_backward` of NSA and of dense attention, and both `replayed`."""
    leaves = leaves_of(*shape, setting)
    sparse = lambda *x: nsa.nsa_attention(*x, **setting)  # noqa: E731
    pairs = ((sparse, leaves), (dense, leaves[:3]))
    return tuple((*forward_backward(*pair), replayed(*pair)) for pair in pairs)


def name_of(shape: tuple[int, int, int, int]) -> str:
    heads, kv_heads, dim, tokens = shape
    return f"{heads} q / {kv_heads} kv, D {dim}, T {tokens // 1024}k"


def whole_row(shape: tuple[int, int, int, int], ours: tuple[float, ...], theirs: tuple[float, ...]) -> str:
    cells = [f"{theirs[0]:.2f} / {theirs[1]:.2f}", f"{ours[0]:.2f} / {ours[1]:.2f}"]
    cells += [f"{theirs[0] / ours[0]:.2f}× / {theirs[1] / ours[1]:.2f}×", f"{theirs[2]:.1f} / {ours[2]:.1f}"]
    cells += [f"{theirs[3]:.2f} / {ours[3]:.2f}", f"{theirs[3] / ours[3]:.2f}×"]
    return f"| {name_of(shape)} | " + " | ".join(cells) + " |"


def break_even(times: dict[int, tuple[float, float]]) -> str:
    """Tokens at which NSA's forward and backward take as long as dense attention's, of {T: (ours, theirs)}."""
    for (low, (ours, theirs)), (high, (ours_high, theirs_high)) in itertools.pairwise(sorted(times.items())):
        before, after = math.log(theirs / ours), math.log(theirs_high / ours_high)
        if before < 0 <= after:
            return f"break-even at {low * (high / low) ** (before / (before - after)) / 1024:.0f}k tokens"
    return "no break-even in this range"


def compare(shapes: list[tuple[int, int, int, int]], setting: dict[str, int]) -> list[dict[int, tuple[float, float]]]:
    """Prints a row for each shape; returns ms of both passes by length, {T: (NSA, dense)}: launched, and replayed."""
    columns = ("shape", "dense, ms", "NSA, ms", "dense / NSA", "peak GiB, dense / NSA")
    columns += ("both in a CUDA graph, dense / NSA, ms", "dense / NSA")
    print("forward / backward\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    launched, in_graphs = {}, {}
    for shape in shapes:
        ours, theirs = measure_whole(shape, setting)
        print(whole_row(shape, ours, theirs), flush=True)
        launched[shape[3]], in_graphs[shape[3]] = (sum(ours[:2]), sum(theirs[:2])), (ours[3], theirs[3])
    return [launched, in_graphs]


def kept(attention: Callable[..., Tensor], leaves: list[Tensor]) -> float:
    """GiB that a forward keeps for its backward, its output included."""
    before = torch.cuda.memory_allocated()
    o = attention(*leaves)
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    del o
    return (after - before) / 2**30


def memory(shapes: list[tuple[int, int, int, int]], setting: dict[str, int]) -> None:
    """Prints time and memory of dense attention, NSA, and NSA that recomputes the local branch in the backward."""
    print("| shape | attention | forward / backward, ms | peak, GiB | kept, GiB |\n" + "|---" * 5 + "|")
    for shape in shapes:
        leaves = leaves_of(*shape, setting)
        ways = {"dense": (dense, leaves[:3])} if shape != MILLION else {}
        for name, recompute in (("NSA", False), ("NSA, recompute=True", True)):
            ways[name] = functools.partial(nsa.nsa_attention, recompute=recompute, **setting), leaves
        for name, way in ways.items():
            forward, backward, peak = forward_backward(*way)
            row = (name_of(shape), name, f"{forward:.2f} / {backward:.2f}", f"{peak:.2f}", f"{kept(*way):.2f}")
            print("| " + " | ".join(row) + " |", flush=True)


# Keys that a query sees, and matrix products with each, in the forward: the backward has 2.5 times as many.
def floors(shape: tuple[int, int, int, int], setting: dict[str, int]) -> list[float]:
    """ms that the matrix products of compressed, choice, selective and local attention take at RATE."""
    heads, _, dim, tokens = shape
    t = torch.arange(tokens, dtype=torch.float64)
    visible = ((t - setting["block_size"] + 1) // setting["stride"] + 1).clamp(min=0).sum()
    chosen = (t + 1).clamp(max=setting["topk_blocks"] * setting["select_block_size"]).sum()
    window = (t + 1).clamp(max=setting["local_window"]).sum()
    keys_and_products = ((visible, 2), (visible, 1), (chosen, 2), (window, 2))
    return [1e3 * 2 * float(keys) * products * heads * dim / RATE for keys, products in keys_and_products]


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
    times.insert(1, (milliseconds(lambda: nsa.select_blocks(q, k_cmp, lse, **choice)), None))
    cells = []
    for (forward, backward), floor in zip(times, floors(shape, setting), strict=True):
        back = "" if backward is None else f" / {backward:.2f} ({2.5 * floor:.2f})"
        cells.append(f"{forward:.2f} ({floor:.2f}){back}")
    return " | ".join(cells)


# Wall time over length ------------------------------------------------------------------------------------------------

CURVES = [(64, 4, 128), (16, 16, 64)]  # H, K, D
LENGTHS = [2**i for i in range(10, 18)]


def both_passes(attention: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    upstream = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(attention(*leaves), leaves, upstream)


def wall(runs: dict[str, Callable[[], object]], repeats: int = 11, in_a_row: int = 1) -> dict[str, float]:
    """Median ms of each run by the wall clock. They take turns, and the clock stops when the GPU is done.

    A turn is so many runs in a row, as layers follow each other, and counts as one by their mean.
    """

    def once(run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(in_a_row):
            run()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin) / in_a_row

    for run in [*runs.values()] * 2:
        once(run)
    times = [[once(run) for run in runs.values()] for _ in range(repeats)]
    return {name: statistics.median(column) for name, column in zip(runs, zip(*times, strict=True), strict=True)}


def curve(heads: int, kv_heads: int, dim: int, setting: dict[str, int]) -> dict[str, object]:
    """ms of forward + backward at each length: {"heads": …, "rows": [{"tokens": …, "nsa": …, "dense": …}, …]}.

    Where dense attention runs out of memory, its figure is left out.
    """
    rows = []
    for tokens in LENGTHS:
        leaves = leaves_of(heads, kv_heads, dim, tokens, setting)
        runs = {
            "nsa": both_passes(lambda *x: nsa.nsa_attention(*x, **setting), leaves),
            "dense": both_passes(lambda *x: dense(*x).transpose(1, 2), leaves[:3]),
        }
        try:
            runs["dense"]()
        except torch.OutOfMemoryError:
            del runs["dense"]
            torch.cuda.empty_cache()
        rows.append({"tokens": tokens, **{name: round(ms, 3) for name, ms in wall(runs).items()}})
        ms = [rows[-1].get(name) for name in ("dense", "nsa")]
        cells = [f"{x:.2f}" if x else "out of memory" for x in ms] + [f"{ms[0] / ms[1]:.2f}×" if ms[0] else "–"]
        print(f"| {name_of((heads, kv_heads, dim, tokens))} | " + " | ".join(cells) + " |", flush=True)
    return {"heads": heads, "kv_heads": kv_heads, "dim_head": dim, "setting": setting, "rows": rows}


def by_length(setting: dict[str, int], path: Path | None) -> None:
    print("wall time of forward + backward\n\n| shape | dense, ms | NSA, ms | dense / NSA |\n|---|---|---|---|")
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": nsa.triton.__version__,
        "measured": "wall time of forward + backward, bf16, batch 1",
        "curves": [curve(*shape, setting) for shape in CURVES],
    }
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")


# Packed sequences -----------------------------------------------------------------------------------------------------


def compressed_by_mean(x: Tensor, lengths: list[int], setting: dict[str, int]) -> Tensor:
    """(B, T, K, D) → (B, ΣC, K, D), each block of each sequence its mean."""
    size, stride = setting["block_size"], setting["stride"]
    whole = (part for part in x.split(lengths, 1) if part.shape[1] >= size)
    return torch.cat([part.unfold(1, size, stride).mean(-1) for part in whole], 1)


def tokens_a_second(leaves: list[Tensor], lengths: list[int], setting: dict[str, int], packed: bool) -> float:
    """Tokens that `nsa_attention` takes in a second, forward and backward."""
    q, k, v, _, _, gates = (x.detach() for x in leaves)
    k_cmp, v_cmp = (compressed_by_mean(x, lengths, setting) for x in (k, v))
    options, tensors = dict(setting), [q, k, v, k_cmp, v_cmp, gates]
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    else:
        tensors = [x.unflatten(1, (len(lengths), -1))[0] for x in tensors]
    rows = [x.clone().requires_grad_() for x in tensors]
    forward, backward, _ = forward_backward(lambda *x: nsa.nsa_attention(*x, **options), rows)
    return 1e3 * sum(lengths) / (forward + backward)


def packed_row(shape: tuple[int, int, int, int], setting: dict[str, int], sequences: int = 64) -> str:
    """Rows of equal length, the same packed, and as many sequences of a quarter to seven quarters of that length."""
    leaves, mean = leaves_of(*shape, setting), shape[3] // sequences
    most, random = mean * 3 // 4, torch.Generator().manual_seed(0)
    differ = torch.randint(-most, most + 1, (sequences // 2,), generator=random)
    ragged = (mean + torch.cat([differ, -differ])).tolist()
    rows, equal, unequal = (
        tokens_a_second(leaves, lengths, setting, packed)
        for lengths, packed in (([mean] * sequences, False), ([mean] * sequences, True), (ragged, True))
    )
    cells = [f"{rows / 1e6:.2f}", *(f"{speed / 1e6:.2f} ({speed / rows:.2f}×)" for speed in (equal, unequal))]
    return f"| {name_of(shape)} in {sequences} | " + " | ".join(cells) + " |"


def packed(setting: dict[str, int]) -> None:
    print("million tokens a second, forward and backward\n\n| shape | rows | packed, equal | packed, ragged |")
    print("|---|---|---|---|")
    for shape in ((64, 4, 128, 65536), (16, 16, 64, 65536)):
        print(packed_row(shape, setting), flush=True)
    columns = ("a block", "8 packed sequences, ms", "one row, ms", "packed / row (goal)", "recompilations")
    print("\nwall time of forward + backward\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for mode in ("eager", "compile"):
        print(packed_block(mode), flush=True)


def new_lengths(total: int, sequences: int, steps: int) -> list[Tensor]:
    """Offsets `cu_seqlens` of random lengths that add up to the total, for each of the steps."""
    random = torch.Generator().manual_seed(0)
    cuts = [1 + torch.randperm(total - 1, generator=random)[: sequences - 1].sort().values for _ in range(steps)]
    return [torch.cat([torch.tensor([0]), cut, torch.tensor([total])]).int().to(DEVICE) for cut in cuts]


def packed_block(mode: str, tokens: int = 16384, sequences: int = 8) -> str:
    """A block on packed sequences whose lengths are new in each step, and on one row of as many tokens."""
    cfg = nsa.NSAConfig(dim=512, heads=8, seq_len=tokens, **LONG)
    lengths = itertools.cycle(new_lengths(tokens, sequences, steps=100))
    packed, row = (passes_of(nsa.NSABlock, cfg, tokens, mode) for _ in range(2))
    for cu_seqlens in itertools.islice(lengths, 3):
        packed(cu_seqlens=cu_seqlens)
    row()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    ms = wall({"packed": lambda: packed(cu_seqlens=next(lengths)), "row": row}, repeats=31, in_a_row=LAYERS)
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    cells = (mode, f"{ms['packed']:.2f}", f"{ms['row']:.2f}", f"{ms['packed'] / ms['row']:.2f} (1.05)", f"{again}")
    return "| " + " | ".join(cells) + " |"


# A block --------------------------------------------------------------------------------------------------------------

GOALS = {  # NSA / dense at 1k, 2k, ... 32k tokens
    "eager": (1.6, 1.5, 1.5, 1.2, 0.8, 0.45),
    "compile": (1.3, 1.2, 1.2, 1.0, 0.6, 0.4),
    "reduce-overhead": (),
    "graph": (1.0, 0.9, 0.7, 0.6, 0.5, 0.35),
}
BLOCKS, LAYERS = [2**i for i in range(10, 16)], 6


def passes_of(kind: type[nn.Module], cfg: nsa.NSAConfig, tokens: int, mode: str) -> Callable[..., object]:
    """Forward and backward of a new block on one row, with gradients of the row and all parameters."""
    block = kind(cfg).to(DEVICE, DTYPE)
    x, upstream = (torch.randn(1, tokens, cfg.dim, device=DEVICE, dtype=DTYPE) for _ in range(2))
    leaves = [x.requires_grad_(), *block.parameters()]
    if mode in ("compile", "reduce-overhead"):
        block = torch.compile(block, mode="default" if mode == "compile" else mode, fullgraph=True)
    call = lambda **options: torch.autograd.grad(block(x, **options), leaves, upstream)  # noqa: E731
    return Captured([call]).replay if mode == "graph" else call


def block_cell(tokens: int, mode: str) -> str:
    cfg = nsa.NSAConfig(dim=512, heads=8, seq_len=tokens, **(LONG if tokens >= 4096 else MEDIUM))
    torch.compiler.reset()
    kinds = {"nsa": nsa.NSABlock, "dense": DenseBlock}
    passes = {name: passes_of(kind, cfg, tokens, mode) for name, kind in kinds.items()}
    ms = wall(passes, repeats=21, in_a_row=LAYERS)
    goal = dict(zip(BLOCKS, GOALS[mode], strict=False)).get(tokens)
    return f"{ms['nsa']:.2f} / {ms['dense']:.2f} = {ms['nsa'] / ms['dense']:.2f}" + (f" ({goal})" if goal else "")


def blocks(lengths: list[int], modes: list[str]) -> None:
    print(f"wall time of forward + backward of a block, {LAYERS} in a row, NSA / dense, ms each (goal)\n")
    print("| tokens | " + " | ".join(modes) + " |\n|---" + "|---" * len(modes) + "|")
    for tokens in lengths:
        print(f"| {tokens // 1024}k | " + " | ".join(block_cell(tokens, mode) for mode in modes) + " |", flush=True)
    leaves = leaves_of(8, 8, 64, 2048, MEDIUM)
    ms = wall({"nsa": both_passes(lambda *x: nsa.nsa_attention(*x, **MEDIUM), leaves)}, repeats=31)["nsa"]
    print(f"\nnsa_attention, 2k tokens, 8 heads of 64, both passes: {ms:.2f} ms (goal 0.9)", flush=True)


# A decoding step of a stack of blocks ---------------------------------------------------------------------------------

STACKS = {(1, 8192): 0.61, (1, 32768): 0.65, (8, 32768): 1.2}  # batch and cached tokens: goal in a graph, ms


class DenseCachedBlock(DenseBlock):
    """A dense block that takes one token a row, and writes its key and value at the end of a full cache."""

    def __init__(self, cfg: nsa.NSAConfig, batch: int, tokens: int) -> None:
        super().__init__(cfg)
        shape = (batch, cfg.kv_heads, tokens, cfg.dim_head)
        self.k, self.v = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2))
        self.position = torch.tensor([tokens - 1], device=DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        projected = (to(self.norm1(x)) for to in (self.attn.to_q, self.attn.to_k, self.attn.to_v))
        q, k, v = (y.unflatten(-1, (-1, self.attn.cfg.dim_head)).transpose(1, 2) for y in projected)  # (B, H, 1, D)
        self.k.index_copy_(2, self.position, k)
        self.v.index_copy_(2, self.position, v)
        o = F.scaled_dot_product_attention(q, self.k, self.v)
        x = x + self.attn.to_out(o.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))


def dense_stack(cfg: nsa.NSAConfig, batch: int, tokens: int, depth: int) -> dict[str, Callable[[], object]]:
    """A step of dense blocks, eager and in a graph, with the backend that is fastest in a graph."""
    stack = nn.Sequential(*(DenseCachedBlock(cfg, batch, tokens) for _ in range(depth))).to(DEVICE, DTYPE)
    x, graphs = torch.randn(batch, 1, cfg.dim, device=DEVICE, dtype=DTYPE), {}

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return stack(x)

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            graphs[backend] = Captured([lambda backend=backend: run(backend)]).replay
        except RuntimeError as error:
            print(f"{backend.name}: {error}")
    ms = wall(graphs)
    fastest = min(ms, key=ms.get)
    return {"dense, eager": lambda: run(fastest), "dense, graph": graphs[fastest]}


def nsa_stack(cfg: nsa.NSAConfig, batch: int, tokens: int, depth: int) -> dict[str, Callable[[], object]]:
    """A step of NSA blocks, eager and in a graph, after a prompt; the steps of the measurement add to its tokens."""
    stack = nn.ModuleList(nsa.NSABlock(cfg) for _ in range(depth)).to(DEVICE, DTYPE)
    caches = [nsa.NSACache(cfg, batch, cfg.seq_len, device=DEVICE, dtype=DTYPE) for _ in stack]

    def run(x: Tensor) -> Tensor:
        for block, cache in zip(stack, caches, strict=True):
            x = block(x, cache=cache)
        return x

    run(torch.randn(batch, tokens, cfg.dim, device=DEVICE, dtype=DTYPE))
    x = torch.randn(batch, 1, cfg.dim, device=DEVICE, dtype=DTYPE)
    return {"NSA, eager": lambda: run(x), "NSA, graph": Captured([lambda: run(x)]).replay}


@torch.no_grad()
def stacks(depth: int = 12) -> None:
    print(f"wall time of a step of {depth} blocks, dim 768, 12 heads, ms\n")
    columns = ("batch", "cached tokens", "NSA, eager (goal 6)", "dense, eager", "NSA, graph (goal)", "dense, graph")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for (batch, tokens), goal in STACKS.items():
        cfg = nsa.NSAConfig(dim=768, heads=12, seq_len=tokens + 256, **LONG)
        runs = {**nsa_stack(cfg, batch, tokens, depth), **dense_stack(cfg, batch, tokens, depth)}
        ms = {name: f"{x:.2f}" for name, x in wall(runs, repeats=31).items()}
        cells = (ms["NSA, eager"], ms["dense, eager"], f"{ms['NSA, graph']} ({goal})", ms["dense, graph"])
        print(f"| {batch} | {tokens // 1024}k | " + " | ".join(cells) + " |", flush=True)


# Prompts --------------------------------------------------------------------------------------------------------------

PIECES = {8192: 1.15, 2048: 1.4, 512: 2.5}  # tokens: goal, times the whole


@torch.no_grad()
def prompt_times(tokens: int, pieces: list[int]) -> dict[str, float]:
    """ms that a module of the paper's setting takes for a prompt: without a cache, and into one, piece by piece."""
    cfg = nsa.NSAConfig(dim=2048, heads=64, kv_heads=4, dim_head=128, seq_len=tokens, gate_mode="q_cond", **PAPER)
    module = nsa.NativeSparseAttention(cfg).to(DEVICE, DTYPE).eval()
    cache = nsa.NSACache(cfg, 1, tokens, device=DEVICE, dtype=DTYPE)
    x = torch.randn(1, tokens, cfg.dim, device=DEVICE, dtype=DTYPE)

    def fill(piece: int) -> None:
        cache.reset()
        for part in x.split(piece, dim=1):
            module(part, cache=cache)

    runs = {f"{piece}": lambda piece=piece: fill(piece) for piece in (tokens, *pieces)}
    return wall({"no cache": lambda: module(x), **runs})


def prompts(tokens: int = 32768) -> None:
    ms = prompt_times(tokens, list(PIECES))
    whole = ms[f"{tokens}"]
    print(f"a prompt of {tokens // 1024}k tokens, ms: {ms['no cache']:.2f} without a cache, {whole:.2f} into one")
    print("\n| in pieces of | ms | to the whole (goal) |\n|---|---|---|")
    for piece, goal in PIECES.items():
        print(f"| {piece} | {ms[f'{piece}']:.2f} | {ms[f'{piece}'] / whole:.2f} ({goal}) |")


# Decoding: attention alone --------------------------------------------------------------------------------------------

STEPS = [(batch, tokens) for batch in (16, 64) for tokens in (8192, 32768, 65536)]
BANDWIDTH = 4.3e12  # bytes a second, as measured on an H200
CACHES, STEPS_IN_A_GRAPH, TURNS = 4, 16, 9
VARIANTS = {"BLOCK_N": (32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4)}


def caches(batch: int, tokens: int) -> list[dict[str, Tensor]]:
    """The arguments of a step of one new token at the end of full caches, 64 query and 4 key heads of 128."""
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, 128, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    blocks = (tokens - PAPER["block_size"]) // PAPER["stride"] + 1
    steps = []
    for _ in range(CACHES):
        first = torch.full((batch,), tokens - 1, device="cuda", dtype=torch.int32)
        steps.append({"q": make(batch, 1, 64), "tokens": make(2, batch, tokens + 1, 4),
                      "blocks": make(2, batch, blocks + 1, 4), "logits": make(batch, 1, 64)[..., :3].contiguous(),
                       "first": first, "of_token": None})  # fmt: skip
    return steps


def layers(steps: list[dict[str, Tensor]], attention: Callable[..., Tensor], *args: object) -> Captured:
    return Captured([lambda step=step: attention(step, *args) for step in steps * (STEPS_IN_A_GRAPH // CACHES)])


def sparse_step(step: dict[str, Tensor]) -> Tensor:
    sizes = {name: value for name, value in PAPER.items() if name != "local_window"}
    return nsa._triton_decode(**step, local_window=PAPER["local_window"], choice=nsa._Choice(**sizes), scale=128**-0.5)


def dense_step(step: dict[str, Tensor], backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        q, k, v = (x.transpose(1, 2) for x in (step["q"], *step["tokens"][:, :, :-1]))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def dense_steps(steps: list[dict[str, Tensor]]) -> dict[str, Captured]:
    """By backend, where it has a kernel for them."""
    captured = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            captured[backend.name.split("_")[0].lower()] = layers(steps, dense_step, backend)
        except RuntimeError as error:
            print(f"{backend.name}: {error}")
    return captured


def decode_row(batch: int, tokens: int) -> str:
    steps = caches(batch, tokens)
    dense, ours = dense_steps(steps), layers(steps, sparse_step)
    fastest = min(dense, key=lambda name: dense[name].milliseconds())
    time.sleep(1)  # the clock recovers from the slower ones
    times = [(dense[fastest].milliseconds(), ours.milliseconds()) for _ in range(TURNS)]
    theirs, ours = (statistics.median(x) for x in zip(*times, strict=True))
    keys = tokens / PAPER["stride"] + PAPER["topk_blocks"] * PAPER["select_block_size"] + PAPER["local_window"]
    floor = 1e3 * batch * keys * 4 * 128 * 2 * 2 / BANDWIDTH
    cells = (f"{batch}", f"{tokens // 1024}k", f"{theirs:.4f} ({fastest})", f"{ours:.4f}")
    return "| " + " | ".join((*cells, f"{theirs / ours:.2f}×", f"{floor:.4f}")) + " |"


def kernels_of_a_step(batch: int, tokens: int) -> str:
    """Microseconds of each kernel, without a graph."""
    steps = caches(batch, tokens)
    for step in steps:
        sparse_step(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for step in steps * 5:
            sparse_step(step)
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if "decode" in event.key]
    return ", ".join(f"{event.key.strip('_')} {event.device_time:.1f}" for event in events)


def sweep_decode(shapes: list[tuple[int, int]]) -> None:
    """All launch settings of a kernel together: µs a step at each shape, the best five first.

    The best, by its ratios to the present ones, stays while the next kernel is varied. Minutes, most of them compiling.
    """
    steps = [caches(*shape) for shape in shapes]

    def times() -> list[float]:
        try:
            return [1e3 * layers(x, sparse_step).milliseconds() for x in steps]
        except Exception:  # a tile that does not fit
            return [math.inf]

    present = times()
    print("present:", " ".join(f"{t:.1f}" for t in present), "at (batch, tokens)", *shapes, flush=True)
    for name in ("decode_scan", "decode_attend"):
        rows = []
        for values in itertools.product(*VARIANTS.values()):
            set_tiles(name, values)
            found = times()
            rows.append((sum(t / at for t, at in zip(found, present, strict=False)), values, found))
        rows.sort()
        for _, values, found in rows[:5]:
            settings = " ".join(f"{name} {value}" for name, value in zip(VARIANTS, values, strict=True))
            print(f"{name:>17}: {settings}:", " ".join(f"{t:.1f}" for t in found), flush=True)
        set_tiles(name, rows[0][1])


def set_tiles(kernel: str, values: tuple[int, ...]) -> None:
    """Another entry of the library's table of tiles: keys, warps and stages."""
    nsa._TILES[kernel] = (((64, *values, 64),),) * 3
    nsa._decode_plan.cache_clear()


def decode(sweep: bool) -> None:
    if sweep:
        return sweep_decode([(16, 8192), (16, 65536), (64, 65536)])
    columns = ("batch", "cached tokens", "dense, ms", "NSA, ms", "dense / NSA", "its bytes, ms")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for shape in STEPS:
        print(decode_row(*shape), flush=True)
    for shape in ((16, 8192), (16, 65536), (64, 65536)):
        print(f"\nkernels at batch {shape[0]}, {shape[1] // 1024}k, µs: {kernels_of_a_step(*shape)}", flush=True)
    ms = prompt_times(65536, [])
    print(f"\na prompt of 64k tokens, ms: {ms['no cache']:.2f} without a cache, {ms['65536']:.2f} into one", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ("paper", "memory", "long", "lengths", "packed", "block", "step", "pieces", "decode")
    parser.add_argument("what", nargs="?", choices=choices, default="paper")
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="of the paper's setting")
    parser.add_argument("--sweep", action="store_true", help="decode: vary the launch settings")
    parser.add_argument("--tokens", type=int, nargs="+", default=BLOCKS, help="block: lengths")
    parser.add_argument("--modes", nargs="+", choices=GOALS, default=[*GOALS], help="block: ways to run it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="lengths: write the results to this file")
    args = parser.parse_args()
    if args.json and args.what != "lengths":
        parser.error("--json goes with lengths")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {nsa.triton.__version__}\n")
    if args.what == "decode":
        return decode(args.sweep)
    if args.what == "lengths":
        return by_length(PAPER, args.json)
    if args.what == "packed":
        return packed(PAPER)
    if args.what == "block":
        return blocks(args.tokens, args.modes)
    if args.what == "step":
        return stacks()
    if args.what == "pieces":
        return prompts()
    if args.what == "long":
        launched, in_graphs = compare([(8, 8, 64, 2**i) for i in range(11, 18)], LONG)
        return print(f"\nlaunched: {break_even(launched)}; in CUDA graphs: {break_even(in_graphs)}")
    shapes = [SHAPES[i] for i in args.shapes]
    if args.what == "memory":
        return memory([*shapes, MILLION], PAPER)
    compare(shapes, PAPER)
    print("\nms (floor)\n\n| shape | compressed | choice | selective | local |\n|---|---|---|---|---|")
    for shape in shapes:
        print(f"| {name_of(shape)} | {parts(shape, PAPER)} |", flush=True)


if __name__ == "__main__":
    main()
