"""tests/benchmarks: the drawings show what they are given, and what `gpu.py` measures can be read."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import Random
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


def load(name: str) -> ModuleType:
    """The script of that name, as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    pytest.importorskip("matplotlib")
    return load("draw")


def made_up(heads: int, rows: list[dict[str, float]]) -> dict[str, object]:
    setting = dict(block_size=32, stride=16, select_block_size=64, topk_blocks=16, local_window=512)
    return dict(heads=heads, kv_heads=4, dim_head=128, setting=setting, rows=rows)


RESULTS = dict(
    command="none", date="1970-01-01", card="made up", torch="1", triton="2", measured="nothing",
    curves=[
        made_up(64, [dict(tokens=1024, nsa=2.0, dense=1.0), dict(tokens=2048, nsa=3.0, dense=6.0)]),
        made_up(16, [dict(tokens=512, nsa=1.5, dense=3.0), dict(tokens=1024, nsa=2.5)]),
    ],
)  # fmt: skip


def test_the_plot_of_speed_has_the_figures_of_its_file(draw: ModuleType) -> None:
    panels = draw.speed(RESULTS).axes
    curves = [[(line.get_label(), *map(list, line.get_data())) for line in panel.lines[:2]] for panel in panels]
    assert [[(list(x), list(y)) for _, x, y in panel] for panel in curves] == [
        [([1024, 2048], [1.0, 6.0]), ([1024, 2048], [2.0, 3.0])],
        [([512], [3.0]), ([512, 1024], [1.5, 2.5])],
    ]
    words = [{text.get_text() for text in panel.texts} for panel in panels]
    assert {"dense", "NSA", "2.0×"} <= words[0], "the ratio stands where both are known last"
    assert {"dense", "NSA", "2.0×"} <= words[1]
    assert [tick.get_text() for tick in panels[1].get_xticklabels()] == ["512", "1k"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_drawings_are_written(draw: ModuleType, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(RESULTS), encoding="utf-8")
    starts = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    for arguments in (["branches"], ["speed", str(file)]):
        picture = tmp_path / f"picture.{suffix}"
        draw.main([*arguments, "--out", str(picture)])
        assert picture.read_bytes().startswith(starts) and picture.stat().st_size > 10_000
        picture.unlink()


def test_the_drawing_of_branches_follows_the_rules(draw: ModuleType) -> None:
    own, best = draw.QUERY // draw.BLOCK, sorted(range(len(draw.WEIGHTS)), key=draw.WEIGHTS.__getitem__)[-2:]
    assert sorted(draw.CHOSEN) == sorted([*best, own])
    assert len(draw.WEIGHTS) == (draw.QUERY + 1) // draw.BLOCK, "one for each block whose last token the query sees"
    assert sum(draw.WEIGHTS) == pytest.approx(1)


# Times over length ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """gpu.py with two short lengths and one small shape."""
    module = load("gpu")
    if module.nsa.triton is None:
        pytest.skip("gpu.py needs Triton")
    monkeypatch.setattr(module, "LENGTHS", [256, 512])
    monkeypatch.setattr(module, "CURVES", [(4, 2, 32)])
    return module


def measured(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, file: Path) -> dict:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "lengths", "--json", str(file)])
    gpu.main()
    return json.loads(file.read_text(encoding="utf-8"))


def dense_up_to_256_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.shape[1] > 256:
        raise torch.OutOfMemoryError("made up")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def on_a_cpu(heads: int, kv_heads: int, dim: int, tokens: int, setting: dict[str, int]) -> list[Tensor]:
    """`leaves_of` on a CPU."""
    blocks = (tokens - setting["block_size"]) // setting["stride"] + 1
    shapes = [(tokens, heads, dim), *[(tokens, kv_heads, dim)] * 2, *[(blocks, kv_heads, dim)] * 2, (tokens, heads, 3)]
    return [torch.rand(1, *shape, requires_grad=True) for shape in shapes]


