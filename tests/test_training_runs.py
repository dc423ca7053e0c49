"""Training that is stopped, resumed, logged, and shared by processes: the same losses whatever happens on the way."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import TINY, complaint, flags, make_trainer, train, write_words

import nsa_gpt_training as script

ROOT = Path(script.__file__).resolve().parent
NOISY = {"dropout": 0.3, "value_dropout": 0.2}  # so that random numbers matter


@pytest.fixture
def settings(tmp_path: Path) -> script.Settings:
    """A run that stops at nothing: dropout, growing sequences, and an evaluation every third of seven iterations."""
    data = write_words(tmp_path / "words.txt")
    changes = {"data": data, "out": tmp_path / "out", "log": tmp_path / "log.jsonl", "attention": "nsa", **NOISY}
    settings = dataclasses.replace(TINY, iterations=7, first_context=8, growth=0.75, **changes)
    assert [settings.batch_shape(n)[1] for n in range(7)] == [8, 8, 8, 16, 16, 16, 32]
    return settings


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without matplotlib: nothing here waits for it to draw."""
    monkeypatch.setattr(script, "new_figure", lambda *_: None)


def lines_of(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def what_matters(run: script.Run) -> dict:
    """All of a run but its timing."""
    return {**dataclasses.asdict(run), "seconds": None}


# ---------------------------------------------------------------------------------------------------------------------
# Stop and resume
# ---------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing gets to clean up behind it."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, how: object) -> None:
    """In that training step, counted from 1, `how` happens."""
    real, steps = script.train_step, iter(range(1, 10**6))

    def train_step(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        if next(steps) == step:
            how()
        return real(*arguments)

    monkeypatch.setattr(script, "train_step", train_step)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    raise Killed


@pytest.mark.parametrize(
    ("attention", "how", "step"),
    [("nsa", ctrl_c, 1), ("dense", ctrl_c, 5), ("nsa", terminate, 6), ("nsa", kill, 5), ("dense", kill, 7)],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    attention: str, how: object, step: int, settings: script.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer(dataclasses.replace(settings, log=None), attention)
    train(whole)
    settings = dataclasses.replace(settings, out=settings.out.with_name("stopped"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, how)
        with pytest.raises(Killed if how is kill else script.Stop) as stopped:
            train(make_trainer(settings, attention))
    if how is not kill:
        assert stopped.value.exit_code == 130 and f"after iteration {step} of {attention}" in str(stopped.value)
    torch.rand(5)
    resumed = make_trainer(dataclasses.replace(settings, resume=True), attention)
    resumed.resume()
    assert resumed.iteration == (3 * ((step - 1) // 3) if how is kill else step)
    train(resumed)
    assert what_matters(resumed.run) == what_matters(whole.run)
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], expected), name
    for path in (whole.best_path, whole.last_path):
        old, new = (script.read_checkpoint(folder / path.name) for folder in (whole.settings.out, settings.out))
        for state in (old, new):
            state["run"]["seconds"] = None
            state["settings"] = {name: None for name in state["settings"]}
        assert_equal(new, old)


def assert_equal(got: object, expected: object) -> None:
    """Of nested state: bit by bit."""
    assert type(got) is type(expected)
    if isinstance(got, dict):
        assert got.keys() == expected.keys()
    if isinstance(got, dict | list | tuple):
        for pair in zip(*(x.values() if isinstance(x, dict) else x for x in (got, expected)), strict=True):
            assert_equal(*pair)
    elif isinstance(got, torch.Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


def test_a_finished_run_resumes_to_its_own_report(settings: script.Settings, capsys: pytest.CaptureFixture) -> None:
    shown = []
    for resume in (False, True):
        assert script.main(flags(dataclasses.replace(settings, resume=resume))) == 0
        shown.append([line for line in capsys.readouterr().out.splitlines() if "tokens/s" not in line])
    first, again = ([line for line in lines if not line.startswith("nsa ")] for lines in shown)
    assert first == again and any("validation loss, best" in line for line in first)


def test_of_two_models_each_goes_on_where_it_was(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(settings, attention="both")
    assert script.main(flags(settings)) == 0
    whole = json.loads((settings.out / "run.json").read_text())["runs"]
    settings = dataclasses.replace(settings, out=settings.out.with_name("stopped"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7 + 2, ctrl_c)
        line = complaint(capsys, flags(settings), exit_code=130)
    assert "after iteration 2 of dense; --resume" in line
    assert script.main([*flags(settings), "--resume"]) == 0
    resumed = json.loads((settings.out / "run.json").read_text())["runs"]
    for run in (*whole, *resumed):
        del run["seconds"]
    assert resumed == whole


@pytest.mark.parametrize("attention", ["both", "nsa"])
def test_a_stop_in_the_last_evaluation_of_a_model_stops_the_run(
    attention: str, settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(settings, attention=attention)
    real = script.evaluate

    def evaluate(model: object, batches: object, iteration: int, *rest: object) -> script.Evaluation:
        if iteration == settings.iterations:
            terminate()
        return real(model, batches, iteration, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", evaluate)
        assert script.main(flags(settings)) == 130
    shown, errors = capsys.readouterr()
    assert len(errors.splitlines()) == 1 and "interrupted after iteration 7 of nsa; --resume" in errors, errors
    assert "dense   0/7" not in shown and not list(settings.out.glob("dense*")), "the second model was trained"
    assert "validation loss, best" in shown, "the table of the first model is lost"
    assert script.main([*flags(settings), "--resume"]) == 0
    assert "interrupted" not in capsys.readouterr().err


@pytest.mark.parametrize("replaced", [1, 2, 3])
def test_a_kill_between_two_files_leaves_a_best_and_a_last_that_fit_together(
    replaced: int, settings: script.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluation is better than the one before, so that each of the three writes both files."""
    values, real = {0: 9.0, 3: 3.0, 6: 2.0, 7: 1.0}, script.evaluate

    def evaluate(model: object, batches: object, iteration: int, *rest: object) -> script.Evaluation:
        return dataclasses.replace(real(model, batches, iteration, *rest), val=values[iteration])

    monkeypatch.setattr(script, "evaluate", evaluate)
    count, replace = iter(range(1, 100)), os.replace

    def killed_behind_it(old: Path, new: Path) -> None:
        replace(old, new)
        if next(count) == replaced:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(script.os, "replace", killed_behind_it)
        with pytest.raises(Killed):
            train(make_trainer(settings, "nsa"))
    trainer = make_trainer(settings, "nsa")
    kept = script.Run.of(script.read_checkpoint(trainer.best_path)["run"])
    assert kept.best.iteration == len(kept.losses), "the best file holds another model"
    if trainer.last_path.exists():
        last = script.Run.of(script.read_checkpoint(trainer.last_path)["run"])
        assert last.best.iteration <= kept.best.iteration, "the last checkpoint tells of a best one that is not there"
        trainer.resume()
    train(trainer)
    assert len(script.read_checkpoint(trainer.best_path)["run"]["losses"]) == 7


@pytest.mark.parametrize(("fault", "words"), [("gone", "there is no checkpoint"), ("older", "is not the best model")])
def test_a_run_without_its_best_model_is_not_resumed(
    fault: str, words: str, settings: script.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(settings, "nsa")
    train(trainer)
    settings.log.unlink()
    if fault == "gone":
        trainer.best_path.unlink()
    else:
        first, *_, best = sorted(trainer.run.evaluations[1:], key=lambda each: -each.val)
        assert first.val > best.val
        trainer.run.evaluations = [first]
        trainer.save(trainer.best_path)
    line = complaint(capsys, [*flags(settings), "--resume"])
    assert words in line and str(trainer.best_path) in line


def test_a_second_ctrl_c_ends_it_at_once(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)  # a process in the background of a shell ignores Ctrl-C
    interrupt_at(monkeypatch, 5, lambda: (ctrl_c(), ctrl_c()))
    assert "interrupted" in complaint(capsys, flags(settings), exit_code=130)
    assert len(script.read_checkpoint(settings.out / "nsa.last.pt")["run"]["losses"]) == 3
    assert signal.getsignal(signal.SIGINT) is before, "handlers are as they were"


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_turned_down(
    fraction: float, settings: script.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(settings, "nsa")
    trainer.save(trainer.best_path, trainer.last_path)
    whole = trainer.last_path.read_bytes()
    for path in (trainer.best_path, trainer.last_path):
        path.write_bytes(whole[: int(fraction * len(whole))])
    assert_turned_down(settings, capsys, "no whole checkpoint", trainer.best_path)


def test_a_flipped_bit_is_found_wherever_it_is(settings: script.Settings, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(dataclasses.replace(settings, layers=1, dim=8, heads=1), "nsa")
    trainer.save(trainer.best_path)
    whole = trainer.best_path.read_bytes()
    at_random = torch.randint(8 * len(whole), (300,), generator=torch.Generator().manual_seed(0)).tolist()
    for bit in (*at_random, *range(8 * (len(whole) - 100), 8 * len(whole), 3)):  # the checksum is at the end
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        trainer.best_path.write_bytes(damaged)
        with pytest.raises(script.Stop, match="no whole checkpoint"):
            script.read_checkpoint(trainer.best_path)
    trainer.last_path.write_bytes(damaged)
    assert_turned_down(settings, capsys, "no whole checkpoint", trainer.best_path)


def test_a_checkpoint_is_still_what_torch_and_zip_readers_take(settings: script.Settings) -> None:
    trainer = make_trainer(settings, "nsa")
    trainer.save(trainer.best_path)
    assert_equal(torch.load(trainer.best_path, weights_only=True), script.read_checkpoint(trainer.best_path))
    with zipfile.ZipFile(trainer.best_path) as archive:
        assert archive.testzip() is None
        content = trainer.best_path.read_bytes()[: -len(archive.comment)]
        assert archive.comment.decode() == hashlib.sha256(content).hexdigest()


def test_a_checkpoint_from_before_checksums_is_resumed(settings: script.Settings) -> None:
    trainer = make_trainer(settings, "nsa")
    train(trainer)
    for path in (trainer.best_path, trainer.last_path):
        torch.save(script.read_checkpoint(path), path)
    again = make_trainer(settings, "nsa")
    again.resume()
    assert again.finished and what_matters(again.run) == what_matters(trainer.run)


class Intruder:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_not_run(
    settings: script.Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, trainer = tmp_path / "code was run", make_trainer(settings, "nsa")
    trainer.save(trainer.best_path)
    state = torch.load(trainer.best_path, weights_only=True)
    script.save_checkpoint({**state, "extra": Intruder(marker)}, trainer.best_path, trainer.last_path)
    assert_turned_down(settings, capsys, "no whole checkpoint", trainer.best_path)
    assert not marker.exists()
    torch.load(trainer.best_path, weights_only=False)["extra"].close()
    assert marker.exists(), "this file would have run code"


def put(value: object, *path: object) -> Callable[[dict], None]:
    """A function that replaces what is at `path` in nested dicts and lists: by a value, or by what a function makes
    of it; `DELETED` takes it away."""

    def change(state: dict) -> None:
        for key in path[:-1]:
            state = state[key]
        if value is DELETED:
            del state[path[-1]]
        else:
            state[path[-1]] = value(state[path[-1]]) if callable(value) else value

    return change


DELETED = object()
NAN = math.nan
WEIGHT = ("model", "norm.weight")
MOMENT, COUNT = (("optimizer", "state", 0, name) for name in ("exp_avg", "step"))
DAMAGES = {
    **{f"no {name}": put(DELETED, name) for name in script.FIELDS},
    **{f"{name} is None": put(None, name) for name in script.FIELDS},
    **{f"run without {each.name}": put(DELETED, "run", each.name) for each in dataclasses.fields(script.Run)},
    **{f"run: {each.name} is 'x'": put("x", "run", each.name) for each in dataclasses.fields(script.Run)},
    "run: an unknown field": put(1, "run", "speed"),
    "run: other attention": put("dense", "run", "attention"),
    "run: unknown attention": put("x", "run", "attention"),
    "run: tokens NaN": put(NAN, "run", "tokens"),
    "run: tokens too many": put(lambda tokens: tokens + 1, "run", "tokens"),
    "run: tokens true": put(True, "run", "tokens"),
    "run: seconds NaN": put(NAN, "run", "seconds"),
    "run: seconds negative": put(-1.0, "run", "seconds"),
    "run: parameters": put(7, "run", "parameters"),
    "run: a loss is text": put("1.0", "run", "losses", 2),
    "run: a loss too few": put(DELETED, "run", "losses", 0),
    "run: losses beyond the end": put(lambda losses: losses * 2, "run", "losses"),
    "run: no evaluations": put([], "run", "evaluations"),
    "run: an evaluation is missing": put(DELETED, "run", "evaluations", 1),
    "run: evaluations in another order": put(lambda each: each[::-1], "run", "evaluations"),
    "run: iteration NaN": put(NAN, "run", "evaluations", 1, "iteration"),
    "run: loss NaN": put(NAN, "run", "evaluations", 1, "val"),
    "run: evaluation without accuracy": put(DELETED, "run", "evaluations", 1, "accuracy"),
    "run: gates of a layer too few": put(DELETED, "run", "evaluations", 0, "gates", 0),
    "run: gates of a branch too few": put(DELETED, "run", "evaluations", 0, "gates", 0, 0),
    "run: gates are text": put([["a", "b", "c"]] * 2, "run", "evaluations", 0, "gates"),
    "settings: no dim": put(DELETED, "settings", "dim"),
    "settings: dim a tensor": put(torch.ones(2), "settings", "dim"),
    "settings: layers a tensor of many lines": put(torch.ones(20, 20), "settings", "layers"),
    "config: no such field": put(1, "config", "colour"),
    "config: heads": put(0, "config", "heads"),
    "config: text": put("x", "config", "block_size"),
    "vocabulary: other": put(lambda text: text[1:], "vocabulary"),
    "data: other": put("x", "data"),
    "position: short": put(torch.zeros(3, dtype=torch.uint8), "position"),
    "position: of floats": put(lambda x: x.float(), "position"),
    "random: empty": put([], "random"),
    "random: no cpu": put(DELETED, "random", 0, "cpu"),
    "random: short": put(torch.zeros(3, dtype=torch.uint8), "random", 0, "cpu"),
    "random: NaN": put(torch.full((9,), NAN), "random", 0, "cpu"),
    "model: a weight is missing": put(DELETED, *WEIGHT),
    "model: a weight too many": put(torch.ones(3), "model", "norm.colour"),
    "model: shape": put(torch.ones(3), *WEIGHT),
    "model: dtype": put(lambda x: x.long(), *WEIGHT),
    "model: NaN": put(lambda x: x * NAN, *WEIGHT),
    "model: no tensor": put([1.0], *WEIGHT),
    "optimizer: no state": put(DELETED, "optimizer", "state"),
    "optimizer: empty state": put({}, "optimizer", "state"),
    "optimizer: no groups": put(DELETED, "optimizer", "param_groups"),
    "optimizer: groups": put(lambda groups: groups[:1], "optimizer", "param_groups"),
    "optimizer: parameters": put(DELETED, "optimizer", "param_groups", 0, "params", 0),
    "optimizer: no such parameter": put(lambda of: {**of, 999: of[0]}, "optimizer", "state"),
    "optimizer: parameter -1": put(lambda of: {**of, -1: of[0]}, "optimizer", "state"),
    "optimizer: shape": put(torch.ones(3), *MOMENT),
    "optimizer: dtype": put(lambda x: x.double(), *MOMENT),
    "optimizer: NaN": put(lambda x: x * NAN, *MOMENT),
    "optimizer: no moment": put(DELETED, *MOMENT),
    "optimizer: a number": put(1.0, *MOMENT),
    "optimizer: step NaN": put(torch.tensor(NAN), *COUNT),
    "optimizer: step 0": put(torch.tensor(0.0), *COUNT),
    "optimizer: step too large": put(torch.tensor(8.0), *COUNT),
    "optimizer: steps of a matrix": put(torch.ones(2, 2), *COUNT),
}


@pytest.fixture(scope="module")
def whole_state(tmp_path_factory: pytest.TempPathFactory) -> tuple[script.Settings, dict[str, object]]:
    """Of a run that has come to its end."""
    folder = tmp_path_factory.mktemp("whole")
    changes = {"data": write_words(folder / "words.txt"), "out": folder / "out", "log": folder / "log.jsonl"}
    settings = dataclasses.replace(TINY, attention="nsa", dim=16, heads=1, **changes)
    trainer = make_trainer(dataclasses.replace(settings, log=None), "nsa")
    train(trainer)
    return settings, script.read_checkpoint(trainer.last_path)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_checkpoint_with_a_damaged_field_is_turned_down_in_one_line(
    damage: Callable[[dict], None],
    whole_state: tuple[script.Settings, dict[str, object]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings, state = whole_state[0], copy.deepcopy(whole_state[1])
    damage(state)
    path = settings.out / "nsa.last.pt"
    script.save_checkpoint(state, path)
    before = {each: each.read_bytes() for each in settings.out.iterdir()}
    line = complaint(capsys, [*flags(settings), "--resume"])
    assert str(path) in line and len(line) < 1000, line
    assert {each: each.read_bytes() for each in settings.out.iterdir()} == before and not settings.log.exists()


def test_the_undamaged_checkpoint_is_resumed(whole_state: tuple[script.Settings, dict[str, object]]) -> None:
    settings, state = whole_state
    script.save_checkpoint(state, settings.out / "nsa.last.pt")
    make_trainer(settings, "nsa").resume()


class Foreign:
    """What weights_only refuses to load."""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a checkpoint at all", "no whole checkpoint"),
        (pickle.dumps({"model": Foreign()}), "no whole checkpoint"),
        ({"weight": torch.ones(3)}, "no checkpoint of nsa_gpt_training.py"),
        (torch.ones(3), "no checkpoint of nsa_gpt_training.py"),
    ],
    ids=["text", "pickle", "weights", "tensor"],
)
def test_a_foreign_file_is_turned_down(
    content: object, words: str, settings: script.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.out.mkdir()
    for name in ("nsa.pt", "nsa.last.pt"):
        path = settings.out / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert_turned_down(settings, capsys, words, settings.out / "nsa.pt")


def assert_turned_down(
    settings: script.Settings, capsys: pytest.CaptureFixture[str], words: str, model: Path, *changes: str
) -> None:
    """In one line, with exit code 2, and without touching a file."""
    before = {path: path.read_bytes() for path in settings.out.iterdir()}
    for how in (["--resume"], ["--generate", f"--checkpoint={model}"]):
        line = complaint(capsys, [*flags(settings), *how, *changes])
        assert words in line and str(settings.out) in line, line
    assert {path: path.read_bytes() for path in settings.out.iterdir()} == before
    assert not settings.log.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--dim=16"], "dim = 32, not 16"),
        (["--iterations=9"], "iterations = 7, not 9"),
        (["--seed=1"], "seed = 1337, not 1"),
        (["--data=other.txt"], "other data"),
    ],
)
def test_a_checkpoint_of_another_run_is_not_resumed(
    changes: list[str],
    words: str,
    settings: script.Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(settings, "nsa")
    trainer.save(trainer.last_path)
    monkeypatch.chdir(settings.data.parent)
    Path("other.txt").write_text(settings.data.read_text().replace("query", "yreuq"))
    before = trainer.last_path.read_bytes()
    assert words in complaint(capsys, [*flags(settings), "--resume", *changes])
    assert list(settings.out.iterdir()) == [trainer.last_path] and trainer.last_path.read_bytes() == before


def test_a_disk_that_is_full_ends_the_run_in_one_line(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(_: object, file: io.BufferedIOBase) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.torch, "save", save)
    assert "nsa.pt: No space left" in complaint(capsys, flags(settings), exit_code=1)
    assert list(settings.out.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Two runs in one folder
# ---------------------------------------------------------------------------------------------------------------------


def pretend_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fcntl, and an msvcrt that locks the first byte of a file for the one that opened it."""
    owners: dict[int, int] = {}

    def locking(number: int, mode: int, count: int) -> None:
        assert mode == 2 and count == 1 and os.lseek(number, 0, os.SEEK_CUR) == 0
        if owners.setdefault(os.fstat(number).st_ino, number) != number:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))


@pytest.mark.parametrize(("windows", "resume"), [(False, False), (False, True), (True, False)])
def test_a_second_run_in_the_same_folder_is_turned_down(
    windows: bool,
    resume: bool,
    settings: script.Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if windows:
        pretend_windows(monkeypatch)
    settings = dataclasses.replace(settings, iterations=1, first_context=None)
    trainer = make_trainer(settings, "nsa")
    trainer.save(trainer.best_path, trainer.last_path)
    with script.locked(settings.out):
        before = {path: path.read_bytes() for path in settings.out.iterdir()}
        for _ in range(2):
            line = complaint(capsys, flags(dataclasses.replace(settings, resume=resume)))
            assert f"another run is writing to {settings.out}" in line
        assert {path: path.read_bytes() for path in settings.out.iterdir()} == before
    assert not settings.log.exists()
    assert script.main(flags(settings)) == 0
    assert not (settings.out / ".lock").exists()


def test_a_system_without_locks_trains_too(settings: script.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fcntl", "msvcrt"):
        monkeypatch.setitem(sys.modules, name, None)
    assert script.main(flags(dataclasses.replace(settings, iterations=1, first_context=None))) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Log
# ---------------------------------------------------------------------------------------------------------------------


def test_the_log_tells_of_settings_steps_and_evaluations(settings: script.Settings) -> None:
    run = train(make_trainer(settings, "nsa"))
    first, *rest = lines_of(settings.log)
    assert first["settings"] == json.loads(json.dumps(settings.plain()))
    assert first["environment"]["torch"] == torch.__version__ and first["environment"]["device"] == "cpu, float32"
    steps = [line for line in rest if "loss" in line]
    assert [line["loss"] for line in steps] == run.losses
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert run.tokens == 7 * settings.batch_size * settings.context
    assert [line["learning_rate"] for line in steps] == [script.learning_rate(n, settings) for n in range(7)]
    for line in steps:
        assert line["attention"] == "nsa" and line["tokens_per_second"] > 0 and 0 < line["peak_memory_gib"] < 100
        assert 0 < line["gradient_norm"] < 100
    evaluations = [line for line in rest if "val" in line]
    assert [script.Evaluation(**{k: v for k, v in line.items() if k != "attention"}) for line in evaluations] == (
        run.evaluations
    )
    gates = torch.tensor(run.evaluations[0].gates)
    assert gates.shape == (2, 3)
    torch.testing.assert_close(gates, torch.tensor(settings.gate_init).sigmoid().expand(2, 3))


def test_the_gradient_norm_is_that_before_clipping(settings: script.Settings) -> None:
    settings = dataclasses.replace(settings, grad_clip=1e-3, iterations=1, dropout=0.0, value_dropout=0.0)
    assert settings.batch_shape(0) == (16, 8)
    trainer = make_trainer(settings, "nsa")
    batch = trainer.data.draw("train", 16, 8, torch.Generator().manual_seed(settings.seed))
    trainer.model(*batch)[1].backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]).norm().item()
    trainer.optimizer.zero_grad()
    train(trainer)
    assert lines_of(settings.log)[2]["gradient_norm"] == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_goes_on_in_the_same_log(settings: script.Settings) -> None:
    train(make_trainer(settings, "nsa"))
    before = settings.log.read_text()
    resumed = dataclasses.replace(settings, resume=True)
    train(make_trainer(resumed, "nsa"))
    assert settings.log.read_text().startswith(before)
    assert lines_of(settings.log)[len(before.splitlines())]["settings"]["resume"] is True


def test_tensorboard_gets_the_same_numbers_if_it_is_there(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(settings, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import of it fails
    train(make_trainer(settings, "nsa"))
    assert "TensorBoard: skipped" in capsys.readouterr().out

    class Writer:
        scalars: dict[tuple[str, int], float] = {}

        def __init__(self, folder: Path) -> None:
            assert folder.parent == settings.out

        def add_scalar(self, name: str, value: float, iteration: int) -> None:
            self.scalars[name, iteration] = value

        def close(self) -> None:
            self.scalars["closed", 0] = 1.0

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    run = train(make_trainer(settings, "nsa"))
    assert [Writer.scalars["nsa/loss", n + 1] for n in range(7)] == run.losses
    assert Writer.scalars["nsa/val", 7] == run.evaluations[-1].val and ("closed", 0) in Writer.scalars


# ---------------------------------------------------------------------------------------------------------------------
# Many processes. One start of them does several runs one after the other, and they are forks of one process that has
# imported all: starting is what takes time.
# ---------------------------------------------------------------------------------------------------------------------


def many(processes: int, *arguments: str) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launch, "--", *arguments]


def do_runs(runs: dict[int, list[script.Settings]], folder: Path) -> str:
    """Each of the runs, on as many processes as its key says. Returns what all of them print."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps([(world, [flags(settings) for settings in each]) for world, each in runs.items()]))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(listed)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fork_for_each(listed: Path) -> None:
    """Fails if one of the processes does; the others are ended then, as they would wait for it."""
    for world, runs in json.loads(listed.read_text()):
        arguments = (world, runs, str(listed.with_suffix(f".store{world}")))
        torch.multiprocessing.start_processes(drive, arguments, nprocs=world, start_method="fork")


def drive(rank: int, world: int, runs: list[list[str]], store_path: str) -> None:
    """What each of the processes does. Runs into a folder named "stopped" are: one process alone gets Ctrl-C."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    join, store = script.dist.init_process_group, script.dist.FileStore(store_path, world)
    for number, arguments in enumerate(runs):
        settings = script.parse_settings(arguments)
        to_be_stopped = settings.out.name.startswith("stopped") and not settings.resume
        own = {"store": script.dist.PrefixStore(f"run {number}", store), "rank": rank, "world_size": world}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "IS_MAIN", rank == 0)  # what it found when it was imported
            patch.setattr(script.dist, "init_process_group", functools.partial(join, **own))
            if to_be_stopped and rank == 1:
                interrupt_at(patch, 5, ctrl_c)
            assert script.main(arguments) == (130 if to_be_stopped else 0)


@pytest.mark.slow
def test_the_losses_are_the_same_on_any_number_of_processes(settings: script.Settings, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, sample_length=1)
    quiet = dataclasses.replace(settings, dropout=0.0, value_dropout=0.0, batch_size=8, log=None)
    whole = train(make_trainer(quiet, "nsa"))

    def named(name: str, base: script.Settings, **changes: object) -> script.Settings:
        return dataclasses.replace(base, out=tmp_path / name, **changes)

    noisy, stopped = (
        [named(f"{name} {fsdp}", settings, fsdp=fsdp, log=None) for fsdp in (False, True)]
        for name in ("noisy", "stopped")
    )
    on_two = [named("two", quiet, accumulate=2), named("two shards", quiet, fsdp=True, accumulate=2)]
    on_two += [*noisy, *stopped, *(dataclasses.replace(each, resume=True) for each in stopped)]
    on_four = [named("four", quiet), named("four shards", quiet, fsdp=True)]
    shown = do_runs({2: on_two, 4: on_four}, tmp_path)
    assert shown.count("validation loss, best") == len(on_two) + len(on_four) - len(stopped), "one process prints"

    for name in ("two", "two shards", "four", "four shards"):
        run = script.Run.of(script.read_checkpoint(tmp_path / name / "nsa.last.pt")["run"])
        assert run.losses == pytest.approx(whole.losses, rel=1e-4), name
        for got, expected in zip(run.evaluations, whole.evaluations, strict=True):
            assert (got.train, got.val) == pytest.approx((expected.train, expected.val), rel=1e-4), name
            assert torch.tensor(got.gates).sub(torch.tensor(expected.gates)).abs().max() < 1e-4, name

    for fsdp in (False, True):
        never, again = (
            script.read_checkpoint(tmp_path / f"{name} {fsdp}" / "nsa.last.pt") for name in ("noisy", "stopped")
        )
        for each in (never, again):
            each["run"]["seconds"] = each["settings"] = None
        assert len(never["random"]) == 2 and not torch.equal(*(each["cpu"] for each in never["random"]))
        assert_equal(again, never)
    model, _ = script.load_checkpoint(tmp_path / "stopped True" / "nsa.pt")
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters()), "shards in a checkpoint"


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_leaves_a_whole_checkpoint(settings: script.Settings) -> None:
    endless = flags(dataclasses.replace(settings, iterations=10**6, eval_interval=2))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        many(2, str(ROOT / "nsa_gpt_training.py"), *endless),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "4/1000000" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    lines = [line for line in errors.splitlines() if line.startswith("nsa_gpt_training.py: ")]
    assert len(lines) == 1 and "interrupted after iteration" in lines[0], errors
    _, kept = script.load_checkpoint(settings.out / "nsa.last.pt")
    assert f"iteration {len(kept['run']['losses'])} " in lines[0]
    assert list(settings.out.glob("*.tmp")) == []


@pytest.mark.slow
def test_ctrl_c_in_a_single_process(settings: script.Settings) -> None:
    endless = flags(dataclasses.replace(settings, iterations=10**6, eval_interval=2))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "nsa_gpt_training.py"), *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "4/1000000" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert len(errors.splitlines()) == 1 and "interrupted after iteration" in errors, errors
    _, kept = script.load_checkpoint(settings.out / "nsa.last.pt")
    assert f"iteration {len(kept['run']['losses'])} " in errors


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_checkpoint_and_no_lock(
    settings: script.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = flags(dataclasses.replace(settings, iterations=10**6, eval_interval=1))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "nsa_gpt_training.py"), *endless], stdout=subprocess.PIPE, text=True
    )
    try:
        while "2/1000000" not in process.stdout.readline():
            assert process.poll() is None
        deadline = time.monotonic() + 30
        assert "another run" in complaint(capsys, flags(settings))
        while not list(settings.out.glob("nsa.last.pt.*.tmp")) and time.monotonic() < deadline:
            pass
    finally:
        process.kill()
        process.communicate()
    assert len(script.read_checkpoint(settings.out / "nsa.last.pt")["run"]["losses"]) >= 1
    with script.locked(settings.out):
        pass


if __name__ == "__main__":
    fork_for_each(Path(sys.argv[1]))
