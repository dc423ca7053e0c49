"""Synthetic tasks of recall: associative recall, zoology's multi-query recall, and retrieval; learn.py runs them.

A run trains one model, tests it, and writes a log:

    python tests/benchmarks/recall.py mqar --log out/log.jsonl --variant dense --dim 128 --seed 1

Recall: keys, each followed by its value, among filler; then the keys again, in another order.

    . . k1 v1 . . . k2 v2 . k3 v3 . . . . . . . . . . . . . . k2 v2 k3 v3 k1 v1
    pairs in the first half, one in each of equal parts       asked for: each value, where its key is repeated

MQAR: pairs at the start, then random tokens, with each key once at an even distance from the pairs; most are near.

    k1 v1 k2 v2 k3 v3 k2 . . . k1 . . . . . k3 . . . . . . .   asked for: the value, at the key

Retrieval: facts of three tokens, spread over the whole sequence; and questions at its end.

    . . = k1 v1 . . . . = k2 v2 . . . . = k3 k1 . . . . ? k3 ? k2        asked for: the value, at the key

Needle has one fact, multi-key one for each of many keys, multi-value several values of a key, all of them asked for.
In variable tracking a fact may give a key in place of a value, as k3 above: it stands for the value of that key.

Keys are distinct and values drawn anew for each sequence, each batch is new, and tests are batches of their own, so
that nothing can be learnt by heart.
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from runs import Experiment, Job, Log, header, known_rate, rates_to_run, read_logs
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import nsa_gpt_training as script  # noqa: E402
from native_sparse_attention import NSAConfig  # noqa: E402

Batch = tuple[Tensor, Tensor, Tensor]  # tokens (B, T), targets (B, A), and where in T each is asked for (B, A)

VARIANTS = {  # attention, and the branches whose gates are open
    "nsa": ("nsa", script.BRANCHES),
    "dense": ("dense", script.BRANCHES),
    "without local": ("nsa", ("compressed", "selective")),
    "without compressed": ("nsa", ("local", "selective")),
    "without selective": ("nsa", ("local", "compressed")),
    "local": ("nsa", ("local",)),
}
NOTHING = -100  # target where nothing is asked for


# ── Tasks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclasses.dataclass(frozen=True)
class Task(script.Settings, abc.ABC):
    """Settings of a run, and its data. The blocks are small and overlap, so that each key is in one with its value."""

    vocabulary: ClassVar[int]
    variant: str = "nsa"
    context: int = 1024
    first_context: int = 32  # few keys to tell apart: what answers there is found at once, and stays
    growth: float = 0.5  # share of the iterations in which sequences grow
    tested: str = ""  # lengths of the tests; default: the context
    convolution: int = 0  # tokens that a first convolution of each channel sees; 0: none
    layers: int = 2
    dim: int = 64
    heads: int = 2
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
    enough: float = math.inf  # accuracy in an evaluation at which training ends

    @property
    def lengths(self) -> list[int]:
        return [int(word) for word in self.tested.split()] or [self.context]

    @property
    def longest(self) -> int:
        return max(self.context, *self.lengths)

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

    def rows(self, length: int) -> int:
        """Sequences of that length in a batch of as many tokens as those that the model is trained on."""
        return max(1, self.batch_size * self.context // length)

    @abc.abstractmethod
    def batch(self, iteration: int, random: torch.Generator) -> Batch:
        """A batch to train on."""

    @abc.abstractmethod
    def examples(self, use: str) -> Iterator[tuple[str, Callable[[torch.Generator], Batch]]]:
        """Batches of an "evaluation" or a "test": the name under which each is counted, and what draws it."""


def sample(count: int, of: int, rows: int, random: torch.Generator, log_weights: Tensor | float = 0.0) -> Tensor:
    """Distinct numbers (rows, count) below `of`, drawn one after the other in proportion to weights."""
    gumbel = -torch.empty(rows, of, device=random.device).exponential_(generator=random).log()
    return (gumbel + log_weights).topk(count).indices


@dataclasses.dataclass(frozen=True)
class Recall(Task):
    """Associative recall. A short sequence has one pair for 8 tokens."""

    vocabulary: ClassVar[int] = 96  # keys, values and filler, 32 of each
    pairs: int = 32

    def batch(self, iteration: int, random: torch.Generator) -> Batch:
        return recall_batch(self.pairs, *self.batch_shape(iteration), random)

    def examples(self, use: str) -> Iterator[tuple[str, Callable[[torch.Generator], Batch]]]:
        for length in [self.context] if use == "evaluation" else self.lengths:
            draw = functools.partial(recall_batch, self.pairs, self.rows(length), length)
            yield from itertools.repeat((str(length), draw), self.eval_batches if use == "evaluation" else 8)


def recall_batch(pairs: int, rows: int, length: int, random: torch.Generator) -> Batch:
    """Sequences with pairs in their first half and questions at their end."""
    pairs = min(pairs, length // 8)
    shape, part, end, on = (rows, pairs), length // 2 // pairs, length - 2 * pairs, {"device": random.device}
    keys = sample(pairs, 32, rows, random)
    values = torch.randint(32, 64, shape, generator=random, **on)
    places = torch.arange(pairs, **on) * part + torch.randint(part - 1, shape, generator=random, **on)
    order = sample(pairs, pairs, rows, random)
    tokens = torch.randint(64, 96, (rows, length), generator=random, **on)
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    tokens[:, end::2], tokens[:, end + 1 :: 2] = keys.gather(1, order), values.gather(1, order)
    return tokens, values.gather(1, order), torch.arange(end, length, 2, **on).expand(shape)


@dataclasses.dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall with the data of zoology (Arora et al. 2023), drawn anew for each batch.

    Keys are the lower half of the vocabulary without 0, values the upper half, other tokens any; the distance of a
    question from the pairs follows a power law. A batch is of one of the training sets, drawn in proportion to their
    sizes. Training ends when the accuracy over all test sets together is 0.99.
    """

    train_sets: str = "64/4*100 128/8*20 256/16*20 256/32*20 256/64*20"  # tokens/pairs*thousands of sequences
    test_sets: str = "64/4 64/8 64/16 128/32 256/64 512/128 1024/256"
    test_rows: int = 1000  # of each test set
    vocabulary: int = 8192
    batch_size: int = 256
    convolution: int = 3
    layers: int = 1  # after the convolution, which is zoology's other layer
    block_size: int = 8
    stride: int = 4
    select_block_size: int = 8
    learning_rate: float = 3.2e-3
    iterations: int = 8 * 703  # 703 batches are an epoch of zoology: 180,000 sequences, 24 million tokens
    warmup: int = 100
    eval_interval: int = 703
    enough: float = 0.99

    @property
    def longest(self) -> int:
        return max(int(each.split("/")[0]) for each in f"{self.train_sets} {self.test_sets}".split())

    def batch(self, iteration: int, random: torch.Generator) -> Batch:
        sets = [each.split("*") for each in self.train_sets.split()]
        weights = torch.tensor([float(thousands) for _, thousands in sets])
        chooser = torch.Generator().manual_seed(script.seed_of(self.seed, "set", iteration))
        length, pairs = map(int, sets[weights.multinomial(1, generator=chooser).item()][0].split("/"))
        return mqar_batch(self.vocabulary, pairs, self.batch_size, length, random)

    def examples(self, use: str) -> Iterator[tuple[str, Callable[[torch.Generator], Batch]]]:
        for name in self.test_sets.split():
            length, pairs = map(int, name.split("/"))
            for start in range(0, self.test_rows, rows := max(1, 2**16 // length)):
                shape = (pairs, min(rows, self.test_rows - start), length)
                yield name, lambda random, shape=shape: mqar_batch(self.vocabulary, *shape, random)


def mqar_batch(vocabulary: int, pairs: int, rows: int, length: int, random: torch.Generator) -> Batch:
    """Sequences with pairs at their start; questions are at an even distance from there, and among random tokens."""
    half, start, space = vocabulary // 2, 2 * pairs, length // 2 - pairs
    keys = 1 + sample(pairs, half - 1, rows, random)
    values = half + sample(pairs, half, rows, random)
    power_law = (0.01 - 1) * torch.arange(1, space + 1, device=random.device).log()
    asked = start + 2 * sample(pairs, space, rows, random, power_law)
    tokens = torch.randint(vocabulary, (rows, length), generator=random, device=random.device)
    tokens[:, :start:2], tokens[:, 1:start:2] = keys, values
    return tokens.scatter_(1, asked, keys), values, asked


@dataclasses.dataclass(frozen=True)
class Retrieval(Task):
    """Four tasks after RULER (Hsieh et al. 2024), in equal shares of each batch. Short sequences have fewer facts."""

    KINDS: ClassVar[tuple[str, ...]] = ("needle", "multi-key", "multi-value", "variables")
    KEYS: ClassVar[int] = 64
    VALUES: ClassVar[int] = 64
    FILLERS: ClassVar[int] = 64
    vocabulary: ClassVar[int] = KEYS + VALUES + FILLERS + 2
    context: int = 4096
    tested: str = "4096 8192 16384 32768"
    test_rows: int = 64  # of each kind and length
    convolution: int = 3
    layers: int = 3
    dim: int = 128
    heads: int = 4
    topk_blocks: int = 8
    learning_rate: float = 3e-3
    iterations: int = 2000
    warmup: int = 50
    eval_interval: int = 200

    def batch(self, iteration: int, random: torch.Generator) -> Batch:
        rows, length = self.batch_shape(iteration)
        batches = [retrieval_batch(kind, rows // len(self.KINDS), length, random, hints=True) for kind in self.KINDS]
        answers = max(targets.shape[1] for _, targets, _ in batches)
        pad = lambda x, value: F.pad(x, (0, answers - x.shape[1]), value=value)  # noqa: E731
        padded = [(tokens, pad(targets, NOTHING), pad(asked, 0)) for tokens, targets, asked in batches]
        return tuple(map(torch.cat, zip(*padded, strict=True)))

    def examples(self, use: str) -> Iterator[tuple[str, Callable[[torch.Generator], Batch]]]:
        lengths, count = ([self.context], self.eval_batches) if use == "evaluation" else (self.lengths, None)
        for length, kind in itertools.product(lengths, self.KINDS):
            rows = min(self.rows(length), self.test_rows)
            draw = lambda random, shape=(kind, rows, length): retrieval_batch(*shape, random)  # noqa: E731
            yield from itertools.repeat((f"{kind} {length}", draw), count or -(-self.test_rows // rows))


def retrieval_batch(kind: str, rows: int, length: int, random: torch.Generator, hints: bool = False) -> Batch:
    """Sequences of one of the four tasks. Targets that are asked for at the same place are answers in any order.

    With hints, a fact that gives a key asks for its value there, too.
    """
    K, V = Retrieval.KEYS, Retrieval.VALUES
    fact, question = Retrieval.vocabulary - 2, Retrieval.vocabulary - 1
    at_most, tokens_each, same = {  # keys or chains, tokens that each takes at least, and facts about one
        "needle": (1, 32, 1), "multi-key": (16, 8, 1), "multi-value": (4, 16, 4), "variables": (4, 16, 3)
    }[kind]  # fmt: skip
    groups = min(at_most, length // tokens_each)
    facts = groups * same
    places = sample(facts, facts, rows, random).unflatten(1, (groups, same))  # which of the equal parts each is in
    if kind == "variables":  # = a v, = b a, = c b, in this order; asked for: b and c
        left = sample(facts, K, rows, random).unflatten(1, (groups, same))
        value = K + sample(groups, V, rows, random)[..., None]
        right, places = torch.cat([value, left[..., :-1]], -1), places.sort(-1).values
        keys, answers = left[..., 1:].flatten(1), value.expand(-1, -1, 2).flatten(1)[..., None]
    else:  # = a v, = a w, = a x: all values of a are asked for at once
        keys = sample(groups, K, rows, random)
        left, right = keys[..., None].expand_as(places), K + sample(same, V, rows * groups, random).view_as(places)
        answers = right
    order = sample(keys.shape[1], keys.shape[1], rows, random)
    keys, answers = keys.gather(1, order), answers.gather(1, order[..., None].expand_as(answers))
    end = length - 2 * keys.shape[1]
    part = end // facts
    offsets = torch.randint(part - 2, (rows, facts), generator=random, device=random.device)
    starts = places.flatten(1) * part + offsets
    tokens = K + V + torch.randint(Retrieval.FILLERS, (rows, length), generator=random, device=random.device)
    for offset, part_of_fact in enumerate((torch.full_like(starts, fact), left.flatten(1), right.flatten(1))):
        tokens.scatter_(1, starts + offset, part_of_fact)
    tokens[:, end::2], tokens[:, end + 1 :: 2] = question, keys
    asked = torch.arange(end + 1, length, 2, device=random.device)[:, None].expand_as(answers)
    answers, asked = answers.flatten(1), asked.flatten(1)
    if hints and kind == "variables":
        places = (starts + 2).unflatten(1, (groups, same))[..., 1:].flatten(1)
        answers, asked = torch.cat([value.expand(-1, -1, 2).flatten(1), answers], 1), torch.cat([places, asked], 1)
    return tokens, answers, asked


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
class Answers(script.NSALanguageModel):
    """NSALanguageModel with logits (B, A, vocabulary) of the tokens at which something is asked for, and no others.

    Before the first block may come a short causal convolution of each channel, as in zoology's models: it joins a key
    to its value, which attention alone takes long to learn.
    """

    def __init__(self, task: Task, cfg: NSAConfig, attention: str) -> None:
        super().__init__(task.vocabulary, cfg, task.layers, attention, init_std=task.dim**-0.5)
        self.taps = nn.Parameter(torch.randn(task.convolution, task.dim) / max(1, task.convolution) ** 0.5)

    def forward(self, tokens: Tensor, targets: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token_embedding(tokens)  # (B, T, dim)
        before = F.pad(x, (0, 0, len(self.taps), 0))
        for back, tap in enumerate(self.taps):
            x = x + tap * before[:, len(self.taps) - back : before.shape[1] - back]
        for block in self.blocks:
            x = block(x)
        x = x.gather(1, asked[..., None].expand(-1, -1, x.shape[-1]))  # (B, A, dim)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=NOTHING)


class OnDevice(script.Runtime):
    """Runtime of one process whose batches are made where they are used."""

    def share(self, batch: Batch, parts: int = 1) -> Iterator[Batch]:
        yield batch

    def random(self, *use: object) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(script.seed_of(*use))


def build_model(task: Task) -> Answers:
    """Model of a task. Its weights are so large that attention differs between keys from the start."""
    attention, branches = VARIANTS[task.variant]
    names = ("dim", "heads", "local_window", "block_size", "stride", "select_block_size", "topk_blocks", "rope_theta")
    shared = {name: getattr(task, name) for name in names}
    cfg = NSAConfig(seq_len=task.longest, bias=True, gate_mode="static", gate_init=(0.0, 0.0, 0.0), **shared)
    torch.manual_seed(script.seed_of(task.seed, "weights"))
    model = Answers(task, cfg, attention)
    if attention == "nsa":
        close_gates(model, [branch not in branches for branch in script.BRANCHES])
    return model


@torch.no_grad()
def close_gates(model: Answers, closed: list[bool]) -> None:
    """Set gates to sigmoid(-inf) = 0, where the gradient is 0 too: a closed branch adds nothing and stays closed."""
    for block in model.blocks:
        block.attn.gate_bias[:, closed] = -math.inf


def run(task: Task, path: Path) -> None:
    """Train and test one model; evaluations, and at the end the accuracy in each test, go to a log of JSON lines."""
    with script.start_runtime(task) as runtime, path.open("w", buffering=1, encoding="utf-8") as log:
        runtime = OnDevice(**vars(runtime))
        model = build_model(task).to(runtime.device)
        optimizer = script.make_optimizer(model, task)
        settings = {"task": type(task).__name__.lower(), **dataclasses.asdict(task)}
        print(header({**settings, "parameters": sum(x.numel() for x in model.parameters())}), file=log)
        for iteration in range(task.iterations):
            batch = task.batch(iteration, runtime.random(task.seed, "batch", iteration))
            script.train_step(model, optimizer, batch, script.learning_rate(iteration, task), task, runtime)
            if (iteration + 1) % task.eval_interval == 0 or iteration + 1 == task.iterations:
                now = {"iteration": iteration + 1, **score(model, task, "evaluation", runtime)}
                print(json.dumps(now), file=log)
                if now["accuracy"] >= task.enough:
                    break
        tests = score(model, task, "test", runtime)["by"]
        print(json.dumps({"tests": tests}), file=log)
        print("accuracy " + ", ".join(f"{share:.4f} at {name}" for name, share in tests.items()))


@torch.no_grad()
def score(model: Answers, task: Task, use: str, runtime: OnDevice) -> dict[str, object]:
    """Mean loss and share of right answers, of all and by name.

    An answer is right if only other answers to the same question have logits as high.
    """
    totals = defaultdict(lambda: torch.zeros(3, dtype=torch.float64, device=runtime.device))
    model.eval()
    for number, (name, draw) in enumerate(task.examples(use)):
        tokens, targets, asked = draw(runtime.random(task.seed, use, number))
        with runtime.autocast():
            logits, loss = model(tokens, targets, asked)
        answers = (asked[:, :, None] == asked[:, None, :]).sum(-1)  # to the same question
        right = (logits >= logits.gather(-1, targets[..., None])).sum(-1) <= answers
        totals[name] += torch.stack([loss * targets.numel(), right.sum(), torch.full_like(loss, targets.numel())])
    model.train()
    by = {name: total.tolist() for name, total in totals.items()}
    loss, right, asked = (sum(column) for column in zip(*by.values(), strict=True))
    shares = {name: right / asked for name, (_, right, asked) in by.items()}
    return {"val": loss / asked, "accuracy": right / asked, "by": shares}


# ── Jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
TASKS = {task.__name__.lower(): task for task in (Recall, MQAR, Retrieval)}
TOKENS = 65536  # in a batch of recall and retrieval, at every context


def job(name: str, args: argparse.Namespace, extra: list[str], **flags: object) -> Job:
    """A run of the experiment in `args`, in a folder of that name."""
    words = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", str(value))] + extra
    parse(args.what, words)  # refuses bad flags before anything runs
    folder = args.out / name.replace(" ", "-")
    return Job(folder, [__file__, args.what, "--log", str(folder / "log.jsonl"), *words])


def parse(name: str, flags: list[str]) -> Task:
    """Settings of a task from flags of its fields."""
    parser = argparse.ArgumentParser(f"learn.py {name} --", allow_abbrev=False)
    for each in dataclasses.fields(TASKS[name]):
        if isinstance(each.default, int | float | str) and not isinstance(each.default, bool):
            parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(each.default), default=each.default)
    return TASKS[name](**vars(parser.parse_args(flags)))


def recall_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    """Long contexts first: they take longest. Models of the shortest context are tested at all of them."""
    jobs, contexts = [], sorted(args.contexts, reverse=True)
    for context, variant, seed in itertools.product(contexts, args.variants, args.seeds):
        tested = " ".join(map(str, contexts[::-1] if context == min(contexts) else [context]))
        shape = {"context": context, "batch_size": max(TOKENS // context, 1), "tested": tested}
        jobs.append(job(f"{variant}-{context}-{seed}", args, extra, variant=variant, seed=seed, **shape))
    return jobs


def mqar_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    """Wide models first, which take longest."""
    jobs, logs = [], read_logs(args.out)
    for dim, variant in itertools.product(sorted(args.dims)[::-1], args.variants):
        rate = known_rate(args, [log for log in logs if (log.variant, log.dim) == (variant, dim)], best_rate)
        for seed in args.seeds:
            for each in rates_to_run(args, seed, rate):
                flags = {"variant": variant, "dim": dim, "learning_rate": each, "seed": seed}
                jobs.append(job(f"{variant}-{dim}-{each:g}-{seed}", args, extra, **flags))
    return jobs


def best_rate(logs: list[Log]) -> float:
    """Learning rate with which the first seed came to the highest accuracy, or to one that was enough the soonest."""
    seed = min(log.seed for log in logs)
    first = [log for log in logs if log.seed == seed]

    def rank(log: Log) -> tuple[float, int]:
        last = log.evaluations[-1]
        return min(last["accuracy"], log.enough), -last["iteration"]

    return max(first, key=rank).learning_rate


def retrieval_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    jobs = []
    for seed, variant in itertools.product(args.seeds, args.variants):
        flags = {"variant": variant, "seed": seed, "batch_size": TOKENS // Retrieval.context}
        jobs.append(job(f"{variant}-{seed}", args, extra, **flags))
    return jobs


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def shares(log: Log) -> dict[str, str]:
    """Accuracy in each test, or in the best evaluation of a run that has not come to its tests, with a star."""
    tests = log.value("tests")
    if tests is not None:
        return {name: f"{share:.4f}" for name, share in tests.items()}
    return {name: f"{share:.4f}*" for name, share in (log.best or {"by": {}})["by"].items()}


def show(rows: dict[str, list[dict[str, str]]], columns: Iterable[str]) -> None:
    """Print a table: each row has its title and, for each run, what to show in each column."""
    columns = list(columns)
    titles = [f"{int(column):,}" if column.isdecimal() else column for column in columns]
    print("\naccuracy, of each seed\n\n| | " + " | ".join(titles) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for title, runs in rows.items():
        cells = (" / ".join(cells[column] for cells in runs if column in cells) or "–" for column in columns)
        print(f"| {title} | " + " | ".join(cells) + " |")


def group(logs: list[Log], title: Callable[[Log], str]) -> dict[str, list[Log]]:
    """Logs by title, in the order of variants, and each in order of seeds."""
    groups: dict[str, list[Log]] = {}
    for log in sorted(logs, key=lambda log: (log.dim, list(VARIANTS).index(log.variant), log.seed)):
        groups.setdefault(title(log), []).append(log)
    return groups


def show_progress(logs: list[Log]) -> None:
    print("\n* of the best evaluation of a run that was stopped\n")
    for log in logs:
        shown = "  ".join(f"{each['iteration']} {each['accuracy']:.3f}" for each in log.evaluations)
        minutes = f"{log.value('minutes')} minutes" if log.complete else "not complete"
        print(f"{log.name}, {log.parameters:,} parameters, {minutes}: {shown}")


def recall_tables(logs: list[Log]) -> None:
    contexts, rows = sorted({log.context for log in logs}), {}
    for title, of_title in group(logs, lambda log: log.variant).items():
        own = [(str(log.context), shares(log)) for log in of_title]
        rows[title] = [{context: cells[context]} for context, cells in own if context in cells]
    show(rows, map(str, contexts))
    for log in logs:
        if log.context == contexts[0]:
            print(f"{log.name}: " + ", ".join(f"{share} at {length}" for length, share in shares(log).items()))
    show_progress(logs)


def mqar_tables(logs: list[Log]) -> None:
    """Accuracy at the best rate of each variant and width, and how each run came there."""
    rows, evaluated = {}, [log for log in logs if log.evaluations]
    for title, of_title in group(evaluated, lambda log: f"{log.variant}, dim {log.dim}").items():
        rate = best_rate(of_title)
        rows[f"{title}, rate {rate:g}"] = [shares(log) for log in of_title if log.learning_rate == rate]
    show(rows, dict.fromkeys(name for log in logs for name in shares(log)))
    show_progress(logs)


def retrieval_tables(logs: list[Log]) -> None:
    groups, rows = group(logs, lambda log: log.variant), {}
    for kind, (title, of_title) in itertools.product(Retrieval.KINDS, groups.items()):
        named = [{name.removeprefix(f"{kind} "): share for name, share in shares(log).items()} for log in of_title]
        rows[f"{kind}, {title}"] = named
    show(rows, dict.fromkeys(length for log in logs for length in log.tested.split()))
    show_progress(logs)


def flags_of(variants: list[str], **others: dict[str, object]) -> dict[str, dict[str, object]]:
    seeds = {"--seeds": dict(type=int, nargs="+", default=[1337, 1338, 1339])}
    return {"--variants": dict(nargs="+", choices=VARIANTS, default=variants), **seeds, **others}


MAIN = ["nsa", "dense", "local"]
EXPERIMENTS = {
    "recall": Experiment(
        "associative recall, trained at each of several contexts",
        flags_of(list(VARIANTS), **{"--contexts": dict(type=int, nargs="+", default=[1024, 4096, 16384])}),
        recall_jobs,
        recall_tables,
    ),
    "mqar": Experiment(
        "zoology's multi-query associative recall",
        flags_of(
            MAIN,
            **{
                "--dims": dict(type=int, nargs="+", default=[64, 128, 256]),
                "--rates": dict(type=float, nargs="+", default=[1e-3, 3.2e-3], help="learning rates of the first seed"),
            },
        ),
        mqar_jobs,
        mqar_tables,
    ),
    "retrieval": Experiment(
        "needles, several keys or values, variables: trained at 4k tokens, tested up to 32k",
        flags_of(MAIN),
        retrieval_jobs,
        retrieval_tables,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--log", type=Path, required=True)
    args, flags = parser.parse_known_args()
    run(parse(args.task, flags), args.log)


if __name__ == "__main__":
    main()
