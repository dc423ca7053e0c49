r"""What a training step of a 124M-parameter GPT costs on a GPU, with NSA and with dense attention in the same run.

    python tests/benchmarks/train.py                                    # context 2k, 8k and 32k, eager
    python tests/benchmarks/train.py --compile                          # both compiled
    python tests/benchmarks/train.py --graphs                           # and both in CUDA graphs
    python tests/benchmarks/train.py --contexts 32768 --recompute       # activation checkpointing
    python tests/benchmarks/train.py --paper                            # the paper's block sizes and window
    python tests/benchmarks/train.py --kv-heads 4                       # grouped queries, for both

One sequence of 128k tokens on one GPU, and on two of them, which share it:

    python tests/benchmarks/train.py --attention nsa --contexts 131072 --recompute --chunk 16384
    torchrun --nproc-per-node 2 tests/benchmarks/train.py --attention nsa --contexts 131072 --recompute --chunk 16384 \
        --context-parallel 2

12 layers, dim 768, 12 heads, vocabulary 50304, rotary positions; bf16 autocast, fused AdamW, clipped gradients:
forward, backward and update as the training example does them, on random tokens. Median of steps, and the peak of
memory, but for CUDA graphs, whose own the allocator does not count. Dense attention is `scaled_dot_product_attention`;
NSA's settings are those that README recommends by length. The logits of 128k tokens and their gradients take 80 GB;
with --chunk N only N tokens have logits at a time, and the backward computes them again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import nsa_gpt_training as script  # noqa: E402

VOCABULARY = 50304
MODEL = dataclasses.replace(script.Settings(), layers=12, dim=768, heads=12, dropout=0.0, value_dropout=0.0)
PAPER = {"local_window": 512, "block_size": 32, "stride": 16, "select_block_size": 64, "topk_blocks": 16}
PAPER_FORCED = {"init_blocks": 1, "local_blocks": 2}
MEDIUM = {"local_window": 128, "block_size": 32, "topk_blocks": 4}
LONG = {"local_window": 256, "block_size": 64, "topk_blocks": 8}


class ChunkedLoss(nn.Module):
    """The script's model, with the logits of some tokens at a time."""

    def __init__(self, model: script.NSALanguageModel, chunk: int) -> None:
        super().__init__()
        self.model, self.head, self.chunk = model, model.head, chunk
        model.head = nn.Identity()

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None) -> tuple[None, Tensor]:
        x, _ = self.model(tokens, positions=positions)
        parts = zip(*(y.flatten(0, 1).split(self.chunk) for y in (x, targets[..., None])), strict=True)
        losses = [checkpoint(self.loss, *part, use_reentrant=False) for part in parts]
        return None, torch.stack(losses).sum() / targets.numel()

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x).float(), targets.flatten(), reduction="sum")


def settings_for(context: int, args: argparse.Namespace) -> script.Settings:
    """Settings with as many sequences as make up --tokens, at least one."""
    given = {name: getattr(args, name) for name in ("kv_heads", "compression", "accumulate")}
    rows = max(args.accumulate, args.tokens // context)
    sizes = PAPER if args.paper else LONG if context >= 4096 else MEDIUM
    mode = "reduce-overhead" if args.graphs else "default" if args.compile else "off"
    return dataclasses.replace(MODEL, context=context, batch_size=rows, compile=mode, **sizes, **given)


def build_model(attention: str, settings: script.Settings, args: argparse.Namespace) -> nn.Module:
    """The script's model with rotary positions and gates that start at one half."""
    more = {"rope_theta": 10000.0, "gate_init": (0.0, 0.0, 0.0), **(PAPER_FORCED if args.paper else {})}
    torch.manual_seed(0)
    cfg = dataclasses.replace(script.nsa_config(settings), **more)
    model = script.NSALanguageModel(VOCABULARY, cfg, settings.layers, attention)
    for block in model.blocks if args.recompute else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return ChunkedLoss(model, args.chunk) if args.chunk else model


def step_costs(
    model: nn.Module, settings: script.Settings, runtime: script.Runtime, repeats: int
) -> tuple[float, float]:
    """Median seconds of a training step, and the GiB that it takes at its peak, weights and optimizer included."""
    on_cuda = runtime.device.type == "cuda"
    net, optimizer = script.distribute(model, settings, runtime), script.make_optimizer(model, settings)
    tokens = torch.randint(VOCABULARY, (settings.batch_size, settings.context + 1))
    batch, seconds = (tokens[:, :-1], tokens[:, 1:]), []
    for step in range(3 + repeats):  # the first ones compile, and let the optimizer make its state
        if step == 3 and on_cuda:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        _, norm = script.train_step(net, optimizer, batch, 1e-4, settings, runtime)
        float(norm)  # waits for the whole backward; an update is timed with the next step
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else float("nan")
    return statistics.median(seconds[3:]), peak


def row(context: int, args: argparse.Namespace, runtime: script.Runtime) -> str:
    settings, speeds, cells = settings_for(context, args), {}, []
    for attention in args.attention:
        try:
            seconds, memory = step_costs(build_model(attention, settings, args), settings, runtime, args.repeats)
        except torch.cuda.OutOfMemoryError:
            if runtime.world > 1:  # the others may wait for this process: torchrun ends them all
                raise
            cells += ["out of memory", "–"]
        else:
            speeds[attention] = settings.batch_size * context / seconds
            known = runtime.device.type == "cuda" and not args.graphs
            cells += [f"{speeds[attention]:,.0f}", f"{memory:.1f}" if known else "–"]
        torch.compiler.reset()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
    ratio = f"{speeds['nsa'] / speeds['dense']:.2f}×" if len(speeds) == 2 else "–"
    return f"| {context:,} | {settings.batch_size} | " + " | ".join((*cells, ratio)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=32768, help="in a batch")
    parser.add_argument("--attention", nargs="+", choices=("nsa", "dense"), default=("nsa", "dense"))
    parser.add_argument("--kv-heads", type=int, default=None)
    parser.add_argument("--compression", default=MODEL.compression)
    parser.add_argument("--paper", action="store_true", help="NSA's settings are those of the paper")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="compile, and run CUDA graphs")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of every block")
    parser.add_argument("--chunk", type=int, default=0, help="tokens that have logits at a time; 0: all")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch, one after the other")
    parser.add_argument("--context-parallel", type=int, default=1, help="processes that share a sequence, by torchrun")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    of_run = dataclasses.replace(MODEL, device=args.device, context_parallel=args.context_parallel)
    with script.start_runtime(of_run) as runtime:
        script.say(f"{runtime}, torch {torch.__version__}, {' '.join(sys.argv[1:]) or 'defaults'}\n")
        names = [f"{attention}, {what}" for attention in args.attention for what in ("tokens/s", "peak GiB")]
        columns = ("context", "batch", *names, "NSA / dense")
        script.say("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for context in args.contexts:
            script.say(row(context, args, runtime))


if __name__ == "__main__":
    main()
