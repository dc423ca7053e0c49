"""Runs side by side, each in a process of its own, and what their logs say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
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
