"""Training that is stopped, resumed, extended, logged, and shared by processes: the same losses whatever happens."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import TINY, complaint, flags, make_trainer, train, write_words

import nsa_gpt_training as script

SCRIPT = Path(script.__file__).resolve()
NOISY = {"dropout": 0.3, "value_dropout": 0.2}  # so that random numbers matter


@pytest.fixture
def settings(tmp_path: Path) -> script.Settings:
    """A run with dropout, and an evaluation every third of seven iterations."""
    return dataclasses.replace(TINY, data=write_words(tmp_path / "words.txt"), out=tmp_path / "out", **NOISY)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here waits for matplotlib to draw."""
    monkeypatch.setattr(script, "draw_pictures", lambda *_: None)


def results(run: script.Run | dict) -> dict:
    """Results of a run without its timing."""
    return {**(run if isinstance(run, dict) else vars(run)), "seconds": None}


def state_of(path: Path) -> dict:
    state = script.read_checkpoint(path)
    return {**state, "run": results(state["run"])}


def assert_equal(got: object, expected: object) -> None:
    """Compare nested state bit by bit; a pair may come back as a list."""
    assert type(got) is type(expected) or {type(got), type(expected)} == {list, tuple}
    if isinstance(got, dict):
        assert got.keys() == expected.keys()
    if isinstance(got, dict | list | tuple):
        for pair in zip(*(x.values() if isinstance(x, dict) else x for x in (got, expected)), strict=True):
            assert_equal(*pair)
    elif isinstance(got, torch.Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir()}


