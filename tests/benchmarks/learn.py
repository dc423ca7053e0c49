"""What the models learn: text with the training script, and associative recall; many runs side by side on one device.

    python tests/benchmarks/learn.py text        # the full run, NSA and dense, three seeds each
    python tests/benchmarks/learn.py recall      # at 1k, 4k and 16k: NSA, dense, and NSA without a branch
    python tests/benchmarks/learn.py recall --contexts 1024 --variants nsa local -- --iterations 1000

Flags after -- go to every run: those of the training script, or the fields of `Recall` here. After --seconds, runs that
are still going are stopped and count for what they have reached. Each run has a folder in --out with its log. Pictures
are gates and patterns of the first NSA run on text.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from pathlib import Path

import torch
from recall import VARIANTS, parse_recall, recall_jobs, recall_table, run_recall
from runs import Job, run_all

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import nsa_gpt_training as script  # noqa: E402


def text_jobs(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    jobs = []
    for attention, seed in itertools.product(args.variants or ("nsa", "dense"), args.seeds):
        folder = args.out / f"text-{attention}-{seed}"
        flags = ["--full", "--overwrite", "--sample-length", "0", "--out", str(folder), "--seed", str(seed)]
        command = [str(ROOT / "nsa_gpt_training.py"), *flags, "--attention", attention, *extra]
        context = script.parse_settings(command[1:]).context
        jobs.append(Job(attention, seed, context, folder, command, folder / f"{attention}.jsonl"))
    return jobs


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
