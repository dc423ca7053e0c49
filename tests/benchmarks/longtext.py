"""Byte-level models of source code at a context of 8,192: NSA, dense attention, a window; and from dense to NSA.

    python tests/benchmarks/learn.py long                     # three attentions, learning rates and seeds
    python tests/benchmarks/learn.py convert                  # a dense model of `long` trained on with NSA
    python tests/benchmarks/longtext.py --out out/one --variant nsa --iterations 500      # a single run

The text is the Python source of the installed torch, or another folder (--data, --pattern). All models of `long` have
the same number of parameters: feed-forwards of dense and window are wider by what NSA's compressors and gates have. A
run writes settings, losses and, at its end, the loss by position, gates and the choice of blocks by layer to log.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from runs import Experiment, Job, Log, header, known_rate, rates_to_run, read_logs
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import native_sparse_attention as nsa  # noqa: E402
import nsa_gpt_training as script  # noqa: E402

BINS = 64  # of positions, in the loss by position
QUERIES = 64  # of a sequence, whose choice of blocks is looked at
KNOWN = {"variant": ("nsa", "dense", "window"), "gates": ("learned", "fixed"), "compressors": ("shared", "own")}


@dataclasses.dataclass(frozen=True)
class Long(script.Settings):
    """Settings of a run. The block sizes are the paper's; queries share one key head."""

    variant: str = "nsa"
    data: Path = Path(torch.__file__).parent
    pattern: str = "*.py"
    layers: int = 8
    dim: int = 512
    heads: int = 16
    kv_heads: int = 1
    context: int = 8192
    batch_size: int = 4
    rope_theta: float = 100_000.0
    dropout: float = 0.0
    value_dropout: float = 0.0
    local_window: int = 512
    stride: int = 16
    select_block_size: int = 64
    topk_blocks: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    gate_init: tuple[float, float, float] = (2.0, -2.0, -2.0)
    iterations: int = 3000
    eval_batches: int = 8
    compile: str = "default"
    gates: str = "learned"  # "fixed": they stay where they start
    test_batches: int = 32  # for what is measured at the end
    compressors: str = "shared"  # "own": each key head has its own
    selection_loss: float = 0.0
    start: str = ""  # folder of a dense run to go on from
    frozen: int = 0  # iterations in which gates and compressors alone learn
    distill: float = 0.0  # weight of the difference from the dense model's predictions
    dense_every: int = 0  # of 4: every fourth layer keeps dense attention


# ── Models ────────────────────────────────────────────────────────────────────────────────────────────────────────────
class WindowAttention(script.DenseAttention):
    """Causal attention over the last tokens alone, with all else as in dense attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.cfg.dim_head)) for y in (self.to_q(x), self.to_k(x), self.to_v(x)))
        q, k = script.rotate(q, self.cfg.rope_theta), script.rotate(k, self.cfg.rope_theta)
        return self.to_out(nsa.local_attention(q.to(v), k.to(v), v, self.cfg.local_window).flatten(2))


class OfEachHead(nn.Module):
    """Compressors, one for each key head: (B, T, K, D) → (B, C, K, D)."""

    def __init__(self, compressor: nsa.TokenCompressor, heads: int) -> None:
        super().__init__()
        self.of_heads = nn.ModuleList(copy.deepcopy(compressor) for _ in range(heads))

    def forward(self, x: Tensor, heads: bool) -> Tensor:
        return torch.cat([each(x[:, :, i : i + 1], heads=heads) for i, each in enumerate(self.of_heads)], dim=2)


def build_model(settings: Long, vocabulary_size: int) -> script.NSALanguageModel:
    """Model of a variant; one that goes on from a dense run has that run's weights, and its feed-forwards."""
    cfg = script.nsa_config(settings)
    torch.manual_seed(script.seed_of(settings.seed, "weights"))
    kind = "nsa" if settings.variant == "nsa" else "dense"
    model = script.NSALanguageModel(vocabulary_size, cfg, settings.layers, kind)
    for number, block in enumerate(model.blocks):
        if settings.variant == "window":
            block.attn = WindowAttention(cfg)
        if kind == "nsa" and settings.dense_every and (number + 1) % settings.dense_every == 0:
            block = model.blocks[number] = script.DenseBlock(cfg)
        if kind == "dense" or settings.start:
            widen(block)
        if settings.compressors == "own":
            for name in ("compress_k", "compress_v"):
                setattr(block.attn, name, OfEachHead(getattr(block.attn, name), cfg.kv_heads))
    model.initialize(0.02)
    if settings.start:
        state = torch.load(Path(settings.start) / "model.pt", weights_only=True)
        unknown = model.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown, f"weights of {settings.start} that the model has no place for: {unknown}"
    return model


