"""What the models learn: experiments of many runs, side by side on all GPUs.

    python tests/benchmarks/learn.py text        # the full run of the training script, NSA and dense, three seeds
    python tests/benchmarks/learn.py recall      # recall at 1k, 4k and 16k: NSA, dense, and NSA without a branch
    python tests/benchmarks/learn.py mqar        # zoology's multi-query associative recall
    python tests/benchmarks/learn.py retrieval   # needles, several keys or values, variables: 4k to 32k
    python tests/benchmarks/learn.py long        # source code at 8k tokens: NSA, dense attention, a window
    python tests/benchmarks/learn.py choice      # what the chosen blocks hold of dense attention, and remedies
    python tests/benchmarks/learn.py convert     # a dense model of `long` trained on with NSA
    python tests/benchmarks/learn.py recall --contexts 1024 --variants nsa local -- --iterations 1000

Flags after -- go to every run: --help of an experiment lists those before. Each run has a folder with its log in
--out, named after the experiment. Runs that are complete there are not run again, so that the same command goes on
where it was broken off; --tables runs nothing and prints the tables of all runs that are there.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from pathlib import Path

import longtext
import recall
import torch
from runs import Experiment, Job, Log, missing, read_logs, run_all, slots

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import nsa_gpt_training as script  # noqa: E402


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def text_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    jobs = []
    for attention, seed in itertools.product(args.variants, args.seeds):
        folder = args.out / f"{attention}-{seed}"
        flags = ["--full", "--overwrite", "--sample-length", "0", "--out", str(folder), "--seed", str(seed)]
        jobs.append(Job(folder, [str(ROOT / "nsa_gpt_training.py"), *flags, "--attention", attention, *extra]))
        script.parse_settings(jobs[-1].command[1:])  # refuses bad flags before anything runs
    return jobs


def text_tables(logs: list[Log]) -> None:
    print("\n| attention | seed | best validation loss | at iteration | training loss then | evaluated up to |")
    print("|---|---|---|---|---|---|")
    reached: dict[str, list[float]] = {}
    for log in logs:
        best = log.best
        if best is not None:
            reached.setdefault(log.attention, []).append(best["val"])
            last = log.evaluations[-1]["iteration"]
            cells = (f"{best['val']:.4f}", f"{best['iteration']}", f"{best['train']:.4f}", f"{last}")
            print(f"| {log.attention} | {log.seed} | " + " | ".join(cells) + " |")
    for attention, losses in reached.items():
        print(f"mean of {attention}: {statistics.mean(losses):.4f}")
    for log in logs:
        print(f"{log.name}: " + "  ".join(f"{each['iteration']} {each['val']:.4f}" for each in log.evaluations))


def draw(folder: Path, out: Path) -> None:
    """Pictures of a run of NSA on text: gates and patterns."""
    out.mkdir(parents=True, exist_ok=True)
    log = Log(folder)
    script.gates_figure(script.Run("nsa", 0, evaluations=log.evaluations)).savefig(out / "gates.png")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = script.load_model(folder / "nsa.pt", device)
    text = script.Text(*script.find_text(Path(log.data) if log.data else None))
    figure = script.patterns_figure(model, text, script.Runtime(device, torch.float32))
    figure.savefig(out / "patterns.png")
    print(f"pictures: {out / 'gates.png'}, {out / 'patterns.png'}")


TEXT = {
    "--variants": dict(nargs="+", choices=("nsa", "dense"), default=["nsa", "dense"]),
    "--seeds": dict(type=int, nargs="+", default=[1337, 1338, 1339]),
    "--pictures": dict(type=Path, help="folder for pictures of gates and patterns, of the first seed of NSA"),
}
EXPERIMENTS = {
    "text": Experiment("the full run of the training script", TEXT, text_jobs, text_tables),
    **recall.EXPERIMENTS,
    **longtext.EXPERIMENTS,
}


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
COMMON = {
    "--out": dict(type=Path, default=ROOT / "out" / "learn", help="the experiment has a folder of its name there"),
    "--seconds": dict(type=float, default=math.inf, help="after which all is stopped; tables show what was reached"),
    "--gpus": dict(nargs="+", help="as CUDA_VISIBLE_DEVICES names them; default: all visible"),
    "--side-by-side": dict(type=int, help="runs at once on each GPU (4), or on the CPU (1)"),
    "--overwrite": dict(action="store_true", help="run again what is complete in --out"),
    "--tables": dict(action="store_true", help="run nothing, print the tables of all logs in --out"),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    flags = {"all": COMMON, **{name: experiment.flags for name, experiment in EXPERIMENTS.items()}}
    epilog = "\n".join(f"flags of {name}: {' '.join(of)}" for name, of in flags.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog, formatter_class=raw)
    commands = parser.add_subparsers(dest="what", required=True, metavar="experiment")
    for name, experiment in EXPERIMENTS.items():
        command = commands.add_parser(name, help=experiment.summary, description=experiment.summary)
        for flag, options in {**COMMON, **experiment.flags}.items():
            command.add_argument(flag, **options)
    args = parser.parse_args(arguments)
    args.out = args.out.resolve() / args.what
    return args


def run(experiment: Experiment, args: argparse.Namespace, extra: list[str]) -> list[Job]:
    """Run the jobs of an experiment, and those that it has once others are done; returns those that failed."""
    free = slots(args.gpus, args.side_by_side)
    if args.overwrite:
        for job in experiment.jobs(args, extra):  # at once: what earlier runs found tells nothing to these
            job.forget()
    jobs = experiment.jobs(args, extra)
    to_run = missing(jobs)
    print(f"{len(to_run)} runs, {len(jobs) - len(to_run)} are complete in {args.out}", flush=True)
    return run_all(lambda: missing(experiment.jobs(args, extra)), free, args.seconds)


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    own = words[: words.index("--")] if "--" in words else words
    args = parse(own)
    experiment = EXPERIMENTS[args.what]
    try:
        failed = [] if args.tables else run(experiment, args, words[len(own) + 1 :])
        logs = read_logs(args.out)
        if not logs:
            raise ValueError(f"out = {args.out}: there is no log of a run in it")
        experiment.tables(logs)
        if args.what == "text" and args.pictures is not None:
            draw(args.out / f"nsa-{args.seeds[0]}", args.pictures)
    except (ValueError, script.Stop) as problem:
        print(f"learn.py: {problem.args[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("learn.py: interrupted", file=sys.stderr)
        return 130
    for job in failed:
        print(f"failed: {job.name}, see {job.printed}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
