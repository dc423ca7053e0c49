"""Associative recall, which learn.py runs.

Recall: keys, each followed by its value, among filler; then the keys again, in another order.

    . . k1 v1 . . . k2 v2 . k3 v3 . . . . . . . . . . . . . . k2 v2 k3 v3 k1 v1
    pairs in the first half, one in each of equal parts       asked for: each value, where its key is repeated

Keys are distinct and values drawn anew for each sequence, so that nothing can be learnt by heart. A short sequence has
one pair for 8 tokens. Training begins with short sequences, many in a batch, which double until they fill the context.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import torch
from runs import Job
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
LEARN = Path(__file__).with_name("learn.py")
sys.path.insert(0, str(ROOT))
import nsa_gpt_training as script  # noqa: E402
from native_sparse_attention import NSAConfig  # noqa: E402

VARIANTS = {  # attention, and the branches whose gates are open
    "nsa": ("nsa", script.BRANCHES),
    "dense": ("dense", script.BRANCHES),
    "without local": ("nsa", ("compressed", "selective")),
    "without compressed": ("nsa", ("local", "selective")),
    "without selective": ("nsa", ("local", "compressed")),
    "local": ("nsa", ("local",)),
}
RECALL_TOKENS = 65536  # in a batch, at every context
KEYS = VALUES = FILLERS = 32  # distinct tokens of each kind
TOKENS_OF_PAIR = 8  # that a sequence has at least for each of its pairs


# ── Recall ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclasses.dataclass(frozen=True)
class Recall(script.Settings):
    """Settings of a run on recall. The blocks are small and overlap, so that each key is in one with its value."""

    variant: str = "nsa"
    pairs: int = 32
    context: int = 1024
    first_context: int = 32  # few keys to tell apart: what answers there is found at once, and stays
    growth: float = 0.5  # share of the iterations in which sequences grow
    layers: int = 2
    dim: int = 64
    heads: int = 2
    init_std: float = 0.125  # 1/sqrt(dim): attention differs between keys from the start
    rope_theta: float = 1e10  # most of a head turns so slowly that it matches contents at any distance
    dropout: float = 0.0
    local_window: int = 16
    block_size: int = 4
    stride: int = 2
    select_block_size: int = 16
    iterations: int = 400
    learning_rate: float = 5e-3
    warmup: int = 20
    eval_interval: int = 100
    eval_batches: int = 4

    def batch_shape(self, iteration: int) -> tuple[int, int]:
        """Sequences in a batch, and tokens in each: shorter ones are more, so that the tokens are as many.

        They stay as short as they begin for half of the time in which they grow.
        """
        halvings = 0  # of the context, to get to the first sequences
        while self.context % (2 << halvings) == 0 and self.context >> (halvings + 1) >= self.first_context:
            halvings += 1
        grown = min(1.0, iteration / (self.growth * self.iterations))
        doublings = 0 if grown < 0.5 else 1 + int((2 * grown - 1) * (halvings - 1))
        left = max(0, halvings - doublings)
        return self.batch_size << left, self.context >> left


def recall_batch(pairs: int, rows: int, length: int, seed: int) -> script.Batch:
    """Sequences (rows, length), and targets that are -100 but where a value is asked for."""
    generator = torch.Generator().manual_seed(seed)
    pairs = min(pairs, length // TOKENS_OF_PAIR)
    shape, part, end = (rows, pairs), length // 2 // pairs, length - 2 * pairs
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = KEYS + torch.randint(VALUES, shape, generator=generator)
    places = torch.arange(pairs) * part + torch.randint(part - 1, shape, generator=generator)
    order = torch.rand(shape, generator=generator).argsort(1)
    tokens = KEYS + VALUES + torch.randint(FILLERS, (rows, length), generator=generator)
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    tokens[:, end::2], tokens[:, end + 1 :: 2] = keys.gather(1, order), values.gather(1, order)
    targets = torch.full_like(tokens, -100)
    targets[:, end::2] = values.gather(1, order)
    return tokens, targets


def recall_model(settings: Recall, longest: int) -> script.NSALanguageModel:
    attention, branches = VARIANTS[settings.variant]
    names = ("dim", "heads", "local_window", "block_size", "stride", "select_block_size", "topk_blocks", "rope_theta")
    shared = {name: getattr(settings, name) for name in names}
    cfg = NSAConfig(seq_len=longest, bias=True, gate_mode="static", gate_init=(0.0, 0.0, 0.0), **shared)
    torch.manual_seed(script.seed_of(settings.seed, "weights"))
    model = script.NSALanguageModel(KEYS + VALUES + FILLERS, cfg, settings.layers, attention, settings.init_std)
    if attention == "nsa":
        close_gates(model, [branch not in branches for branch in script.BRANCHES])
    return model


@torch.no_grad()
def close_gates(model: script.NSALanguageModel, closed: list[bool]) -> None:
    """Set gates to sigmoid(-inf) = 0, where the gradient is 0 too: a closed branch adds nothing and stays closed."""
    for block in model.blocks:
        block.attn.gate_bias[:, closed] = -math.inf


def run_recall(settings: Recall, contexts: list[int], log: Path) -> None:
    """Train and test one model; evaluations, and at the end the accuracy at each context, go to a log of JSON lines."""
    with script.start_runtime(settings) as runtime, log.open("w", buffering=1) as file:
        model = recall_model(settings, max(contexts))
        net: nn.Module = script.distribute(model, settings, runtime)
        optimizer = script.make_optimizer(model, settings)

        def batches(use: str, count: int, rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
            seeds = [script.seed_of(settings.seed, use, number) for number in range(count)]
            return [recall_batch(settings.pairs, rows, length, seed) for seed in seeds]

        validation = batches("evaluation", settings.eval_batches, settings.batch_size, settings.context)
        for iteration in range(settings.iterations):
            shape = settings.batch_shape(iteration)
            batch = recall_batch(settings.pairs, *shape, script.seed_of(settings.seed, "batch", iteration))
            script.train_step(net, optimizer, batch, script.learning_rate(iteration, settings), settings, runtime)
            if (iteration + 1) % settings.eval_interval == 0 or iteration + 1 == settings.iterations:
                loss, accuracy = script.score(net, validation, runtime)
                print(json.dumps({"iteration": iteration + 1, "val": loss, "accuracy": accuracy}), file=file)
        tests = {}
        for length in contexts:  # fresh sequences, as many tokens in a batch at each length
            rows = max(1, settings.batch_size * settings.context // length)
            tests[length] = script.score(net, batches("test", 8, rows, length), runtime)[1]
        print(json.dumps({"tests": tests}), file=file)
        print(f"accuracy {tests}")


# ── Jobs and tables ───────────────────────────────────────────────────────────────────────────────────────────────────
def recall_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    """Long contexts first: they take longest. Models of the shortest context are tested at all of them."""
    jobs, contexts = [], sorted(args.contexts, reverse=True)
    for context, variant, seed in itertools.product(contexts, args.variants or VARIANTS, args.seeds):
        folder = args.out / f"recall-{variant}-{context}-{seed}".replace(" ", "-")
        tested = contexts[::-1] if context == min(contexts) else [context]
        flags = {"variant": variant, "seed": seed, "context": context, "batch-size": max(RECALL_TOKENS // context, 1)}
        command = [str(LEARN), "one", "--contexts", *map(str, tested), "--log", str(folder / "log.jsonl"), "--"]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        jobs.append(Job(variant, seed, context, folder, [*command, *extra], folder / "log.jsonl"))
    return jobs


def parse_recall(flags: list[str]) -> Recall:
    """A Recall from flags of its fields."""
    parser = argparse.ArgumentParser("learn.py recall --", allow_abbrev=False)
    for each in dataclasses.fields(Recall):
        if isinstance(each.default, int | float | str) and not isinstance(each.default, bool):
            kind, name = type(each.default), each.name.replace("_", "-")
            parser.add_argument(f"--{name}", type=kind, default=each.default)
    settings = Recall(**vars(parser.parse_args(flags)))
    if not 0 < settings.pairs <= min(KEYS, settings.context // TOKENS_OF_PAIR):
        parser.error(f"pairs = {settings.pairs}: must be 1 to {KEYS}, and one for {TOKENS_OF_PAIR} tokens at most")
    return settings


def recall_table(jobs: list[Job]) -> None:
    contexts = sorted({job.context for job in jobs})
    print("\naccuracy, of each seed\n\n| | " + " | ".join(f"{context:,}" for context in contexts) + " |")
    print("|---" * (1 + len(contexts)) + "|")
    for variant in dict.fromkeys(job.variant for job in jobs):
        of_variant = [job for job in jobs if job.variant == variant]
        cells = ([accuracy(job) for job in of_variant if job.context == context] for context in contexts)
        print(f"| {variant} | " + " | ".join(map(" / ".join, cells)) + " |")
    print("* of the best evaluation of a run that was stopped\n")
    for job in jobs:
        if len(job.tests()) > 1:
            shown = ", ".join(f"{share:.4f} at {int(length):,}" for length, share in job.tests().items())
            print(f"{job.name}: {shown}")
    for job in jobs:
        shown = "  ".join(f"{each['iteration']} {each['accuracy']:.3f}" for each in job.evaluations())
        print(f"{job.name}, {job.seconds:.0f} s: {shown}")


def accuracy(job: Job) -> str:
    best, tested = job.best(), job.tests().get(str(job.context))
    return f"{tested:.4f}" if tested is not None else f"{best['accuracy']:.4f}*" if best else "–"
