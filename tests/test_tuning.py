"""Tuning: candidates, the choice among them by a clock that is made up, and the file that remembers it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import compile_only, going, interpreted, launch, needs_triton, slow, without_interpreter
from torch import Tensor

import native_sparse_attention as nsa

# Rows that see nothing are −inf on their way, as on a GPU; NumPy, the engine of the interpreter, warns of it.
pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

CPU = torch.device("cpu")
GPU = torch.cuda.is_available()
NAMES = [
    f"{kernel}/{bits}/{width}"
    for kernel in nsa._TILES
    if kernel != "float32"
    for bits in (16, 32)
    for width in (64, 128, 256)
]
NAME = "local_forward/16/64"


def others(name: str) -> list[tuple[int, ...]]:
    """Candidates but for the tile that the table has for this device."""
    return [tile for tile in nsa._candidates(name) if tile != nsa._first_tile(name, CPU)]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder, and nothing read from it yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NSA_TUNED")
    nsa._tuned.cache_clear()
    yield tmp_path
    nsa._tuned.cache_clear()
    nsa._forget_plans()


def write(contents: str) -> Path:
    path = nsa._tiles_file(CPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(contents, encoding="utf-8")
    return path


def constants(dtype: torch.dtype = torch.float16) -> tuple[int, ...]:
    """Tile with which a kernel is launched."""
    found = nsa._constants("local_forward", 4, 1, 64, dtype, "ieee", CPU)
    return tuple(found[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))


# ---------------------------------------------------------------------------------------------------------------------
# Candidates
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_candidates(name: str) -> None:
    found = nsa._candidates(name)
    assert {tile[:4] for tile in nsa._tiles_of(name)} <= set(found)
    assert len(set(found)) == len(found)
    assert 6 <= len(found) <= 70
    for m, n, warps, stages in found:
        assert m in (16, 32, 64, 128) and n in (16, 32, 64, 128), "a tile of the matrix unit; rows are padded by 128"
        assert warps in (1, 2, 4, 8) and 1 <= stages <= 4
        assert n <= 64 or not name.startswith("selected"), "keys of one block"


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------


class Clock:
    """Milliseconds of a call by the tile that a kernel has at that time, in place of `triton.testing.do_bench`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, ms: Callable[[tuple[int, ...]], float], name: str = NAME
    ) -> None:
        self.tiles: dict[str, tuple[int, ...]] = {}
        self.timed: list[tuple[int, ...]] = []

        def do_bench(call: Callable[[], Any], **options: Any) -> float:
            call()
            self.timed.append(self.tiles[name])
            return ms(self.tiles[name])

        monkeypatch.setattr(nsa.triton.testing, "do_bench", do_bench)


def fastest(clock: Clock, call: Callable[[], list[Tensor]] = lambda: [torch.ones(3)]) -> tuple[int, ...]:
    return nsa._fastest_tile(NAME, nsa._first_tile(NAME, CPU), clock.tiles, call)


def test_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    best = others(NAME)[3]
    clock = Clock(monkeypatch, lambda tile: 0.5 if tile == best else 1.0)
    assert fastest(clock) == best
    assert set(clock.timed) == set(nsa._candidates(NAME))
    assert f"{NAME} " in (line := capsys.readouterr().out) and "1.000     0.500   " in line
    assert ", ".join(map(str, best)) in line


