"""Training that is stopped, resumed, logged, and shared by processes: the same losses whatever happens on the way."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import types
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


@pytest.mark.parametrize("attention", script.ATTENTIONS)
@pytest.mark.parametrize(("how", "step"), [(ctrl_c, 1), (ctrl_c, 5), (terminate, 6), (kill, 5), (kill, 7)])
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
    (resumed,) = script.make_trainers(
        {attention: script.build_model(whole.data, attention, settings)},
        *(whole.data, whole.batches, dataclasses.replace(settings, resume=True), whole.runtime),
    )
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
    def save(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.torch, "save", save)
    assert "No space left" in complaint(capsys, flags(settings), exit_code=1)
    assert list(settings.out.iterdir()) == []


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
        assert run.losses == pytest.approx(whole.losses, rel=2e-6), name
        for got, expected in zip(run.evaluations, whole.evaluations, strict=True):
            assert (got.train, got.val) == pytest.approx((expected.train, expected.val), rel=2e-6), name
            assert torch.tensor(got.gates).sub(torch.tensor(expected.gates)).abs().max() < 1e-5, name

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


def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_checkpoint(settings: script.Settings) -> None:
    endless = flags(dataclasses.replace(settings, iterations=10**6, eval_interval=1))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "nsa_gpt_training.py"), *endless], stdout=subprocess.PIPE, text=True
    )
    try:
        while "2/1000000" not in process.stdout.readline():
            assert process.poll() is None
        deadline = time.monotonic() + 30
        while not list(settings.out.glob("nsa.last.pt.*.tmp")) and time.monotonic() < deadline:
            pass
    finally:
        process.kill()
        process.communicate()
    assert len(script.read_checkpoint(settings.out / "nsa.last.pt")["run"]["losses"]) >= 1


if __name__ == "__main__":
    fork_for_each(Path(sys.argv[1]))
