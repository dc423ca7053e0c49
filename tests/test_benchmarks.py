"""tests/benchmarks: the drawings show what they are given, and what `gpu.py` measures can be read."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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
