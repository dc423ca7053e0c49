"""What the models learn: text with the training script, and associative recall; many runs side by side on one device.

    python tests/benchmarks/learn.py text        # the full run, NSA and dense, three seeds each
    python tests/benchmarks/learn.py recall      # at 1k, 4k and 16k: NSA, dense, and NSA without a branch
    python tests/benchmarks/learn.py recall --contexts 1024 --variants nsa local -- --iterations 1000

Flags after -- go to every run: those of the training script, or the fields of `Recall` here. After --seconds, runs that
are still going are stopped and count for what they have reached. Each run has a folder in --out with its log. Pictures
are gates and patterns of the first NSA run on text.

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
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
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


# ── Many runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclasses.dataclass
class Job:
    """A run in a process of its own, and what its log says."""

    variant: str
    seed: int
    context: int
    folder: Path
    command: list[str]
    log: Path
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.variant}, {self.context:,} tokens, seed {self.seed}"

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)  # of an earlier run
        with (self.folder / "printed.txt").open("w") as printed:
            return subprocess.Popen([sys.executable, *self.command], stdout=printed, stderr=subprocess.STDOUT)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def evaluations(self) -> list[dict]:
        return [line for line in self.lines() if "val" in line]

    def best(self) -> dict | None:
        return min(self.evaluations(), key=lambda each: each["val"], default=None)

    def tests(self) -> dict[str, float]:
        """Accuracy by context, of a run that came to its end."""
        return {length: share for line in self.lines() for length, share in line.get("tests", {}).items()}

    def last_words(self) -> str:
        return ["", *(self.folder / "printed.txt").read_text().splitlines()][-1]


def text_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    jobs = []
    for attention, seed in itertools.product(args.variants or ("nsa", "dense"), args.seeds):
        folder = args.out / f"text-{attention}-{seed}"
        flags = ["--full", "--overwrite", "--sample-length", "0", "--out", str(folder), "--seed", str(seed)]
        command = [str(ROOT / "nsa_gpt_training.py"), *flags, "--attention", attention, *extra]
        context = script.parse_settings(command[1:]).context
        jobs.append(Job(attention, seed, context, folder, command, folder / f"{attention}.jsonl"))
    return jobs


def recall_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    """Long contexts first: they take longest. Models of the shortest context are tested at all of them."""
    jobs, contexts = [], sorted(args.contexts, reverse=True)
    for context, variant, seed in itertools.product(contexts, args.variants or VARIANTS, args.seeds):
        folder = args.out / f"recall-{variant}-{context}-{seed}".replace(" ", "-")
        tested = contexts[::-1] if context == min(contexts) else [context]
        flags = {"variant": variant, "seed": seed, "context": context, "batch-size": max(RECALL_TOKENS // context, 1)}
        command = [__file__, "one", "--contexts", *map(str, tested), "--log", str(folder / "log.jsonl"), "--"]
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


def run_all(jobs: list[Job], seconds: float) -> None:
    """Run all at once, and say of each when it has ended, and how."""
    begin = time.monotonic()
    running = {job.name: (job, job.start()) for job in jobs}
    asked = False
    while running:
        time.sleep(0.5)
        now = time.monotonic() - begin
        if now > seconds and not asked:
            asked = True
            for _, process in running.values():
                process.terminate()
        for name, (job, process) in list(running.items()):
            if process.poll() is not None:
                job.seconds = now
                print(f"{now:5.0f} s  {name}: exit code {process.returncode}; {job.last_words()}", flush=True)
                del running[name]


def text_table(jobs: list[Job]) -> None:
    print("\n| attention | seed | best validation loss | at iteration | training loss then | evaluated up to |")
    print("|---|---|---|---|---|---|")
    reached: dict[str, list[float]] = {}
    for job in jobs:
        best = job.best()
        if best is not None:
            reached.setdefault(job.variant, []).append(best["val"])
            last = job.evaluations()[-1]["iteration"]
            cells = (f"{best['val']:.4f}", f"{best['iteration']}", f"{best['train']:.4f}", f"{last}")
            print(f"| {job.variant} | {job.seed} | " + " | ".join(cells) + " |")
    for variant, losses in reached.items():
        print(f"mean of {variant}: {statistics.mean(losses):.4f}")
    for job in jobs:
        print(f"{job.name}: " + "  ".join(f"{each['iteration']} {each['val']:.4f}" for each in job.evaluations()))


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


def draw(job: Job, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    script.gates_figure(script.Run("nsa", 0, evaluations=job.evaluations())).savefig(folder / "gates.png")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = script.load_model(job.folder / "nsa.pt", device)
    text = script.Text(*script.find_text(script.parse_settings(job.command[1:]).data))
    figure = script.patterns_figure(model, text, script.Runtime(device, torch.float32))
    figure.savefig(folder / "patterns.png")
    print(f"pictures: {folder / 'gates.png'}, {folder / 'patterns.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("text", "recall", "one"), help="one: a single run on recall")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "learn")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--pictures", type=Path, help="folder for pictures of the first NSA run on text")
    parser.add_argument("--log", type=Path, help="of a single run")
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    args, extra = parser.parse_args(own), sys.argv[2 + len(own) :]
    if args.what == "one":
        run_recall(parse_recall(extra), args.contexts, args.log)
        return
    jobs = (text_jobs if args.what == "text" else recall_jobs)(args, extra)
    run_all(jobs, args.seconds)
    (text_table if args.what == "text" else recall_table)(jobs)
    if args.pictures is not None and args.what == "text":
        draw(next(job for job in jobs if job.variant == "nsa"), args.pictures)


if __name__ == "__main__":
    main()
