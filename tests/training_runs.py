"""What the tests of the training example share: a tiny run, its text, and ways to start it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import nsa_gpt_training as script

WORDS = ["attention", "block", "gate", "key", "local", "query", "sparse", "token", "value", "window", "\n"]
TINY = dataclasses.replace(
    script.QUICK,
    layers=2,
    dim=32,
    heads=2,
    context=32,
    local_window=8,
    block_size=8,
    iterations=6,
    batch_size=4,
    warmup=2,
    eval_interval=3,
    eval_batches=2,
    sample_length=20,
)


def write_words(path: Path) -> Path:
    """Words in random order: enough structure to learn, small enough to be quick."""
    choices = torch.randint(len(WORDS), (3000,), generator=torch.Generator().manual_seed(7))
    path.write_text(" ".join(WORDS[choice] for choice in choices), encoding="utf-8")
    return path


def flags(settings: script.Settings) -> list[str]:
    """The command line that says the same as `settings`."""
    line = []
    for each in dataclasses.fields(settings):
        value, flag = getattr(settings, each.name), "--" + each.name.replace("_", "-")
        if isinstance(value, bool):
            line += [flag if value else flag.replace("--", "--no-", 1)]
        elif isinstance(value, tuple):
            line += [flag, *map(str, value)] if value else []
        elif value is not None:
            line += [f"{flag}={value}"]
    return line


def prepare(settings: script.Settings) -> tuple[script.Runtime, script.Data, script.Batches]:
    with script.joined_processes(settings) as runtime:
        data = script.load_data(settings, runtime)
    return runtime, data, script.fixed_batches(data, settings)


def make_trainer(settings: script.Settings, attention: str) -> script.Trainer:
    settings.out.mkdir(exist_ok=True)
    runtime, data, batches = prepare(settings)
    model = script.build_model(data, attention, settings)
    return script.Trainer(model, data, batches, settings, runtime)


def train(trainer: script.Trainer) -> script.Run:
    with script.Log(trainer.settings, trainer.runtime) as log:
        return trainer.train(log)


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str], exit_code: int = 2) -> str:
    """The one line on stderr with which the script turns these arguments down."""
    assert script.main(arguments) == exit_code, f"exit code of {arguments}"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, f"{len(lines)} lines on stderr: {lines}"
    return lines[0]
