"""Helpers for the tests of the training script: a tiny run, its text, and ways to start it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch

import nsa_gpt_training as script

WORDS = ["attention", "block", "gate", "key", "local", "query", "sparse", "token", "value", "window", "\n"]
TINY = dataclasses.replace(
    script.QUICK,
    **{"attention": "nsa", "layers": 2, "dim": 32, "heads": 2, "context": 32, "local_window": 8, "block_size": 8},
    **{"topk_blocks": 2, "iterations": 7, "batch_size": 4, "eval_interval": 3, "sample_length": 20},
)
CPU = script.Runtime(torch.device("cpu"), torch.float32)


def write_words(path: Path) -> Path:
    """Words in random order: enough structure to learn, small enough to be quick."""
    choices = torch.randint(len(WORDS), (3000,), generator=torch.Generator().manual_seed(7))
    path.write_text(" ".join(WORDS[choice] for choice in choices), encoding="utf-8")
    return path


def flags(settings: script.Settings) -> list[str]:
    """Command line that says the same as `settings`."""
    line = []
    for each in dataclasses.fields(settings):
        value, flag = getattr(settings, each.name), "--" + each.name.replace("_", "-")
        if each.metadata and value is not None and value is not False:
            words = () if value is True else value if isinstance(value, list) else (value,)
            line += [flag, *map(str, words)]
    return line


def make_trainer(settings: script.Settings, attention: str = "nsa") -> script.Trainer:
    settings.out.mkdir(exist_ok=True)
    text = script.Text(*script.find_text(settings.data))
    return script.Trainer(script.build_model(text.vocabulary, attention, settings), text, settings, CPU)


def train(trainer: script.Trainer) -> bool:
    """Train until the end, or until a signal asks to stop."""
    with contextlib.closing(script.StopRequest()) as request:
        return trainer.train(request)


def complaint(capfd: pytest.CaptureFixture[str], arguments: list[str], exit_code: int = 2) -> str:
    """The one line on stderr with which the script refuses these arguments."""
    assert script.main(arguments) == exit_code, f"exit code of {arguments}"
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, f"{len(lines)} lines on stderr: {lines}"
    return lines[0]