def is_sparse(block: script.NSABlock) -> bool:
    return isinstance(block.attn, nsa.NativeSparseAttention)


def widen(block: script.NSABlock) -> None:
    """Give a feed-forward as many more parameters as NSA has more than dense attention."""
    cfg = block.attn.cfg
    more = parameters_of(nsa.NativeSparseAttention(cfg)) - parameters_of(script.DenseAttention(cfg))
    hidden = cfg.ffn_mult * cfg.dim + round(more / (2 * cfg.dim))
    block.ffn[0], block.ffn[2] = nn.Linear(cfg.dim, hidden, cfg.bias), nn.Linear(hidden, cfg.dim, cfg.bias)


# ── Choice of blocks ──────────────────────────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
def block_shares(attention: nsa.NativeSparseAttention, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shares (B, Q, K, N) of each selection block for the queries at positions t (Q,), and the chosen (B, Q, K, S).

    The first are dense attention's, with this layer's queries and keys over all earlier tokens, the second those of the
    compressed branch (importance: paper, eq. 9 and 10). Both are means over the heads of a group and sum to 1.
    """
    cfg, T = attention.cfg, x.shape[1]
    p = attention._project(x, nsa._read_batch(cfg, attention.to_q, x))
    k_cmp, v_cmp = attention._compress(p, nsa._Segments())
    q = p.q[:, t].unflatten(2, (cfg.kv_heads, -1))  # (B, Q, K, G, D)
    key, block = torch.arange(T, device=x.device), torch.arange(k_cmp.shape[1], device=x.device)
    probabilities = []
    for keys, last in ((p.k, key), (k_cmp, block * cfg.stride + cfg.block_size - 1)):
        scores = torch.einsum("bqkgd,bskd->bqkgs", q, keys.to(q.dtype)).float() * cfg.dim_head**-0.5
        probabilities.append(scores.masked_fill(last > t[:, None, None, None], -math.inf).softmax(-1).mean(3))
    size, count = cfg.select_block_size, -(-T // cfg.select_block_size)
    dense = F.pad(probabilities[0], (0, count * size - T)).unflatten(-1, (count, size)).sum(-1)
    start, own = block[:, None] * cfg.stride, torch.arange(count, device=x.device) * size
    overlap = torch.minimum(start + cfg.block_size, own + size) - torch.maximum(start, own)
    importance = probabilities[1] @ (overlap.clamp(min=0) / cfg.block_size)
    lse = nsa.compressed_attention(p.q, k_cmp, v_cmp, cfg.block_size, cfg.stride)[1]
    return dense, importance, nsa.select_blocks(p.q, k_cmp, lse, **cfg.selection)[:, t].long()


@torch.no_grad()
def held_shares(attention: nsa.NativeSparseAttention, x: Tensor, t: Tensor) -> dict[str, float]:
    """Share of dense attention that 16 blocks hold: the chosen ones, the best, random ones, and the forced alone."""
    cfg = attention.cfg
    dense, _, chosen = block_shares(attention, x, t)
    count = dense.shape[-1]
    block, own = torch.arange(count, device=x.device), (t // cfg.select_block_size)[:, None, None]
    always = nsa._is_forced(block, own, cfg)  # and those behind the query
    free, forced = ~always, always & (block <= own)
    of_forced = dense.where(forced, 0).sum(-1)
    slots = cfg.topk_blocks - cfg.init_blocks - cfg.local_blocks
    best = dense.where(free, 0).topk(slots).values.sum(-1)
    noise = torch.rand(dense.shape, device=x.device).where(free, -1)
    picked = dense.where(free, 0).gather(-1, noise.topk(slots).indices).sum(-1)
    held = (dense.gather(-1, chosen.clamp(min=0)) * (chosen >= 0)).sum(-1)
    shares = {"chosen": held, "best": of_forced + best, "random": of_forced + picked, "forced": of_forced}
    return {name: share.mean().item() for name, share in shares.items()}


# ── Distillation ──────────────────────────────────────────────────────────────────────────────────────────────────────
class Distilled(nn.Module):
    """A language model whose loss is in part its difference from a teacher's predictions."""

    def __init__(self, model: script.NSALanguageModel, teacher: nn.Module, weight: float) -> None:
        super().__init__()
        self.model, self.weight = model, weight
        self.teacher = (teacher,)  # in a tuple, so that it is no part of this module

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        logits, loss = self.model(tokens, targets, positions)
        with torch.no_grad():
            truth = self.teacher[0](tokens)[0].float().log_softmax(-1)
        guess = logits.float().log_softmax(-1)
        difference = F.kl_div(guess.flatten(0, 1), truth.flatten(0, 1), reduction="batchmean", log_target=True)
        return logits, (1 - self.weight) * loss + self.weight * difference


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def windows(text: script.Text, use: str, settings: Long, count: int) -> list[script.Batch]:
    """Windows of the validation text, the same in every run."""
    return [
        text.batch("val", settings.batch_size, settings.context, script.seed_of(use, number)) for number in range(count)
    ]


@torch.no_grad()
def final_test(model: script.NSALanguageModel, text: script.Text, settings: Long, runtime: script.Runtime) -> dict:
    """Loss by position, in nats; and for each layer the gates and what the choice of blocks holds."""
    losses, shares, inputs = torch.zeros(settings.context, device=runtime.device), {}, {}
    sparse = {number: block for number, block in enumerate(model.blocks) if is_sparse(block)}
    model.eval()
    batches = windows(text, "test", settings, settings.test_batches)
    for batch in batches:
        tokens, targets, _ = next(runtime.share(batch))
        with runtime.autocast():
            logits = model(tokens)[0]
        losses += F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").mean(0) / len(batches)
    for number, block in sparse.items():
        block.norm1.register_forward_hook(lambda _, __, x, number=number: inputs.__setitem__(number, x))
    tokens, *_ = next(runtime.share(batches[0]))
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(settings.context // 2, settings.context, (QUERIES,), generator=generator).to(runtime.device)
    with runtime.autocast():
        model(tokens)
        for number, block in sparse.items():
            gates = block.attn._gates(inputs[number]).float().mean((0, 1, 2)).tolist()
            shares[number] = {"gates": gates, **held_shares(block.attn, inputs[number], t)}
    bins = losses.unflatten(0, (BINS, -1)).mean(1)
    return {"loss": losses.mean().item(), "by_position": bins.tolist(), "layers": shares}


def train(settings: Long) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    with script.start_runtime(settings) as runtime, (settings.out / "log.jsonl").open("w", buffering=1) as file:
        print(header(vars(settings)), file=file)
        write = lambda **values: print(json.dumps(values), file=file)  # noqa: E731
        text = script.Text(*script.find_text(settings.data, settings.pattern))
        model = build_model(settings, len(text.vocabulary)).to(runtime.device)
        write(text=text.source, characters=[len(text.train), len(text.val)], parameters=parameters_of(model))
        net: nn.Module = model
        if settings.distill:
            teacher = build_model(dataclasses.replace(settings, variant="dense"), len(text.vocabulary))
            net = Distilled(model, teacher.to(runtime.device).requires_grad_(False).eval(), settings.distill)
        net = net if settings.compile == "off" else torch.compile(net, mode=settings.compile)
        optimizer = script.make_optimizer(model, settings)
        validation = windows(text, "evaluation", settings, settings.eval_batches)
        clock, loss = Clock(), torch.zeros(())
        for iteration in range(settings.iterations + 1):
            if iteration % settings.eval_interval == 0 or iteration == settings.iterations:
                mean = loss.item()  # which waits for the device
                clock.stop(iteration)
                val, accuracy = script.score(model, validation, runtime)
                write(iteration=iteration, seconds=clock.seconds, train=mean, val=val, accuracy=accuracy)
                clock.start(iteration)
            if iteration in (0, settings.frozen):
                for name, parameter in model.named_parameters():
                    of_gate = "gate_" in name
                    learns = iteration == settings.frozen or "compress_" in name or of_gate
                    parameter.requires_grad_(learns and not (of_gate and settings.gates == "fixed"))
                torch.compiler.reset()  # compiled code does not see that a parameter learns from now on
            if iteration < settings.iterations:
                seed = script.seed_of(settings.seed, "batch", iteration)
                batch = text.batch("train", settings.batch_size, settings.context, seed)
                rate = script.learning_rate(iteration, settings)
                loss = script.train_step(net, optimizer, batch, rate, settings, runtime)[0]
        torch.save(model.state_dict(), settings.out / "model.pt")
        final = final_test(model, text, settings, runtime)
        speed = statistics.median(clock.speeds) * settings.batch_size * settings.context
        write(final=final, tokens_per_second=speed, training_seconds=clock.seconds)
        print(f"loss {final['loss']:.4f}, {speed:,.0f} tokens/s")


@dataclasses.dataclass
class Clock:
    """Time of training steps, without evaluations: in all, and steps a second of each stretch."""

    seconds: float = 0.0
    speeds: list[float] = dataclasses.field(default_factory=list)

    def start(self, step: int) -> None:
        self.begin, self.first = time.perf_counter(), step

    def stop(self, step: int) -> None:
        if step > 0:
            seconds = time.perf_counter() - self.begin
            self.seconds += seconds
            self.speeds.append((step - self.first) / seconds)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def parse_settings(flags: list[str]) -> Long:
    parser = argparse.ArgumentParser("longtext.py", allow_abbrev=False)
    for each in dataclasses.fields(Long):
        kind: dict[str, Any] = {"type": type(each.default)}
        if isinstance(each.default, tuple):
            kind = {"type": float, "nargs": len(each.default)}
        if each.default is not None and not isinstance(each.default, bool):
            parser.add_argument(f"--{each.name.replace('_', '-')}", default=each.default, **kind)
    given = vars(parser.parse_args(flags))
    for name, known in KNOWN.items():
        if given[name] not in known:
            parser.error(f"{name} = {given[name]!r}: must be {' or '.join(map(repr, known))}")
    if given["context"] % BINS != 0:
        parser.error(f"context = {given['context']}: must be a multiple of {BINS}, the number of bins of positions")
    return Long(**given | {"gate_init": tuple(given["gate_init"])})


# ── Experiments ───────────────────────────────────────────────────────────────────────────────────────────────────────
def job(folder: Path, extra: list[str], **settings: object) -> Job:
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", *as_words(value))]
    parse_settings([*flags, *extra])  # refuses bad flags before anything runs
    return Job(folder, [__file__, "--out", str(folder), *flags, *extra])


def as_words(value: object) -> list[str]:
    return [str(each) for each in value] if isinstance(value, tuple) else [str(value)]


def long_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    jobs, logs = [], read_logs(args.out)
    for variant in args.variants:
        rate = known_rate(args, [log for log in logs if log.variant == variant], best_rate)
        for seed in args.seeds:
            settings = {"variant": variant, "seed": seed}
            for each in rates_to_run(args, seed, rate):
                jobs.append(job(args.out / f"{variant}-{each:g}-{seed}", extra, **settings, learning_rate=each))
            if variant == "dense" and args.dense_steps and rate is not None:
                shorter = [*extra, "--iterations", str(args.dense_steps)]
                jobs.append(job(args.out / f"dense-as-long-as-nsa-{seed}", shorter, **settings, learning_rate=rate))
    return jobs


def best_rate(logs: list[Log]) -> float:
    """Learning rate with which the first seed came to the lowest loss, of the runs that are as long as the longest."""
    steps, seed = max(log.iterations for log in logs), min(log.seed for log in logs)
    first = [log for log in logs if (log.iterations, log.seed) == (steps, seed)]
    return min(first, key=lambda log: log.value("final")["loss"]).learning_rate


def long_tables(logs: list[Log]) -> None:
    """Loss by learning rate, and mean and range over seeds at the best one."""
    done = [log for log in logs if log.value("final")]
    titles = ("learning rate", "steps", "seed", "bits a byte", "nats at the last half", "tokens/s", "minutes")
    print("\n| | " + " | ".join(titles) + " | parameters |\n" + "|---" * 9 + "|")
    for log in sorted(done, key=lambda log: (log.variant, log.iterations, log.learning_rate, log.seed)):
        final, speed, minutes = log.value("final"), log.value("tokens_per_second"), log.value("training_seconds") / 60
        of_run = (f"{log.learning_rate:g}", f"{log.iterations}", f"{log.seed}", *losses_of(final))
        of_run += (f"{speed:,.0f}", f"{minutes:.1f}", f"{log.value('parameters'):,}")
        print(f"| {log.variant} | " + " | ".join(of_run) + " |")
    print("\n| | steps | learning rate | seeds | bits a byte | nats at the last half |\n" + "|---" * 6 + "|")
    for variant, iterations in sorted({(log.variant, log.iterations) for log in done}):
        same = [log for log in done if (log.variant, log.iterations) == (variant, iterations)]
        rate = best_rate(same)
        finals = [log.value("final") for log in same if log.learning_rate == rate]
        columns = [[number for number in map(float, column)] for column in zip(*map(losses_of, finals), strict=True)]
        cells = (f"{statistics.mean(c):.4f} ({min(c):.4f} to {max(c):.4f})" for c in columns)
        print(f"| {variant} | {iterations} | {rate:g} | {len(finals)} | " + " | ".join(cells) + " |")
    choice_tables(done)


def losses_of(final: dict[str, Any]) -> tuple[str, str]:
    """Loss in bits over all positions, and in nats over the last half of them."""
    return f"{final['loss'] / math.log(2):.4f}", f"{statistics.mean(final['by_position'][BINS // 2 :]):.4f}"


def choice_tables(logs: list[Log]) -> None:
    """Print by layer, for each run of NSA, shares of dense attention in the chosen blocks, and gates."""
    for log in logs:
        layers = log.value("final")["layers"]
        if layers:
            print(f"\n{log.name}\n\n| layer | chosen | best | random | forced | gates |\n" + "|---" * 6 + "|")
        for number, of_layer in layers.items():
            shares = (f"{of_layer[name]:.2f}" for name in ("chosen", "best", "random", "forced"))
            gates = ", ".join(f"{gate:.2f}" for gate in of_layer["gates"])
            print(f"| {int(number) + 1} | " + " | ".join(shares) + f" | {gates} |")


RECIPES = {  # settings of each way from a dense model to NSA, beside the dense model that goes on
    "dense goes on": {"variant": "dense"},
    "as is": {},
    "half local, half selective": {"gate_init": (0.0, -4.0, 0.0)},
    "compressors first": {"gate_init": (0.0, -4.0, 0.0), "frozen": 100},
    "distilled": {"gate_init": (0.0, -4.0, 0.0), "distill": 0.5},
    "choice taught": {"gate_init": (0.0, -4.0, 0.0), "selection_loss": 0.1},
    "every fourth layer dense": {"gate_init": (0.0, -4.0, 0.0), "dense_every": 4},
}


def convert_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    start = args.start or best_dense(args.out.parent / "long")
    common = {"start": start, "seed": args.seed, "learning_rate": args.rate, "iterations": args.iterations}
    common |= {"eval_interval": 25}
    jobs = {name.replace(" ", "-").replace(",", ""): RECIPES[name] for name in args.recipes}
    return [job(args.out / name, extra, **common, **settings) for name, settings in jobs.items()]


def best_dense(out: Path) -> Path:
    """Folder of the dense run of `long` with the lowest loss."""
    dense = [log for log in read_logs(out) if log.complete and log.variant == "dense"]
    if not dense:
        raise ValueError(f"start: {out} has no complete run of dense attention to start from; run `long` first")
    return min(dense, key=lambda log: log.value("final")["loss"]).folder


def convert_tables(logs: list[Log]) -> None:
    """Validation loss after some tokens, and how many it takes to come within 0.5 % of the dense model that goes on."""
    dense = next((log for log in logs if log.variant == "dense"), None)
    steps = [each["iteration"] for each in dense.evaluations] if dense else []
    shown = [step for step in steps if step % 100 == 0 or step in (25, 50)]
    print("\n| loss after steps | " + " | ".join(map(str, shown)) + " | within 0.5 % after |")
    print("|---" * (len(shown) + 2) + "|")
    truth = {each["iteration"]: each["val"] for each in dense.evaluations} if dense else {}
    for log in logs:
        losses = {each["iteration"]: each["val"] for each in log.evaluations}
        late = [step for step in steps if losses.get(step, math.inf) > 1.005 * truth[step]]
        after = [step for step in losses if step > max(late, default=-1)]
        tokens = f"{min(after) * log.batch_size * log.context / 1e6:.1f} M tokens" if after else "–"
        print(f"| {log.name} | " + " | ".join(f"{losses.get(step, math.nan):.4f}" for step in shown) + f" | {tokens} |")
    for log in logs:
        final = log.value("final")
        print(f"{log.name}: " + (", ".join(losses_of(final)) if final else "not done"))
    choice_tables([log for log in logs if log.value("final")])


REMEDIES = {  # of a poor choice of blocks
    "as is": {},
    "choice taught": {"selection_loss": 0.1},
    "even gates": {"gate_init": (0.0, 0.0, 0.0)},
    "fixed gates": {"gates": "fixed"},
    "four key heads": {"kv_heads": 4},
    "four key heads with own compressors": {"kv_heads": 4, "compressors": "own"},
}


def choice_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    jobs = []
    for seed, name in itertools.product(args.seeds, args.remedies):
        settings = {"seed": seed, "learning_rate": args.rate, **REMEDIES[name]}
        jobs.append(job(args.out / f"{name}-{seed}".replace(" ", "-"), extra, **settings))
    return jobs


def remedy_tables(logs: list[Log]) -> None:
    """Loss, tokens/s, and what blocks hold of dense attention: the mean over layers, of each seed."""
    done = [log for log in logs if log.value("final")]
    held = ("chosen", "best", "random")
    print("\n| | bits a byte | nats at the last half | tokens/s | " + " | ".join(held) + " |\n" + "|---" * 7 + "|")
    for name, of_name in itertools.groupby(done, lambda log: log.name.rsplit("-", 1)[0]):
        rows = []
        for log in of_name:
            layers = log.value("final")["layers"].values()
            means = (f"{statistics.mean(each[which] for each in layers):.2f}" for which in held)
            rows.append((*losses_of(log.value("final")), f"{log.value('tokens_per_second'):,.0f}", *means))
        print(f"| {name.replace('-', ' ')} | " + " | ".join(map(" / ".join, zip(*rows, strict=True))) + " |")
    choice_tables(done)


LONG = {
    "--variants": dict(nargs="+", choices=KNOWN["variant"], default=KNOWN["variant"]),
    "--seeds": dict(type=int, nargs="+", default=[1337, 1338, 1339]),
    "--rates": dict(type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="learning rates of the first seed"),
    "--dense-steps": dict(type=int, help="also train dense attention in so many steps, which take NSA's time"),
}
CONVERT = {
    "--start": dict(type=Path, help="folder of a dense run; default: the best one of `long`"),
    "--recipes": dict(nargs="+", choices=RECIPES, default=list(RECIPES)),
    "--seed": dict(type=int, default=1),
    "--rate": dict(type=float, default=3e-4),
    "--iterations": dict(type=int, default=500),
}
CHOICE = {
    "--remedies": dict(nargs="+", choices=REMEDIES, default=list(REMEDIES)),
    "--seeds": dict(type=int, nargs="+", default=[1337, 1338, 1339]),
    "--rate": dict(type=float, default=1e-3),
}
EXPERIMENTS = {
    "long": Experiment("source code at 8k tokens: NSA, dense attention, a window", LONG, long_jobs, long_tables),
    "choice": Experiment("what the chosen blocks hold, and remedies", CHOICE, choice_jobs, remedy_tables),
    "convert": Experiment("from a dense model to NSA: recipes side by side", CONVERT, convert_jobs, convert_tables),
}


if __name__ == "__main__":
    train(parse_settings(sys.argv[1:]))