@pytest.mark.parametrize("ms, taken", [(0.99, False), (0.97, True)])
def test_less_than_two_percent_is_noise(ms: float, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    best = others(NAME)[0]
    clock = Clock(monkeypatch, lambda tile: ms if tile == best else 1.0)
    assert (fastest(clock) == best) == taken


def off(x: float) -> Callable[[], list[Tensor]]:
    return lambda: [torch.tensor([1.0, x]), torch.tensor([1, 2])]


def does_not_fit() -> list[Tensor]:
    raise nsa._CannotLaunch("out of resource: shared memory")


def breaks_the_gpu() -> list[Tensor]:
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


WRONG = {
    "nan": off(float("nan")),
    "a_row_off": off(1.5),
    "other_blocks": lambda: [torch.tensor([1.0, 1.0]), torch.tensor([1, 3])],
    "does_not_fit": does_not_fit,
}


@pytest.mark.parametrize("result", WRONG.values(), ids=WRONG)
def test_a_tile_with_other_results_or_none_takes_forever(
    result: Callable[[], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, second = others(NAME)[:2]
    clock = Clock(monkeypatch, lambda tile: {broken: 0.1, second: 0.5}.get(tile, 1.0))
    right = off(1.0)
    assert fastest(clock, lambda: (result if clock.tiles[NAME] == broken else right)()) == second
    assert broken not in clock.timed


def test_a_tile_that_breaks_the_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = others(NAME)[1]
    clock = Clock(monkeypatch, lambda tile: 1.0)
    with pytest.raises(RuntimeError, match=rf"{re.escape(str(broken))} of {NAME} failed: Triton Error"):
        fastest(clock, lambda: (breaks_the_gpu if clock.tiles[NAME] == broken else off(1.0))())


def test_rows_that_see_nothing_are_alike() -> None:
    lse = torch.tensor([-torch.inf, 0.0, 3.0])
    assert nsa._same_results(lse + torch.tensor([0, 0, 1e-6]), lse)
    assert not nsa._same_results(torch.tensor([0.0, 0.0, 3.0]), lse)


# ---------------------------------------------------------------------------------------------------------------------
# The calls that are timed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_kernel_has_a_call_that_launches_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sizes of a GPU; launched is nothing."""
    asked: list[str] = []
    name = nsa._tile_name
    monkeypatch.setattr(nsa._Launch, "__call__", lambda self, *tensors: None)
    monkeypatch.setattr(nsa, "_tile_name", lambda *arguments: asked.append(arguments[0]) or name(*arguments))
    kernels = set()
    for kernel, call in nsa._tuning_calls(CPU, dtype, 64, 8192):
        nsa._forget_plans()
        asked.clear()
        call()
        assert kernel in asked
        kernels.add(kernel)
    assert kernels == nsa._TILES.keys() - {"float32"} - ({"selected_by_query"} if dtype == torch.float32 else set())


@interpreted
@pytest.mark.parametrize("kernel", ["local_forward", slow("scores"), slow("selected_backward_large_group")])
def test_a_kernel_with_another_tile(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the clock: the results of the tiles are compared."""
    name = f"{kernel}/16/64"
    tiles = nsa._tuned(CPU)
    default = nsa._first_tile(name, CPU)
    other = next(tile for tile in nsa._candidates(name) if tile[:2] != default[:2])
    monkeypatch.setattr(nsa, "_candidates", lambda name: [default, other])
    clock = Clock(monkeypatch, lambda tile: 0.5 if tile == other else 1.0, name)
    clock.tiles = tiles
    call = next(call for each, call in nsa._tuning_calls(CPU, torch.float16, 16, 128) if each == kernel)
    with going("by_index"):
        assert nsa._fastest_tile(name, default, tiles, call) == other


def compile_together() -> None:
    """Compile kernels side by side, and launch them: nothing is left to compile."""
    from triton.runtime.jit import JITFunction

    compile_only(("cuda", 90, 32), lambda *_: None)
    nsa._compile_together(lambda: launch(4, 64, ("local", "select"), [512]))
    late, do_compile = [], JITFunction._do_compile

    def noted(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        late.append(self.fn.__name__)
        return do_compile(self, *arguments, **options)

    JITFunction._do_compile = noted
    launch(4, 64, ("local", "select"), [512])
    assert not late, late
    launch(4, 32, ("local",), [512])
    assert late


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nsa.triton, "AsyncCompileMode"), reason="needs Triton 3.6 or later")
def test_kernels_are_compiled_side_by_side(tmp_path: Path) -> None:
    without_interpreter("import test_tuning; test_tuning.compile_together()", TRITON_CACHE_DIR=str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def one_call(*_: Any) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    yield "local_forward", lambda: [torch.ones(3)]


@pytest.fixture
def best(monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """The tile with which the only kernel that is tuned is fastest."""
    best = others(NAME)[3]
    clock = Clock(monkeypatch, lambda tile: 0.5 if tile == best else 1.0)
    clock.tiles = nsa._tuned(CPU)
    monkeypatch.setattr(nsa, "_tuning_calls", one_call)
    return best


def test_what_is_found_is_used_from_then_on(best: tuple[int, ...], cache_folder: Path) -> None:
    table = constants()
    path = nsa._tune(CPU, torch.float16, 64)
    assert path.parent == cache_folder / "native_sparse_attention"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert nsa.__version__ in path.name and nsa.triton.__version__ in path.name
    assert json.loads(path.read_text()) == {NAME: list(best)}
    assert table != best == constants() == constants(torch.bfloat16)
    assert constants(torch.float32) == nsa._first_tile("local_forward/32/64", CPU)


def test_other_dtypes_and_head_dims_are_added(best: tuple[int, ...]) -> None:
    other = "scores/32/256"
    write(json.dumps({other: nsa._candidates(other)[1], NAME: nsa._candidates(NAME)[0]}))
    path = nsa._tune(CPU, torch.float16, 64)
    assert nsa._read_tiles(path) == {other: nsa._candidates(other)[1], NAME: best}


def test_the_file_is_ignored_on_demand(best: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    nsa._tune(CPU, torch.float16, 64)
    monkeypatch.setenv("NSA_TUNED", "0")
    nsa._tuned.cache_clear()
    assert constants() == nsa._first_tile(NAME, CPU)


def test_tiles_that_do_not_fit_a_call_are_given_up(best: tuple[int, ...]) -> None:
    nsa._tune(CPU, torch.float16, 64)
    assert constants() == best
    with pytest.warns(UserWarning, match="does not fit, and those of the table serve"):
        assert nsa._untune(CPU)
    assert constants() == nsa._first_tile(NAME, CPU)
    assert not nsa._untune(CPU)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_stopped_on_the_way(error: type[BaseException], best: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays, no other does, and the tiles are those of before."""
    before = {NAME: others(NAME)[1]}
    path = write(json.dumps(before))
    nsa._tuned.cache_clear()

    def calls(*arguments: Any) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
        yield from one_call()
        raise error

    monkeypatch.setattr(nsa, "_tuning_calls", calls)
    monkeypatch.setattr(nsa, "_fastest_tile", lambda *_: best)
    with pytest.raises(error):
        nsa._tune(CPU, torch.float16, 64)
    assert list(path.parent.iterdir()) == [path]
    assert nsa._read_tiles(path) == before
    assert constants() == before[NAME]


BROKEN = {
    "no_json": "{",
    "empty": "",
    "a_list": "[1, 2]",
    "no_tile": json.dumps({NAME: 64}),
    "words": json.dumps({NAME: ["a", "b", "c", "d"]}),
    "foreign_tile": json.dumps({NAME: [48, 64, 4, 2]}),
    "a_tile_of_three": json.dumps({NAME: [64, 64, 4]}),
    "a_huge_tile": json.dumps({NAME: [1024, 1024, 4, 2]}),
    "foreign_kernel": json.dumps({"flash/16/64": [64, 64, 4, 2]}),
    "foreign_head_dim": json.dumps({"local_forward/16/512": [64, 64, 4, 2]}),
    "one_of_two": json.dumps({NAME: nsa._candidates(NAME)[1], "scores/16/64": [0, 0, 0, 0]}),
}


@pytest.mark.parametrize("contents", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_none_of_ours_is_ignored(contents: str) -> None:
    path = write(contents)
    with pytest.warns(UserWarning, match="is not what tune\\(\\) writes, and is ignored") as warned:
        assert constants() == constants() == nsa._first_tile(NAME, CPU)
    assert len(warned) == 1 and str(path) in str(warned[0].message)


def test_a_folder_that_cannot_be_written_is_found_out_at_once(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache_folder / "native_sparse_attention").write_text("a file in its place")
    monkeypatch.setattr(nsa, "_tuning_calls", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(OSError):
        nsa._tune(CPU, torch.float16, 64)


# ---------------------------------------------------------------------------------------------------------------------
# The door
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "cpu"}, "device = 'cpu': must be a GPU"),
        ({"dim_head": 0}, "dim_head = 0: must be at least 1"),
        pytest.param({}, "device = 'cuda': must be a GPU", marks=pytest.mark.skipif(GPU, reason="there is one")),
    ],
)
def test_what_cannot_be_tuned(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nsa.tune(**arguments)


def test_without_part_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(nsa._BACKENDS, "triton")
    with pytest.raises(ValueError, match="this file has no kernels"):
        nsa.tune()


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", [{"dtype": torch.float64}, {"dim_head": 257}], ids=str)
def test_what_has_no_kernels(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot run the kernels"):
        nsa.tune(**arguments)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kernel with its tile and with one other; one file, which a second run reads."""
    candidates = nsa._candidates
    monkeypatch.setattr(nsa, "_candidates", lambda name: candidates(name)[:2] + candidates(name)[-1:])
    path = nsa.tune(dtype=dtype, dim_head=64)
    found, lines = nsa._read_tiles(path), capsys.readouterr().out.splitlines()
    assert len(found) == len(lines) - 1 >= len(nsa._TILES) - 2
    assert nsa._tuned(torch.device("cuda", torch.cuda.current_device())) == found
    assert os.listdir(path.parent) == [path.name]
