"""What the PyTorch path costs on a CPU, beside dense attention in the same run.

    python tests/benchmarks/cpu.py speed     # forward + backward, 2k to 32k tokens, against PyTorch's dense attention
    python tests/benchmarks/cpu.py parts     # where NSA's time goes
    python tests/benchmarks/cpu.py memory    # peak above the inputs, against eager dense attention
    python tests/benchmarks/cpu.py model     # a training step of the example's full-size model, NSA against dense
    python tests/benchmarks/cpu.py packed    # short sequences, packed and padded, against a plain batch
    python tests/benchmarks/cpu.py decode    # a new token after 2048, with a cache against running all tokens again
    python tests/benchmarks/cpu.py peer      # a module's forward + backward against native-sparse-attention-pytorch

Setting of the first three: float32, batch 1, 8 heads, D 64, window 256, block = stride = 64, 8 blocks selected.
`peer` needs native-sparse-attention-pytorch installed; nothing else does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import native_sparse_attention as nsa  # noqa: E402

HEADS, DIM, WINDOW, BLOCK, TOPK = 8, 64, 256, 64, 8


def inputs(tokens: int) -> list[Tensor]:
    """q, k, v and the upstream gradient, (1, T, H, D); keys vary slowly, so that some blocks do matter more."""
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(1, tokens, HEADS, DIM) for _ in range(4))
    k = k + 2 * torch.randn(1, -(-tokens // BLOCK), HEADS, DIM).repeat_interleave(BLOCK, 1)[:, :tokens]
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream]


def sparse(q: Tensor, k: Tensor, v: Tensor, stride: int = BLOCK) -> Tensor:
    pool = nsa.AvgPoolCompressor(DIM, stride)
    k_cmp, v_cmp = (pool(x.squeeze(0).transpose(0, 1)).transpose(0, 1)[None] for x in (k, v))
    gates = torch.full((*q.shape[:3], 3), 0.5)
    sizes = {"block_size": stride, "stride": stride, "select_block_size": BLOCK, "topk_blocks": TOPK}
    return nsa.nsa_attention(q, k, v, k_cmp, v_cmp, gates, local_window=WINDOW, **sizes)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) * DIM**-0.5
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill_(hidden, float("-inf")).softmax(-1), v)


def forward_backward(attention: Callable[..., Tensor], x: list[Tensor]) -> tuple[float, float]:
    """Seconds of a forward and of its backward."""
    begin = time.perf_counter()
    o = attention(*x[:3])
    middle = time.perf_counter()
    torch.autograd.grad(o, x[:3], x[3])
    return middle - begin, time.perf_counter() - middle


def median(run: Callable[[], tuple[float, ...]], repeats: int) -> list[float]:
    run()
    return [statistics.median(column) for column in zip(*(run() for _ in range(repeats)), strict=True)]


def speed(lengths: list[int], repeats: int) -> None:
    print("| T | NSA forward | backward | dense forward | backward | dense / NSA |\n|---|---|---|---|---|---|")
    for tokens in lengths:
        x = inputs(tokens)
        # In turn, so that both meet the same machine.
        both = median(lambda x=x: (*forward_backward(sparse, x), *forward_backward(dense, x)), repeats)
        cells = " | ".join(f"{seconds:.3f} s" for seconds in both)
        print(f"| {tokens} | {cells} | {(both[2] + both[3]) / (both[0] + both[1]):.2f}× |", flush=True)


def parts(lengths: list[int], repeats: int) -> None:
    sizes = {"block_size": BLOCK, "stride": BLOCK}
    print("| T | local | compressed | choice | selective |  (forward + backward, ms)\n|---|---|---|---|---|")
    for tokens in lengths:
        q, k, v, upstream = inputs(tokens)
        k_cmp, v_cmp = (x.detach().unflatten(1, (-1, BLOCK)).mean(2).requires_grad_() for x in (k, v))
        lse = nsa.compressed_attention(q, k_cmp, v_cmp, **sizes)[1].detach()
        choose = lambda q=q, k=k_cmp, lse=lse: nsa.select_blocks(  # noqa: E731
            q, k, lse, **sizes, select_block_size=BLOCK, topk_blocks=TOPK
        )
        chosen = choose()
        branches = [
            (lambda q, k, v: nsa.local_attention(q, k, v, WINDOW), [q, k, v, upstream]),
            (lambda q, k, v: nsa.compressed_attention(q, k, v, **sizes)[0], [q, k_cmp, v_cmp, upstream]),
            (lambda q, k, v, at=chosen: nsa.selective_attention(q, k, v, at, BLOCK), [q, k, v, upstream]),
        ]
        times = [sum(median(lambda f=f, x=x: forward_backward(f, x), repeats)) for f, x in branches]
        begin = time.perf_counter()
        choose()
        times.insert(2, time.perf_counter() - begin)
        print(f"| {tokens} | " + " | ".join(f"{seconds * 1e3:.0f}" for seconds in times) + " |", flush=True)


def peak_of(name: str, tokens: int, stride: int, result: multiprocessing.Queue) -> None:
    """In a process of its own: the highest resident memory of a forward + backward, above that with the inputs."""
    attention = eager if name == "eager" else lambda q, k, v: sparse(q, k, v, stride)
    forward_backward(attention, inputs(256))  # libraries and thread pools are in memory before the count
    x = inputs(tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward_backward(attention, x)
    result.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def peak(name: str, tokens: int, stride: int = BLOCK) -> float:
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=peak_of, args=(name, tokens, stride, result))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} at {tokens} tokens ended with exit code {process.exitcode}")
    return result.get()


def memory(lengths: list[int], eager_most: int) -> None:
    strides = (16, 32, 64)
    columns = " | ".join(f"NSA d = {d} | less by" for d in strides)
    print(f"| T | eager dense | {columns} |\n|---|---|" + "---|---|" * len(strides))
    for tokens in lengths:
        reference = peak("eager", tokens) if tokens <= eager_most else None
        cells = [f"{reference:.0f} MiB" if reference else "not run"]
        for stride in strides:
            ours = peak("nsa", tokens, stride)
            cells += [f"{ours:.0f} MiB", f"{reference / ours:.1f}×" if reference else "–"]
        print(f"| {tokens} | " + " | ".join(cells) + " |", flush=True)


def model(batch: int, repeats: int) -> None:
    from nsa_gpt_training import NSALanguageModel

    cfg = nsa.NSAConfig(dim=384, heads=6, seq_len=256, local_window=64, block_size=32, stride=32, dropout=0.2)
    tokens = torch.randint(65, (batch, 257))
    models = {kind: NSALanguageModel(65, cfg, 6, attention=kind) for kind in ("nsa", "dense")}
    optimizers = {kind: torch.optim.AdamW(m.parameters(), lr=1e-4) for kind, m in models.items()}

    def step(kind: str) -> float:
        begin = time.perf_counter()
        loss = models[kind](tokens[:, :-1], tokens[:, 1:])[1]
        optimizers[kind].zero_grad()
        loss.backward()
        optimizers[kind].step()
        return time.perf_counter() - begin

    seconds = median(lambda: (step("nsa"), step("dense")), repeats)
    count = sum(p.numel() for p in models["nsa"].parameters()) / 1e6
    print("| parameters | batch × context | NSA step | dense step | NSA / dense |\n|---|---|---|---|---|")
    cells = f"{seconds[0]:.2f} s | {seconds[1]:.2f} s | {seconds[0] / seconds[1]:.2f}×"
    print(f"| {count:.1f} M | {batch} × 256 | {cells} |")


@torch.no_grad()
def decode(repeats: int, prompt: int = 2048, layers: int = 6) -> None:
    """Seconds a token of a stack of blocks of the example's full size, batch 1."""
    config = nsa.NSAConfig(dim=384, heads=6, seq_len=prompt + repeats, local_window=64, topk_blocks=4)
    blocks = [nsa.NSABlock(config).eval() for _ in range(layers)]
    caches = [nsa.NSACache(config, 1, config.seq_len) for _ in blocks]
    x = torch.randn(1, config.seq_len, config.dim)

    def run(x: Tensor, caches: list[nsa.NSACache | None]) -> float:
        begin = time.perf_counter()
        for block, cache in zip(blocks, caches, strict=True):
            x = block(x, cache=cache)
        return time.perf_counter() - begin

    prefill = run(x[:, :prompt], caches)
    steps = [run(x[:, t : t + 1], caches) for t in range(prompt, config.seq_len)]
    again = [run(x[:, : t + 1], [None] * layers) for t in range(prompt, config.seq_len)]
    step, whole = statistics.median(steps), statistics.median(again)
    print(f"a prompt of {prompt} tokens: {prefill:.3f} s; then a token with the cache: {step:.4f} s")
    print(f"all tokens again: {whole:.3f} s, {whole / step:.1f}×")


