"""What the models learn: runs of the training example, as many as there are, side by side on one device.

    python tests/benchmarks/learn.py text        # the full run, NSA and dense, three seeds each
    python tests/benchmarks/learn.py recall      # at 1k, 4k and 16k: NSA, dense, and NSA without a branch
    python tests/benchmarks/learn.py recall --contexts 1024 --variants nsa local -- --iterations 1000

What follows -- goes to every run. After --seconds, runs that go on are asked to stop, and count for what they have
reached. Each run keeps its log and checkpoints in a folder of its own in --out; `pictures` has the gates and patterns
of the first NSA run, drawn from its log and its best checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import nsa_gpt_training as script  # noqa: E402

VARIANTS = {
    "nsa": ["--attention", "nsa"],
    "dense": ["--attention", "dense"],
    "without local": ["--attention", "nsa", "--branches", "compressed", "selective"],
    "without compressed": ["--attention", "nsa", "--branches", "local", "selective"],
    "without selective": ["--attention", "nsa", "--branches", "local", "compressed"],
    "local": ["--attention", "nsa", "--branches", "local"],
}
RECALL_TOKENS = 65536  # in a batch, at every context


@dataclasses.dataclass
class Job:
    """A run, and what is to be read of it."""

    name: str
    variant: str
    seed: int
    context: int
    folder: Path
    flags: list[str]
    seconds: float = 0.0

    def start(self, extra: list[str]) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.log, self.record):  # of an earlier run: its results are not this one's
            path.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "nsa_gpt_training.py"), "--out", str(self.folder), "--log", str(self.log)]
        with (self.folder / "printed.txt").open("w") as printed:
            return subprocess.Popen([*command, *self.flags, *extra], stdout=printed, stderr=subprocess.STDOUT)

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def record(self) -> Path:
        return self.folder / "run.json"

    def evaluations(self) -> list[script.Evaluation]:
        lines = map(json.loads, self.log.read_text().splitlines()[1:]) if self.log.exists() else ()
        names = [each.name for each in dataclasses.fields(script.Evaluation)]
        return [script.Evaluation(**{name: line[name] for name in names}) for line in lines if "val" in line]

    def best(self) -> script.Evaluation | None:
        return min(self.evaluations()[1:], key=lambda each: each.val, default=None)

    def tests(self) -> dict[str, float]:
        """Accuracy by context, of a run that came to its end."""
        return json.loads(self.record.read_text())["runs"][0]["tests"] if self.record.exists() else {}

    def last_words(self) -> str:
        return ["", *(self.folder / "printed.txt").read_text().splitlines()][-1]


def jobs_for(args: argparse.Namespace) -> list[Job]:
    """Long contexts first: they take longest. What learns recall at the shortest is tested at all of them."""
    if args.what == "text":
        cases = [(script.FULL.context, ["--full", "--sample-length", "0"])]
        variants = args.variants or ("nsa", "dense")
    else:
        cases = [(context, recall_flags(context, args)) for context in sorted(args.contexts, reverse=True)]
        variants = args.variants or VARIANTS
    jobs = []
    for (context, flags), variant, seed in itertools.product(cases, variants, args.seeds):
        folder = args.out / f"{variant}-{context}-{seed}".replace(" ", "-")
        name = f"{variant}, {context:,} tokens, seed {seed}"
        jobs.append(Job(name, variant, seed, context, folder, [*flags, "--seed", str(seed), *VARIANTS[variant]]))
    return jobs


def recall_flags(context: int, args: argparse.Namespace) -> list[str]:
    rows = max(RECALL_TOKENS // context, 1)
    flags = ["--task", "recall", "--context", str(context), "--batch-size", str(rows)]
    others = [str(other) for other in sorted(args.contexts) if other != context]
    return [*flags, "--test-contexts", *others] if others and context == min(args.contexts) else flags


def run_all(jobs: list[Job], seconds: float, extra: list[str]) -> None:
    """All at once. Says of each when it has ended, and how."""
    begin = time.monotonic()
    running = {job.name: (job, job.start(extra)) for job in jobs}
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
            reached.setdefault(job.variant, []).append(best.val)
            cells = (f"{best.val:.4f}", f"{best.iteration}", f"{best.train:.4f}", f"{job.evaluations()[-1].iteration}")
            print(f"| {job.variant} | {job.seed} | " + " | ".join(cells) + " |")
    for variant, losses in reached.items():
        print(f"mean of {variant}: {statistics.mean(losses):.4f}")
    for job in jobs:
        print(f"{job.name}: " + "  ".join(f"{each.iteration} {each.val:.4f}" for each in job.evaluations()))


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
        shown = "  ".join(f"{each.iteration} {each.accuracy:.3f}" for each in job.evaluations())
        print(f"{job.name}, {job.seconds:.0f} s: {shown}")


def accuracy(job: Job) -> str:
    best, tested = job.best(), job.tests().get(str(job.context))
    return f"{tested:.4f}" if tested is not None else f"{best.accuracy:.4f}*" if best else "–"


def draw(job: Job, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    run = script.Run("nsa", 0, job.evaluations())
    print(script.plot_gates(run, folder / "gates.png"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, state = script.load_checkpoint(job.folder / "nsa.pt", device)
    same = {name: state["settings"][name] for name in ("task", "layers", "context", "rope_theta", "pairs")}
    settings = dataclasses.replace(script.FULL, **same, plot_patterns=folder / "patterns.png")
    runtime = script.Runtime(device, torch.float32)
    print(script.plot_patterns(model, script.load_data(settings, runtime), settings, runtime))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("text", "recall"))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "learn")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--pictures", type=Path, help="folder for the pictures of the first NSA run")
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    args, extra = parser.parse_args(own), sys.argv[2 + len(own) :]
    jobs = jobs_for(args)
    run_all(jobs, args.seconds, extra)
    (text_table if args.what == "text" else recall_table)(jobs)
    if args.pictures is not None:
        draw(next(job for job in jobs if job.variant == "nsa"), args.pictures)


if __name__ == "__main__":
    main()
