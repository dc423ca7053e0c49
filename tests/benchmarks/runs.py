"""Experiments of many runs: a queue of jobs over all GPUs, a log of each, and tables from the logs.

An experiment says which jobs it has, and prints its tables from the logs of those that have run:

    EXPERIMENTS = {"recall": Experiment("recall at 1k to 16k tokens", flags, jobs, tables)}

A job is a Python file and its flags, in a process of its own. It writes one *.jsonl into its folder: first its
`header`, then a line for each evaluation ({"iteration": 100, "val": 2.1, ...}) and whatever else it finds. The runner
adds the last line, with the minutes and the exit code.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Experiment:
    """Jobs of an experiment and its tables.

    `flags` are flags of its own, each with arguments of add_argument. `jobs` takes the parsed flags, `out` (the folder
    of the experiment) among them, and the words after --, which are for every job; it is asked again when a job has
    ended, since the jobs of an experiment may follow from what others found. `tables` prints.
    """

    summary: str
    flags: dict[str, dict[str, Any]]
    jobs: Callable[[Namespace, list[str]], list[Job]]
    tables: Callable[[list[Log]], None]


@dataclass(frozen=True)
class Job:
    """A run in a process of its own: the folder of its log and output, and a Python file with its flags."""

    folder: Path
    command: list[str]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def flags(self) -> list[str]:
        """Flags of the command, wherever the folder is."""
        return [word.replace(str(self.folder), self.name) for word in self.command[1:]]

    @property
    def printed(self) -> Path:
        return self.folder / "printed.txt"

    def forget(self) -> None:
        """Remove the log of an earlier run."""
        for log in self.folder.glob("*.jsonl"):
            log.unlink()

    def start(self, gpu: str | None) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.forget()
        visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with self.printed.open("w") as printed:
            command = [sys.executable, *self.command]
            return subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env={**os.environ, **visible})

    def finish(self, exit_code: int, seconds: float) -> None:
        """Add the last line to the log."""
        for path in self.folder.glob("*.jsonl"):
            line = {"minutes": round(seconds / 60, 2), "exit_code": exit_code, "flags": self.flags}
            with path.open("a", encoding="utf-8") as file:
                print(json.dumps(line), file=file)

    def last_words(self) -> str:
        return ["", *self.printed.read_text(encoding="utf-8", errors="replace").splitlines()][-1]


class Log:
    """Lines of a run's log, and what they say."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, []
        for path in folder.glob("*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(json.JSONDecodeError):  # the last one of a run that was killed may be cut off
                    self.lines.append(json.loads(line))
        self.settings: dict[str, Any] = self.value("settings") or {}

    def value(self, name: str) -> Any:
        """Value of that name in the last line that has it; None if there is none."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def __getattr__(self, name: str) -> Any:
        """Setting of the run, as `log.seed`."""
        with suppress(KeyError):
            return self.__dict__["settings"][name]
        raise AttributeError(f"{self.__dict__['folder']}: its log has no setting {name!r}")

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def evaluations(self) -> list[dict]:
        return [line for line in self.lines if "val" in line]

    @property
    def best(self) -> dict | None:
        return min(self.evaluations, key=lambda each: each["val"], default=None)

    @property
    def complete(self) -> bool:
        return self.value("exit_code") == 0


def read_logs(out: Path) -> list[Log]:
    """Logs of all runs in the folder of an experiment that have begun."""
    logs = [Log(folder) for folder in sorted(out.glob("*")) if folder.is_dir()]
    return [log for log in logs if log.settings]


def known_rate(args: Namespace, logs: list[Log], best_rate: Callable[[list[Log]], float]) -> float | None:
    """Best learning rate of the first seed, once all have run."""
    done = [log for log in logs if log.seed == args.seeds[0] and log.complete]
    return best_rate(done) if {log.learning_rate for log in done} >= set(args.rates) else None


def rates_to_run(args: Namespace, seed: int, rate: float | None) -> list[float]:
    """Learning rates of a seed: all for the first one, for the others that which is known to be the best."""
    if seed == args.seeds[0]:
        return args.rates
    return [] if rate is None else [rate]


def header(settings: dict[str, Any]) -> str:
    """First line of a log: settings, command, torch and the device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    environment = {"torch": torch.__version__, "device": device, "command": " ".join(sys.argv)}
    return json.dumps({"settings": settings, "environment": environment}, default=str)


# ── The runner ────────────────────────────────────────────────────────────────────────────────────────────────────────
def missing(jobs: list[Job]) -> list[Job]:
    """Jobs whose log is not complete. A complete log of other flags is an error: it would be lost."""
    missing = []
    for job in jobs:
        log = Log(job.folder)
        if not log.complete:
            missing.append(job)
        elif log.value("flags") != job.flags:
            then = " ".join(log.value("flags"))
            raise ValueError(f"{job.folder} has a run with other flags ({then}): give --overwrite or another --out")
    return missing


def slots(gpus: list[str] | None, side_by_side: int | None) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each job that runs at the same time; None: as it is here.

    >>> slots(["0", "1"], 2)
    ['0', '1', '0', '1']
    """
    if side_by_side is not None and side_by_side < 1:
        raise ValueError(f"side_by_side = {side_by_side}: must be at least 1")
    if gpus is None:
        here = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [str(index) for index in range(torch.cuda.device_count())] if here is None else here.split(",")
        gpus = gpus if torch.cuda.is_available() else []
    return gpus * (4 if side_by_side is None else side_by_side) if gpus else [None] * (side_by_side or 1)


def run_all(wanted: Callable[[], list[Job]], free: list[str | None], seconds: float) -> list[Job]:
    """Run jobs, as many at once as there are free slots, and say of each when it has ended, and how.

    Once a job has ended, `wanted` may have new ones; none is run twice. After so many seconds those that run are
    stopped and no other begins. Returns those that failed.
    """
    begin, waiting, known, failed, stopping = time.monotonic(), [], set(), [], False
    with stopped_at_the_end() as running:  # job, process, its slot, and when it began
        while True:
            now = time.monotonic() - begin
            if now > seconds and not stopping:
                stopping, waiting = True, []
                for _, process, *_ in running:
                    process.terminate()
            ended = [each for each in running if each[1].poll() is not None]
            for each in ended:
                job, process, slot, start = each
                running.remove(each)
                free.append(slot)
                job.finish(process.returncode, now - start)
                if process.returncode != 0 and not stopping:
                    failed.append(job)
                code = "stopped" if stopping and process.returncode else f"exit code {process.returncode}"
                print(f"{now:5.0f} s  {job.name}: {now - start:.0f} s, {code}; {job.last_words()}", flush=True)
            if (ended or not known) and not stopping:
                new = [job for job in wanted() if job.folder not in known]
                known |= {job.folder for job in new}
                waiting += new
            while waiting and free:
                slot = free.pop(0)
                running.append((waiting[0], waiting.pop(0).start(slot), slot, now))
            if not running:
                return failed
            time.sleep(0.1)


@contextmanager
def stopped_at_the_end() -> Iterator[list[tuple[Job, subprocess.Popen, str | None, float]]]:
    """A list of running jobs: on Ctrl-C, SIGTERM or an error, those that are left in it are stopped."""
    running: list = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield running
    finally:
        for _, process, *_ in running:
            process.terminate()
        for _, process, *_ in running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        signal.signal(signal.SIGTERM, before)