def packed(shapes: list[tuple[int, int]], repeats: int) -> None:
    """Forward + backward of a block of dim 256, and of `nsa_attention` with as many heads, which takes no padding.

    Ragged sequences are 1 to twice the mean long, and as many tokens in all. Padded rows hold 1 to all of their tokens.
    """
    cfg = nsa.NSAConfig(dim=256, heads=4)
    block, names = nsa.NSABlock(cfg), ("packed, equal", "packed, ragged", "padded")
    print("| | sequences × mean | plain |" + "".join(f" {name} | ratio |" for name in names) + "\n|" + "---|" * 9)

    def attention(x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        lengths = torch.tensor([x.shape[1]]) if cu_seqlens is None else cu_seqlens.diff()
        blocks = int(((lengths - cfg.block_size) // cfg.stride + 1).clamp(min=0).sum())
        x_cmp = torch.randn(len(x), blocks, cfg.heads, cfg.dim_head, requires_grad=True)
        x, gates = x.unflatten(2, (cfg.heads, -1)), torch.full((*x.shape[:2], cfg.heads, 3), 0.5)
        return nsa.nsa_attention(x, x, x, x_cmp, x_cmp, gates, local_window=cfg.local_window, **cfg.selection,
                                 cu_seqlens=cu_seqlens)  # fmt: skip

    def seconds(function: Callable[..., Tensor], x: Tensor, **batch: Tensor) -> float:
        begin = time.perf_counter()
        function(x.requires_grad_(), **batch).square().mean().backward()
        return time.perf_counter() - begin

    for count, mean in shapes:
        torch.manual_seed(0)
        more = torch.randint(mean, (count // 2,))  # tokens that one has more than the mean, and another less
        packings = torch.full((count,), mean), torch.cat([mean + more, mean - more])
        mask = torch.arange(mean) <= torch.randint(mean, (count, 1))
        x = torch.randn(count, mean, cfg.dim)
        calls = [(x, {}), *((x.view(1, -1, cfg.dim), {"cu_seqlens": F.pad(n.cumsum(0), (1, 0))}) for n in packings)]
        calls = {block: [*calls, (x, {"key_padding_mask": mask})], attention: calls}
        for function, each in calls.items():
            run = lambda f=function, each=each: [seconds(f, x, **batch) for x, batch in each]  # noqa: E731
            plain, *others = median(run, repeats)
            name = "nsa_attention" if function is attention else "NSABlock"
            cells = "".join(f" {other:.3f} s | {other / plain:.2f} |" for other in others)
            print(f"| {name} | {count} × {mean} | {plain:.3f} s |{cells}", flush=True)


def peer(lengths: list[int], repeats: int) -> None:
    """Whole modules of equal sizes in turns: projections, RoPE, compression MLPs, gates from the input.

    The other package attends to the query's own block besides those that it selects, so that 3 + 1 match our 4. Its
    hidden layer of the compression is given our size.
    """
    from native_sparse_attention_pytorch import SparseAttention

    heads, block, topk, window = 8, 32, 4, 128
    cfg = nsa.NSAConfig(dim=heads * DIM, heads=heads, seq_len=max(lengths), local_window=window, block_size=block,
                        topk_blocks=topk, gate_mode="q_cond", rope_theta=10000.0)  # fmt: skip
    ours = nsa.NativeSparseAttention(cfg)
    theirs = SparseAttention(
        dim=cfg.dim, dim_head=DIM, heads=heads, causal=True, sliding_window_size=window, compress_block_size=block,
        compress_block_sliding_stride=block, selection_block_size=block, num_selected_blocks=topk - 1,
        compress_mlp_expand_factor=2 / block,
    )  # fmt: skip

    def step(module: torch.nn.Module, x: Tensor) -> float:
        begin = time.perf_counter()
        module(x).square().mean().backward()
        seconds = time.perf_counter() - begin
        module.zero_grad()
        return seconds

    name = "native-sparse-attention-pytorch"
    print(f"{name} {version(name)}; dim {cfg.dim}, {heads} heads\n")
    print(f"| T | this library | {name} | ratio, median (least to most) |\n|---|---|---|---|")
    for tokens in lengths:
        x = torch.randn(1, tokens, cfg.dim)
        step(ours, x), step(theirs, x)
        times = [(step(ours, x), step(theirs, x)) for _ in range(repeats)]
        ratios = sorted(b / a for a, b in times)
        mine, other = (statistics.median(column) for column in zip(*times, strict=True))
        spread = f"{statistics.median(ratios):.0f}× ({ratios[0]:.0f} to {ratios[-1]:.0f})"
        print(f"| {tokens} | {mine:.3f} s | {other:.3f} s | {spread} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "parts", "memory", "model", "packed", "decode", "peer"))
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; not given: 2k to 32k, for peer 512 to 2k")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="sequences in a step of the model")
    parser.add_argument("--eager-most", type=int, default=8192, help="longest sequence tried in eager dense attention")
    parser.add_argument("--threads", type=int, help="of PyTorch; not given: as many as it takes by itself")
    args = parser.parse_args()
    args.lengths = args.lengths or [2**i for i in (range(9, 12) if args.what == "peer" else range(11, 16))]
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    if args.what == "speed":
        speed(args.lengths, args.repeats)
    elif args.what == "parts":
        parts(args.lengths, args.repeats)
    elif args.what == "memory":
        memory([n for n in args.lengths if n <= 16384], args.eager_most)
    elif args.what == "model":
        model(args.batch, args.repeats)
    elif args.what == "packed":
        packed([(64, 128), (4096, 4)], args.repeats)
    elif args.what == "peer":
        peer(args.lengths, args.repeats)
    else:
        decode(args.repeats)


if __name__ == "__main__":
    main()