# ── Stop, resume, extend ──────────────────────────────────────────────────────────────────────────────────────────────
class Killed(BaseException):
    """End of a process before anything can clean up."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], object]) -> None:
    """Let `how` happen in that training step, counted from 1."""
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
    ("attention", "how", "step"), [("nsa", ctrl_c, 1), ("dense", ctrl_c, 5), ("nsa", terminate, 6), ("nsa", kill, 5)]
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    attention: str, how: Callable, step: int, settings: script.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer(settings, attention)
    assert train(whole)
    settings = dataclasses.replace(settings, out=settings.out.with_name("stopped"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, how)
        if how is kill:
            with pytest.raises(Killed):
                train(make_trainer(settings, attention))
        else:
            assert not train(make_trainer(settings, attention)), "it went on to the end"
    resumed = make_trainer(dataclasses.replace(settings, resume=True), attention)
    assert resumed.run.iteration == (3 * ((step - 1) // 3) if how is kill else step)
    assert train(resumed)
    assert results(resumed.run) == results(whole.run) and len(whole.run.losses) == 7
    for path in (whole.best_path, whole.last_path):
        assert_equal(state_of(settings.out / path.name), state_of(path))


def test_a_finished_run_is_extended_and_resumes_to_its_own_report(
    settings: script.Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    assert script.main(flags(settings)) == 0
    first, again = capfd.readouterr().out, dataclasses.replace(settings, resume=True)
    assert script.main(flags(again)) == 0
    assert capfd.readouterr().out.splitlines()[-9:] == first.splitlines()[-9:], "the same table"
    losses = script.read_checkpoint(settings.out / "nsa.last.pt")["run"]["losses"]
    assert script.main(flags(dataclasses.replace(again, iterations=9))) == 0
    run = script.read_checkpoint(settings.out / "nsa.last.pt")["run"]
    assert run["losses"][:7] == losses and len(run["losses"]) == run["iteration"] == 9
    assert [each["iteration"] for each in run["evaluations"]] == [3, 6, 7, 9]
    line = complaint(capfd, flags(dataclasses.replace(again, iterations=8)))
    assert "iterations = 8" in line and "iteration 9" in line


def test_of_two_models_each_goes_on_where_it_was(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(settings, attention="both")
    assert script.main(flags(settings)) == 0
    stopped = dataclasses.replace(settings, out=settings.out.with_name("stopped"))
    capfd.readouterr()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7 + 2, ctrl_c)
        assert script.main(flags(stopped)) == 130
    at_once, last = [line for line in capfd.readouterr().err.splitlines() if line]
    assert "stopping after this step" in at_once and "after iteration 2 of dense; --resume" in last
    assert script.main([*flags(stopped), "--resume"]) == 0
    for name in ("nsa", "dense"):
        assert_equal(state_of(stopped.out / f"{name}.last.pt"), state_of(settings.out / f"{name}.last.pt"))


def test_a_second_ctrl_c_ends_it_at_once(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)  # a process in the background of a shell ignores Ctrl-C
    interrupt_at(monkeypatch, 5, lambda: (ctrl_c(), ctrl_c()))
    assert script.main(flags(settings)) == 130
    assert capfd.readouterr().err.splitlines()[-1].endswith("interrupted")
    assert script.read_checkpoint(settings.out / "nsa.last.pt")["run"]["iteration"] == 3
    assert signal.getsignal(signal.SIGINT) is before, "handlers are as they were"


def test_a_long_run_on_a_cpu_says_early_how_long_it_will_take(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10**6, 30))  # half a minute from one look to the next
    monkeypatch.setattr(script.time, "perf_counter", lambda: float(next(clock)))
    settings = dataclasses.replace(settings, iterations=1001, eval_interval=1000)
    interrupt_at(monkeypatch, 2, ctrl_c)
    assert script.main(flags(settings)) == 130
    hours = 1000 * 30 / 3600 * (1 + 2 / 3 * settings.eval_batches / 1000)
    assert f"about {hours:.0f} hours to go on this CPU" in capfd.readouterr().out


def test_a_quick_run_says_nothing_of_how_long_it_will_take(
    settings: script.Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    assert script.main(flags(dataclasses.replace(settings, iterations=2))) == 0
    assert "minutes" not in capfd.readouterr().out


# ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_a_checkpoint_gives_the_same_logits(attention: str, settings: script.Settings) -> None:
    trainer = make_trainer(dataclasses.replace(settings, kv_heads=1, stride=4, iterations=1), attention)
    assert train(trainer)
    loaded, vocabulary = script.load_model(trainer.best_path)
    tokens = trainer.text.val[None, :32]
    assert torch.equal(loaded(tokens)[0], trainer.model.eval()(tokens)[0])
    assert loaded.attention == attention and loaded.cfg == trainer.model.cfg and not loaded.training
    assert vocabulary == trainer.text.vocabulary


def test_the_best_model_is_kept_beside_the_last(settings: script.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values, real = iter([2.0, 1.5, 1.7, 1.5, 1.6]), script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda *arguments: {**real(*arguments), "val": next(values)})
    trainer = make_trainer(dataclasses.replace(settings, iterations=5, eval_interval=1))
    assert train(trainer)
    kept, last = (script.Run(**script.read_checkpoint(path)["run"]) for path in (trainer.best_path, trainer.last_path))
    assert kept.iteration == kept.best["iteration"] == last.best["iteration"] == 2 and last.iteration == 5


def test_a_run_that_would_overwrite_another_is_refused_without_overwrite(
    settings: script.Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    assert script.main(flags(settings)) == 0
    capfd.readouterr()
    before, other = bytes_of(settings.out), dataclasses.replace(settings, seed=1)
    line = complaint(capfd, flags(other))
    assert "--overwrite" in line and "--resume" in line and bytes_of(settings.out) == before
    assert script.main(flags(dataclasses.replace(other, attention="dense"))) == 0, "its files have other names"
    assert {path: content for path, content in bytes_of(settings.out).items() if path in before} == before
    assert script.main(flags(dataclasses.replace(other, overwrite=True))) == 0
    assert script.read_checkpoint(settings.out / "nsa.pt")["settings"]["seed"] == 1


def test_a_run_that_is_still_going_on_is_not_overwritten(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    refused = []
    interrupt_at(monkeypatch, 1, lambda: refused.append(script.main(flags(settings))))
    assert script.main(flags(settings)) == 0
    assert refused == [2] and "nsa.jsonl exists" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"dim": 16}, "dim = 32, not 16"), ({"seed": 1}, "seed = 1337, not 1"), ({"data": "other.txt"}, "another text")],
)
def test_a_checkpoint_of_another_run_is_not_resumed(
    changes: dict[str, object], words: str, settings: script.Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(make_trainer(settings))
    if "data" in changes:
        changes = {"data": settings.data.with_name("other.txt")}
        changes["data"].write_text(settings.data.read_text().replace("query", "yreuq"))
    before = bytes_of(settings.out)
    assert words in complaint(capfd, flags(dataclasses.replace(settings, resume=True, **changes)))
    assert bytes_of(settings.out) == before


class Intruder:
    """Object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def damaged(kind: str, whole: Path, marker: Path) -> bytes:
    """Content of a file that is no checkpoint, or none any more."""
    content = bytearray(whole.read_bytes())
    if kind == "empty":
        return b""
    if kind == "truncated":
        return bytes(content[: len(content) // 2])
    if kind == "last byte gone":
        return bytes(content[:-1])
    if kind == "flipped bit":  # in the middle of a weight
        weight = script.read_checkpoint(whole)["model"]["token_embedding.weight"].numpy().tobytes()
        content[content.index(weight) + len(weight) // 2] ^= 1
        return bytes(content)
    if kind == "pickle":
        return pickle.dumps({"model": Intruder(marker)})
    other = {"code": {**script.read_checkpoint(whole), "extra": Intruder(marker)}, "weights": {"weight": torch.ones(3)}}
    torch.save(other[kind], marker.with_name("other.pt"))
    return marker.with_name("other.pt").read_bytes()


KINDS = ("empty", "truncated", "last byte gone", "flipped bit", "pickle", "code", "weights")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_line_and_its_code_not_run(
    kind: str, settings: script.Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer, marker = make_trainer(dataclasses.replace(settings, iterations=1)), tmp_path / "code was run"
    assert train(trainer)
    content = damaged(kind, trainer.last_path, marker)
    for path in (trainer.best_path, trainer.last_path):
        path.write_bytes(content)
    before = bytes_of(settings.out)
    for how, path in (("--resume", trainer.last_path), ("--generate", trainer.best_path)):
        assert f"cannot read the checkpoint {path}" in complaint(capfd, [*flags(settings), how])
    assert bytes_of(settings.out) == before and not marker.exists()


def test_a_disk_that_is_full_ends_the_run_in_one_line_and_leaves_the_old_file(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(make_trainer(settings))
    before = {path: content for path, content in bytes_of(settings.out).items() if path.suffix == ".pt"}

    def save(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.torch, "save", save)
    longer = dataclasses.replace(settings, resume=True, iterations=9)
    assert "pt: No space left" in complaint(capfd, flags(longer), exit_code=1)
    assert {path: content for path, content in bytes_of(settings.out).items() if path.suffix != ".jsonl"} == before


# ── Log ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_log_tells_of_settings_steps_and_evaluations_and_goes_on_when_resumed(settings: script.Settings) -> None:
    trainer = make_trainer(settings)
    assert train(trainer)
    log = settings.out / "nsa.jsonl"
    first, *rest = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    assert first["settings"]["dim"] == 32 and first["environment"]["torch"] == torch.__version__
    steps, run = [line for line in rest if "loss" in line], trainer.run
    assert [line["loss"] for line in steps] == run.losses
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["learning_rate"] for line in steps] == [script.learning_rate(n, settings) for n in range(7)]
    assert all(line["tokens_per_second"] > 0 and 0 < line["gradient_norm"] < 100 for line in steps)
    assert [line for line in rest if "val" in line] == run.evaluations
    before = log.read_text()
    assert train(make_trainer(dataclasses.replace(settings, resume=True, iterations=8)))
    assert log.read_text().startswith(before)
    assert json.loads(log.read_text()[len(before) :].splitlines()[0])["settings"]["resume"] is True


# ── Learning ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_the_loss_falls(attention: str, settings: script.Settings) -> None:
    """Check a margin of 0.3; both end 0.6 below what the frequencies of characters alone allow."""
    changes = {"iterations": 60, "batch_size": 8, "warmup": 10, "eval_interval": 30, "dropout": 0, "value_dropout": 0}
    trainer = make_trainer(dataclasses.replace(settings, **changes), attention)
    assert train(trainer)
    p = trainer.text.train.bincount() / len(trainer.text.train)
    assert trainer.run.losses[0] == pytest.approx(math.log(len(trainer.text.vocabulary)), abs=0.15)
    assert trainer.run.best["val"] < -torch.special.xlogy(p, p).sum().item() - 0.3


def test_parts_of_a_batch_add_up(settings: script.Settings) -> None:
    runs = []
    for parts in (1, 4):
        quiet = {"dropout": 0.0, "value_dropout": 0.0, "accumulate": parts}
        trainer = make_trainer(dataclasses.replace(settings, out=settings.out.with_name(f"{parts}"), **quiet))
        assert train(trainer)
        runs.append(trainer.run.losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


# ── Many processes ────────────────────────────────────────────────────────────────────────────────────────────────────
# One start of them does several runs one after the other, and they are forks of one process that has imported all:
# starting is what takes time.
def do_runs(runs: dict[int, list[script.Settings]], folder: Path) -> str:
    """Do each of the runs on as many processes as its key says; returns what all of them print."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps([(world, [flags(settings) for settings in each]) for world, each in runs.items()]))
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPT.parent}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, __file__, str(listed)]
    done = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fork_for_each(listed: Path) -> None:
    """Fail if one of the processes does; the others are ended then, as they would wait for it."""
    for world, runs in json.loads(listed.read_text()):
        arguments = (world, runs, str(listed.with_suffix(f".store{world}")))
        torch.multiprocessing.start_processes(drive, arguments, nprocs=world, start_method="fork")


def drive(rank: int, world: int, runs: list[list[str]], store_path: str) -> None:
    """Do the runs as one of the processes. In a run into a folder named "stopped", one process alone gets Ctrl-C."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    join, store = script.dist.init_process_group, script.dist.FileStore(store_path, world)
    for number, arguments in enumerate(runs):
        settings = script.parse_settings(arguments)
        to_be_stopped = settings.out.name.startswith("stopped") and not settings.resume
        own = {"store": script.dist.PrefixStore(f"run {number}", store), "rank": rank, "world_size": world}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "draw_pictures", lambda *_: None)
            patch.setattr(script.dist, "init_process_group", functools.partial(join, **own))
            if to_be_stopped and rank == 1:
                interrupt_at(patch, 5, ctrl_c)
            assert script.main(arguments) == (130 if to_be_stopped else 0)


@pytest.mark.slow
def test_the_losses_are_the_same_on_any_number_of_processes(settings: script.Settings, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, sample_length=1)
    quiet = dataclasses.replace(settings, dropout=0.0, value_dropout=0.0, batch_size=8)
    whole = make_trainer(quiet)
    assert train(whole)

    def named(name: str, base: script.Settings, **changes: object) -> script.Settings:
        return dataclasses.replace(base, out=tmp_path / name, **changes)

    noisy, stopped = (
        [named(f"{name} {fsdp}", settings, fsdp=fsdp) for fsdp in (False, True)] for name in ("noisy", "stopped")
    )
    on_two = [named("two", quiet, accumulate=2), named("two shards", quiet, fsdp=True, accumulate=2)]
    on_two += [*noisy, *stopped, *(dataclasses.replace(each, resume=True) for each in stopped)]
    longer = {"resume": True, "iterations": 9}  # of what two processes began
    on_four = [named("four", quiet), named("four shards", quiet, fsdp=True), named("two", quiet, **longer)]
    on_two += [named("two parts", quiet, context_parallel=2)]
    on_four += [named(f"two by two {fsdp}", quiet, context_parallel=2, fsdp=fsdp) for fsdp in (False, True)]
    shown = do_runs({2: on_two, 4: on_four}, tmp_path)
    assert shown.count("validation loss, best") == len(on_two) + len(on_four) - len(stopped), "one process prints"

    parts = ("two parts", "two by two False", "two by two True")
    for name in ("two", "two shards", "four", "four shards", *parts):
        run = script.read_checkpoint(tmp_path / name / "nsa.last.pt")["run"]
        assert len(run["losses"]) == (9 if name == "two" else 7)
        assert run["losses"][:7] == pytest.approx(whole.run.losses, rel=1e-4), name
        for got, expected in zip(run["evaluations"][:3], whole.run.evaluations, strict=True):
            assert (got["train"], got["val"]) == pytest.approx((expected["train"], expected["val"]), rel=1e-4), name
            assert torch.tensor(got["gates"]).sub(torch.tensor(expected["gates"])).abs().max() < 1e-4, name
    for fsdp in (False, True):  # to the bit
        assert_equal(*(state_of(tmp_path / f"{name} {fsdp}" / "nsa.last.pt") for name in ("stopped", "noisy")))
    model, _ = script.load_model(tmp_path / "stopped True" / "nsa.pt")
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters()), "shards in a checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_all_processes_and_leaves_a_whole_checkpoint(processes: int, settings: script.Settings) -> None:
    endless = flags(dataclasses.replace(settings, iterations=10**6, eval_interval=2))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--"]
    command = [sys.executable, *(launch if processes > 1 else []), str(SCRIPT), *endless]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    try:
        while "4/1000000" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    lines = [line for line in errors.splitlines() if line.startswith("nsa_gpt_training.py: ")]
    assert process.returncode != 0 and errors.count("stopping after this step") == 1
    assert len(lines) == 1 and "stopped after iteration" in lines[0], errors
    kept = script.read_checkpoint(settings.out / "nsa.last.pt")["run"]
    assert f"iteration {kept['iteration']} " in lines[0] and list(settings.out.glob("*.tmp")) == []


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_checkpoint(settings: script.Settings) -> None:
    endless = flags(dataclasses.replace(settings, iterations=10**6, eval_interval=1))
    process = subprocess.Popen([sys.executable, str(SCRIPT), *endless], stdout=subprocess.PIPE, text=True)
    try:
        while "2/1000000" not in process.stdout.readline():
            assert process.poll() is None
        while not (settings.out / "nsa.last.tmp").exists():
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert script.read_checkpoint(settings.out / "nsa.last.pt")["run"]["iteration"] >= 1
    assert script.main(["--generate", "--out", str(settings.out)]) == 0


if __name__ == "__main__":
    fork_for_each(Path(sys.argv[1]))