def test_lengths_leaves_out_what_ran_out_of_memory(
    gpu: ModuleType, draw: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "leaves_of", on_a_cpu)
    monkeypatch.setattr(gpu, "dense", dense_up_to_256_tokens)
    for name, value in (("synchronize", None), ("empty_cache", None), ("get_device_name", "a CPU")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    results = measured(gpu, monkeypatch, tmp_path / "speed.json")
    assert results["card"] == "a CPU" and results["command"].startswith("python gpu.py lengths --json ")
    [curve] = results["curves"]
    assert [row.keys() for row in curve["rows"]] == [{"tokens", "nsa", "dense"}, {"tokens", "nsa"}]
    assert min(row["nsa"] for row in curve["rows"]) > 0
    assert curve["setting"] == gpu.PAPER
    assert len(draw.speed(results).axes) == 1


@pytest.mark.gpu
def test_lengths_on_a_gpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    [curve] = measured(gpu, monkeypatch, tmp_path / "speed.json")["curves"]
    assert [row["tokens"] for row in curve["rows"]] == [256, 512]
    assert all(row["nsa"] > 0 and row["dense"] > 0 for row in curve["rows"])


# Blocks, steps and prompts: small ones on a CPU, where a graph is its calls and nothing is compiled -------------------


class NoGraph:
    """`Captured`, without a graph."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self.calls = calls
        self.replay()

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def gpu_on_a_cpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    once = lambda runs, wall=gpu.wall, **_: wall(runs, 1)  # noqa: E731
    fakes = {"DEVICE": "cpu", "DTYPE": torch.float32, "Captured": NoGraph, "leaves_of": on_a_cpu, "wall": once}
    for name, value in fakes.items():
        monkeypatch.setattr(gpu, name, value)
    for name, value in (("synchronize", None), ("get_device_name", "a CPU")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    return gpu


def shown(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *args])
    gpu.main()
    return capsys.readouterr().out


def test_block_stands_beside_a_dense_one_and_its_goal(
    gpu_on_a_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_on_a_cpu, "BLOCKS", [256])
    rows = shown(gpu_on_a_cpu, monkeypatch, capsys, "block", "--tokens", "256")
    cell = r"\d+\.\d\d / \d+\.\d\d = \d+\.\d\d"
    assert re.search(rf"\| 0k \| {cell} \(1.6\) \| {cell} \(1.3\) \| {cell} \| {cell} \(1.0\) \|\n", rows), rows
    assert re.search(r"8 heads of 64, both passes: \d+\.\d\d ms \(goal 0.9\)", rows)


def test_packed_lengths_are_new_in_each_step(gpu_on_a_cpu: ModuleType) -> None:
    steps = gpu_on_a_cpu.new_lengths(100, 8, steps=5)
    assert len({tuple(each.tolist()) for each in steps}) == 5
    for each in steps:
        assert (
            each.dtype == torch.int32 and len(each) == 9 and (each[0], each[-1]) == (0, 100) and each.diff().min() > 0
        )
    assert re.fullmatch(
        r"\| eager \|( \d+\.\d\d \|){2} \d+\.\d\d \(1.05\) \| 0 \|", gpu_on_a_cpu.packed_block("eager", 256)
    )


def test_step_has_a_row_for_each_stack(
    gpu_on_a_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_on_a_cpu, "STACKS", {(2, 1024): 0.5})
    gpu_on_a_cpu.stacks(depth=2)
    assert re.search(r"\| 2 \| 1k \|( \d+\.\d\d \|){3} ", capsys.readouterr().out.replace(" (0.5)", ""))


def test_a_dense_step_is_the_last_row_of_dense_attention(gpu_on_a_cpu: ModuleType, random: Random) -> None:
    cfg = gpu_on_a_cpu.nsa.NSAConfig(dim=32, heads=2)
    block, x = gpu_on_a_cpu.DenseCachedBlock(cfg, batch=2, tokens=9), random((2, 9, 32), torch.float32)
    projected = (
        (to(block.norm1(x))).unflatten(-1, (2, 16)).transpose(1, 2) for to in (block.attn.to_k, block.attn.to_v)
    )
    block.k, block.v = (y.detach()[:, :, [*range(8), 0]] for y in projected)  # the last one is to be written
    with torch.no_grad():
        torch.testing.assert_close(block(x[:, -1:]), gpu_on_a_cpu.DenseBlock.forward(block, x)[:, -1:])


def test_pieces_are_compared_with_the_whole(
    gpu_on_a_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_on_a_cpu, "PIECES", {64: 1.15, 50: 1.4})
    gpu_on_a_cpu.prompts(tokens=128)
    rows = capsys.readouterr().out
    for piece, goal in ((64, 1.15), (50, 1.4)):
        assert re.search(rf"\| {piece} \| \d+\.\d\d \| \d+\.\d\d \({goal}\) \|\n", rows), rows


# Long sequences ------------------------------------------------------------------------------------------------------


def test_a_loss_in_chunks_is_the_loss(random: Random) -> None:
    train = load("train")
    cfg = train.script.NSAConfig(dim=16, heads=2, seq_len=64, rope_theta=1e4)
    model = train.script.NSALanguageModel(11, cfg, layers=1).double()
    tokens, targets, results = *torch.randint(11, (2, 2, 50), generator=random.generator), []
    for wrap in (lambda net: net, lambda net: train.ChunkedLoss(net, 32)):
        net = wrap(model)
        net.zero_grad()
        loss = net(tokens, targets)[1]
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in net.parameters())])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # float32 logits


@pytest.mark.slow
def test_longest_ends_where_a_rank_alone_runs_out_of_memory() -> None:
    small = "--device cpu --dim 16 --heads 2 --kv-heads 1 --first 1 --step 256 --limit 256".split()
    command = [sys.executable, str(BENCHMARKS / "context.py"), "--longest", "2", *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert re.search(r"\n\| 2 \| 512 \| \d+\.\d \| 0\.0 \| 768: out of memory \|\n$", done.stdout), done.stderr


# Synthetic tasks: what is asked for follows from what the sequence says, once and before it ---------------------------

sys.path.append(str(BENCHMARKS))
import learn  # noqa: E402
import recall  # noqa: E402
import runs  # noqa: E402


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [32, 48, 1024])
def test_recall_asks_for_each_value_where_its_key_returns(length: int) -> None:
    pairs = min(32, length // 8)
    for tokens, targets, asked in zip(*recall.recall_batch(32, 20, length, generator()), strict=True):
        places = tokens[: length // 2].lt(32).nonzero().flatten()
        values = dict(zip(tokens[places].tolist(), tokens[places + 1].tolist(), strict=True))
        assert len(values) == pairs == len(places)
        assert sorted(tokens[asked].tolist()) == sorted(values)
        assert [values[key] for key in tokens[asked].tolist()] == targets.tolist() == tokens[asked + 1].tolist()
        assert asked.tolist() == list(range(length - 2 * pairs, length, 2))
        assert tokens[length // 2 : length - 2 * pairs].ge(64).all(), "filler between the pairs and the questions"


def test_mqar_has_pairs_and_then_each_key_once() -> None:
    vocabulary, pairs, length = 8192, 4, 64
    for tokens, targets, asked in zip(*recall.mqar_batch(vocabulary, pairs, 50, length, generator()), strict=True):
        keys, values = tokens[: 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == len(set(values)) == len(set(asked.tolist())) == pairs
        assert 1 <= min(keys) and max(keys) < 4096 <= min(values)
        assert tokens[asked].tolist() == keys and targets.tolist() == values
        assert asked.min() >= 2 * pairs and asked.max() < length and not (asked % 2).any()


def test_distances_of_mqar_follow_the_power_law() -> None:
    """One key of a pair, eight places: the shares are those of i ** -0.99."""
    _, _, asked = recall.mqar_batch(64, 1, 20_000, 18, generator())
    law = torch.arange(1, 9) ** -0.99
    torch.testing.assert_close(((asked[:, 0] - 2) // 2).bincount() / 20_000, law / law.sum(), atol=0.012, rtol=0)


def test_all_places_of_mqar_are_asked_where_there_are_no_more() -> None:
    _, targets, asked = recall.mqar_batch(64, 8, 10, 32, generator())
    assert (asked.sort().values == torch.arange(16, 32, 2)).all()
    assert (asked != asked.sort().values).any(), "in random order"
    assert targets.ge(32).all()


@pytest.mark.parametrize("length", [32, 64, 1024])
@pytest.mark.parametrize("kind", recall.Retrieval.KINDS)
def test_answers_of_retrieval_follow_from_its_facts(kind: str, length: int) -> None:
    groups = min(length // 8, 16) if kind == "multi-key" else 1 if kind == "needle" else min(4, length // 16)
    same, questions, answers = {"multi-value": (4, 1, 4), "variables": (3, 2, 1)}.get(kind, (1, 1, 1))
    K, fact, question = recall.Retrieval.KEYS, recall.Retrieval.vocabulary - 2, recall.Retrieval.vocabulary - 1
    for tokens, targets, asked in zip(*recall.retrieval_batch(kind, 20, length, generator()), strict=True):
        says: dict[int, set[int]] = {}
        starts = tokens.eq(fact).nonzero().flatten()
        assert len(starts) == groups * same and starts.diff().ge(3).all()
        for key, right in zip(tokens[starts + 1].tolist(), tokens[starts + 2].tolist(), strict=True):
            says.setdefault(key, set()).update(says[right] if right < K else {right})  # a variable is known before
        end = length - 2 * groups * questions
        assert starts.max() + 2 < end
        assert tokens[end::2].eq(question).all() and tokens[end + 1 :: 2].lt(K).all()
        assert tokens[:end].lt(K).sum() + tokens[:end].lt(2 * K).sum() >= len(says)
        given: dict[int, list[int]] = {}
        for place, target in zip(asked.tolist(), targets.tolist(), strict=True):
            given.setdefault(tokens[place].item(), []).append(target)
        assert {key: set(each) for key, each in given.items()} == {key: says[key] for key in given}
        assert len(given) == groups * questions and all(len(each) == answers for each in given.values())
        assert set(asked.tolist()) == set(range(end + 1, length, 2))


def test_hints_ask_for_the_value_of_a_key_where_a_fact_gives_it() -> None:
    """Three facts, two of which give a key, and two questions; all have the same value."""
    plain, hinted = (recall.retrieval_batch("variables", 20, 16, generator(), hints) for hints in (False, True))
    assert torch.equal(plain[0], hinted[0]) and torch.equal(plain[2], hinted[2][:, 2:])
    for tokens, targets, asked in zip(*hinted, strict=True):
        assert tokens[asked[:2] - 2].eq(recall.Retrieval.vocabulary - 2).all() and tokens[asked[:2]].lt(64).all()
        assert targets.eq(tokens[tokens.eq(recall.Retrieval.vocabulary - 2).nonzero()[0] + 2]).all()


def test_a_fact_may_be_anywhere_before_the_questions() -> None:
    tokens, _, _ = recall.retrieval_batch("needle", 4000, 32, generator())
    assert set(tokens.eq(recall.Retrieval.vocabulary - 2).nonzero()[:, 1].tolist()) == set(range(28))


def test_a_batch_of_retrieval_has_all_kinds_in_equal_shares() -> None:
    task = recall.parse("retrieval", ["--context=64", "--batch-size=8", "--growth=0.5", "--iterations=4"])
    tokens, targets, asked = task.batch(3, generator())
    assert tokens.shape == (8, 64) and targets.shape == asked.shape == (8, 16)
    assert targets.ne(recall.NOTHING).sum(1).tolist() == [1, 1, 8, 8, 16, 16, 16, 16]
    assert task.batch(0, generator())[0].shape == (16, 32), "it begins with short sequences"


def test_a_set_of_answers_is_right_if_nothing_else_is_as_likely(random: Random) -> None:
    task = recall.parse("mqar", ["--vocabulary=8", "--test-sets=2/1", "--test-rows=1", "--train-sets=2/1*1"])
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0, 0, 0]] * 3 + [[9.0, 9, 0, 0, 0, 0, 0, 0]])
    targets, asked = torch.tensor([0, 1, 3, 0]), torch.tensor([4, 4, 4, 5])  # three answers to one question; a tie
    examples = lambda use: [("made up", lambda random: (None, targets[None], asked[None]))]  # noqa: E731
    object.__setattr__(task, "examples", examples)

    class Model(torch.nn.Module):
        def forward(self, tokens: None, targets: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
            return logits[None], torch.tensor(0.5)

    result = recall.score(Model(), task, "test", recall.OnDevice(torch.device("cpu"), torch.float32))
    assert result == {"val": 0.5, "accuracy": 0.5, "by": {"made up": 0.5}}, "0 and 1 are among the three best"


@pytest.mark.parametrize(("variant", "first"), [("nsa", 0), ("dense", 0), ("local", 127 - 2 * 7 - 2)])
def test_only_the_window_alone_does_not_see_the_start(variant: str, first: int) -> None:
    """Two layers of a window of 8, after a convolution of 3."""
    flags = [f"--variant={variant}", "--vocabulary=64", "--local-window=8", "--layers=2", "--dim=32"]
    model = recall.build_model(recall.parse("mqar", flags)).eval()
    tokens, targets, asked = torch.randint(64, (1, 128)), torch.zeros(1, 1, dtype=torch.long), torch.tensor([[127]])
    with torch.no_grad():
        before = model(tokens, targets, asked)[0]
        tokens[0, :first] = 7
        assert torch.equal(model(tokens, targets, asked)[0], before)
        tokens[0, first] += 1 - 2 * (tokens[0, first] == 63).long()
        assert not torch.equal(model(tokens, targets, asked)[0], before)


# Many runs ------------------------------------------------------------------------------------------------------------

JOB = """
import json, os, sys, time
folder, seconds, code = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
with open(folder + "/log.jsonl", "w") as log:
    print(json.dumps({"settings": {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}, "begin": time.time()}), file=log)
    log.flush()
    time.sleep(seconds)
    print(json.dumps({"end": time.time()}), file=log)
print("said last")
sys.exit(code)
"""


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., runs.Job]:
    (tmp_path / "job.py").write_text(JOB)

    def make(name: str, seconds: float = 0.0, code: int = 0) -> runs.Job:
        folder = tmp_path / "out" / name
        return runs.Job(folder, [str(tmp_path / "job.py"), str(folder), str(seconds), str(code)])

    return make


def test_jobs_run_side_by_side_on_all_gpus(make_job: Callable[..., runs.Job]) -> None:
    jobs = [make_job(name, seconds=0.3) for name in "abcde"]
    assert runs.run_all(lambda: jobs, ["0", "7"], seconds=60) == []
    logs = runs.read_logs(jobs[0].folder.parent)
    assert [log.name for log in logs] == list("abcde") and all(log.complete for log in logs)
    assert {log.gpu for log in logs} == {"0", "7"}
    for gpu in ("0", "7"):  # one after the other on each
        spans = sorted((log.value("begin"), log.value("end")) for log in logs if log.gpu == gpu)
        assert len(spans) >= 2 and all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_a_failing_job_is_named_and_stops_no_other(
    make_job: Callable[..., runs.Job], capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [make_job("bad", code=3), make_job("good"), make_job("other")]
    assert runs.run_all(lambda: jobs, [None], seconds=60) == jobs[:1]
    assert re.search(r" bad: \d+ s, exit code 3; said last\n", capsys.readouterr().out)
    assert [log.complete for log in runs.read_logs(jobs[0].folder.parent)] == [False, True, True]
    assert runs.missing(jobs) == jobs[:1]
    with pytest.raises(ValueError, match="good has a run with other flags .*--overwrite"):
        runs.missing([make_job("good", seconds=1)])


def test_after_its_time_all_is_stopped(make_job: Callable[..., runs.Job], capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [make_job("long", seconds=100), make_job("never")]
    assert runs.run_all(lambda: jobs, [None], seconds=0.5) == []
    [log] = runs.read_logs(jobs[0].folder.parent)
    assert log.name == "long" and not log.complete and log.value("exit_code") != 0
    assert "stopped" in capsys.readouterr().out and runs.missing(jobs) == jobs


def test_an_interrupt_stops_the_jobs_that_run(
    make_job: Callable[..., runs.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, start = [], runs.Job.start
    monkeypatch.setattr(runs.Job, "start", lambda job, gpu: started.append(start(job, gpu)) or started[-1])
    interrupt = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=time.monotonic, sleep=interrupt))
    jobs = [make_job("long", seconds=100), make_job("too", seconds=100)]
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(lambda: jobs, [None, None], seconds=60)
    assert len(started) == 2 and all(process.poll() not in (None, 0) for process in started)


def test_slots_are_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runs.slots(None, 2) == ["0", "1", "0", "1"] and runs.slots(["1"], None) == ["1"] * 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert runs.slots(None, 1) == ["3", "GPU-abc"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.slots(None, None) == [None] and runs.slots(None, 3) == [None] * 3
    with pytest.raises(ValueError, match="side_by_side = 0: must be at least 1"):
        runs.slots(None, 0)


def test_a_log_says_what_a_cut_off_line_does_not(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"settings": {"seed": 3}}\n{"val": 2.0}\n{"val": 1.0, "by": {}}\n{"val": 0.')
    log = runs.Log(tmp_path)
    assert log.seed == 3 and log.best == {"val": 1.0, "by": {}} and not log.complete
    with pytest.raises(AttributeError, match="no setting 'width'"):
        _ = log.width


# Experiments: tables from runs of a step or two -----------------------------------------------------------------------

SMALL = ["--iterations=2", "--eval-interval=1", "--dim=32", "--layers=1", "--batch-size=4", "--warmup=0"]
OF_TASK = {
    "recall": ["--context=32", "--tested=32 64", "--pairs=4"],
    "mqar": ["--train-sets=32/2*1 16/2*1", "--test-sets=16/2 32/4", "--test-rows=5", "--vocabulary=64"],
    "retrieval": ["--context=32", "--tested=32 64", "--test-rows=4", "--eval-batches=1"],
}


def train_here(out: Path, task: str, name: str, *flags: str) -> None:
    """A run of this process, with the log of a complete one."""
    (out / task / name).mkdir(parents=True)
    recall.run(recall.parse(task, [*SMALL, *OF_TASK[task], *flags]), out / task / name / "log.jsonl")
    runs.Job(out / task / name, ["made up"]).finish(0, 90)


TABLES = {
    "recall": (r"\| \| 32 \|", r"\| nsa \| 0\.\d{4} / 0\.\d{4} \|", r"\| dense \| 0\.\d{4} \|", r"nsa-1: .* at 64\n"),
    "mqar": (r"\| \| 16/2 \| 32/4 \|", r"\| nsa, dim 32, rate 0.0032( \| 0\.\d{4} / 0\.\d{4}){2} \|"),
    "retrieval": (
        r"\| \| 32 \| 64 \|",
        *(rf"\| {kind}, dense( \| 0\.\d{{4}}){{2}} \|" for kind in recall.Retrieval.KINDS),
    ),
}


@pytest.mark.parametrize("task", recall.TASKS)
def test_tables_come_from_the_logs(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for variant, seed in (("nsa", 1), ("nsa", 2), ("dense", 1)):
        train_here(tmp_path, task, f"{variant}-{seed}", f"--variant={variant}", f"--seed={seed}")
    [first, *_] = runs.Log(tmp_path / task / "nsa-1").lines
    assert first["environment"].keys() == {"torch", "device", "command"} and first["settings"]["dim"] == 32
    assert learn.main([task, "--out", str(tmp_path), "--tables"]) == 0
    shown = capsys.readouterr().out
    for line in (*TABLES[task], r"nsa-2, [\d,]+ parameters, 1.5 minutes: 1 0\.\d+  2 0\.\d+\n"):
        assert re.search(line, shown), f"{line}\n{shown}"


def test_a_run_that_was_stopped_counts_for_what_it_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(tmp_path, "recall", "nsa-1")
    path = tmp_path / "recall" / "nsa-1" / "log.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "minutes" not in line and '{"tests"' not in line))
    learn.main(["recall", "--out", str(tmp_path), "--tables"])
    shown = capsys.readouterr().out
    assert re.search(r"\| nsa \| 0\.\d{4}\* \|", shown) and "not complete" in shown


@pytest.mark.parametrize("task", recall.TASKS)
def test_a_run_without_an_evaluation_is_named(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn.main([task, "--out", str(tmp_path), "--tables"]) == 2
    assert "there is no log" in capsys.readouterr().err
    train_here(tmp_path, task, "nsa-1")
    path = tmp_path / task / "nsa-1" / "log.jsonl"
    path.write_text(path.read_text().splitlines()[0])
    assert learn.main([task, "--out", str(tmp_path), "--tables"]) == 0
    assert re.search(r"\nnsa-1, [\d,]+ parameters, not complete: \n", capsys.readouterr().out)


def test_training_ends_when_accuracy_is_enough(tmp_path: Path) -> None:
    train_here(tmp_path, "mqar", "nsa", "--enough=0", "--iterations=5")
    log = runs.Log(tmp_path / "mqar" / "nsa")
    assert [each["iteration"] for each in log.evaluations] == [1] and log.value("tests").keys() == {"16/2", "32/4"}


def made_up_log(out: Path, rate: float, seed: int, *evaluations: tuple[int, float]) -> None:
    (out / f"nsa-64-{rate}-{seed}").mkdir(parents=True)
    settings = {"variant": "nsa", "dim": 64, "learning_rate": rate, "seed": seed, "enough": 0.99}
    lines = [{"settings": settings}, *({"iteration": n, "val": 1.0, "accuracy": share} for n, share in evaluations)]
    lines.append({"exit_code": 0})
    (out / f"nsa-64-{rate}-{seed}" / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize(
    ("slow", "best"),
    [([(1, 0.5), (2, 0.9)], 3e-3), ([(1, 0.992)], 1e-3), ([(1, 0.5), (2, 0.5), (3, 0.999)], 3e-3)],
    ids=["higher", "sooner", "later"],
)
def test_the_best_rate_is_that_of_the_first_seed(slow: list[tuple[int, float]], best: float, tmp_path: Path) -> None:
    made_up_log(tmp_path / "mqar", 1e-3, 1, *slow)
    made_up_log(tmp_path / "mqar", 3e-3, 1, (1, 0.6), (2, 0.995))
    made_up_log(tmp_path / "mqar", 1e-2, 2, (1, 0.999))
    words = ["mqar", "--out", str(tmp_path), "--variants", "nsa", "--dims", "64", "--seeds", "1", "2", "--rates"]
    *_, job = jobs = recall.mqar_jobs(learn.parse([*words, "1e-3", "3e-3"]), [])
    task = recall.parse("mqar", job.command[4:])
    assert (task.learning_rate, task.seed, len(jobs)) == (best, 2, 3)
    jobs = recall.mqar_jobs(learn.parse([*words, "1e-3", "3e-3", "5e-3"]), [])
    assert len(jobs) == 3, "the second seed waits for the first"


def test_runs_of_before_tell_nothing_to_those_that_overwrite_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rate in (1e-3, 3e-3):
        made_up_log(tmp_path / "mqar", rate, 1, (1, 0.999))
    words = ["mqar", "--out", str(tmp_path), "--variants", "nsa", "--dims", "64", "--seeds", "1", "2"]
    args = learn.parse([*words, "--rates", "1e-3", "3e-3", "--overwrite"])
    assert len(recall.mqar_jobs(args, [])) == 3
    monkeypatch.setattr(learn, "run_all", lambda wanted, free, seconds: wanted())
    jobs = learn.run(learn.EXPERIMENTS["mqar"], args, [])
    assert [recall.parse("mqar", job.command[4:]).seed for job in jobs] == [1, 1]


def test_jobs_have_the_settings_of_the_experiment(tmp_path: Path) -> None:
    for name, count in (("text", 6), ("recall", 54), ("mqar", 18), ("retrieval", 9)):
        args = learn.parse([name, "--out", str(tmp_path)])
        jobs = learn.EXPERIMENTS[name].jobs(args, [])
        assert len({job.folder for job in jobs}) == count and jobs[0].folder.parent == tmp_path / name
    words = ["recall", "--out", str(tmp_path), "--contexts", "64", "32", "--variants", "local", "--seeds", "1"]
    tasks = [recall.parse("recall", job.command[4:]) for job in recall.recall_jobs(learn.parse(words), ["--dim=32"])]
    assert [(task.context, task.tested, task.batch_size, task.dim) for task in tasks] == [
        (64, "64", 1024, 32),
        (32, "32 64", 2048, 32),
    ]
    with pytest.raises(SystemExit):
        recall.recall_jobs(learn.parse(words), ["--no-such-flag=1"])
