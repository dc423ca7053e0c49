"""The file as a program: its self-tests and their exit code, what importing it needs, and its docstrings."""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import native_sparse_attention as nsa

MODULE = Path(nsa.__file__)


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder with nothing but a copy of the file."""
    shutil.copy(MODULE, folder)
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The self-tests
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_running_the_file_prints_a_table_and_exits_with_0(tmp_path: Path) -> None:
    result = python(MODULE.name, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {}
    for line in result.stdout.splitlines():
        if match := re.fullmatch(r"(\S+) +(pass|skip|FAIL) +(\d+\.\d) +(.+)", line):
            rows[match[1]] = (match[2], match[4])
    gpu = torch.cuda.is_available()
    assert rows.keys() == (nsa._SELFTESTS | nsa._GPU_SELFTESTS if gpu else nsa._SELFTESTS).keys(), result.stdout
    speed = r"^speed: forward \+ backward, .* 4k \d+\.\d+ ms \(dense \d+\.\d+: \d+\.\d×\), 32k \d"
    assert bool(re.search(speed, result.stdout, re.MULTILINE)) == gpu, result.stdout
    optional = {"triton", *nsa._GPU_SELFTESTS} & rows.keys()  # need a GPU, and a package that may be missing
    assert {rows[name][0] for name in rows.keys() - optional} == {"pass"}, result.stdout
    assert all(rows[name][0] in ("pass", "skip") for name in optional), result.stdout
    skipped = sum(outcome == "skip" for outcome, _ in rows.values())
    assert f"{len(rows) - skipped} passed, 0 failed, {skipped} skipped" in result.stdout


def passing() -> str:
    return "it works"


def skipping() -> str:
    raise nsa._Skip("nothing to test it on")


def failing() -> str:
    raise AssertionError("0.5 is not 0.25")


def crashing() -> str:
    raise RuntimeError("out of luck")


def run_main(
    tests: list[Callable[[], str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and output of `_main` with these self-tests, and without those of a GPU."""
    monkeypatch.setattr(nsa, "_SELFTESTS", {test.__name__: test for test in tests})
    monkeypatch.setattr(nsa, "_GPU_SELFTESTS", {})
    monkeypatch.setattr(nsa, "_speed", lambda: "")
    return nsa._main(), capsys.readouterr().out


@pytest.mark.parametrize(
    "broken, message", [(failing, "AssertionError: 0.5 is not 0.25"), (crashing, "RuntimeError: out of luck")]
)
def test_a_broken_self_test_gives_exit_code_1(
    broken: Callable[[], str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And those behind it are run all the same."""
    code, out = run_main([broken, passing, skipping], monkeypatch, capsys)
    assert code == 1
    assert re.search(rf"^{broken.__name__} +FAIL .*{re.escape(message)}$", out, re.MULTILINE), out
    assert re.search(r"^passing +pass .*it works$", out, re.MULTILINE), out
    assert "1 passed, 1 failed, 1 skipped" in out


def test_a_skipped_self_test_says_why_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run_main([skipping, passing], monkeypatch, capsys)
    assert code == 0
    assert re.search(r"^skipping +skip .*nothing to test it on$", out, re.MULTILINE), out
    assert "1 passed, 0 failed, 1 skipped" in out


def test_one_broken_entry_among_the_real_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in nsa._SELFTESTS:
        monkeypatch.setitem(nsa._SELFTESTS, name, failing if name == "dense" else passing)
    monkeypatch.setattr(nsa, "_GPU_SELFTESTS", {})
    monkeypatch.setattr(nsa, "_speed", lambda: "")
    assert nsa._main() == 1
    assert f"{len(nsa._SELFTESTS) - 1} passed, 1 failed, 0 skipped" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The self-tests notice a broken library
# ---------------------------------------------------------------------------------------------------------------------


SEES = nsa._Span.sees


def sees_the_next_token(span: nsa._Span, query: Tensor, key: Tensor) -> Tensor:
    return SEES(span, query + 1, key) if span.window else SEES(span, query, key)


def sees_blocks_too_late(span: nsa._Span, query: Tensor, block: Tensor) -> Tensor:
    return SEES(span, query, block) if span.window else SEES(span, query - 1, block)


@pytest.mark.parametrize(
    "selftest, fault",
    [
        ("causality", sees_the_next_token),
        ("reference", sees_the_next_token),
        ("reference", sees_blocks_too_late),
    ],
)
def test_a_wrong_rule_is_noticed(selftest: str, fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa._Span, "sees", fault)
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        nsa._SELFTESTS[selftest]()


def test_a_missing_token_of_the_chosen_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = nsa.selective_attention

    def without_the_first_block(
        q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int
    ) -> Tensor:
        return whole(q, k, v, block_indices.masked_fill(block_indices == 0, -1), select_block_size)

    monkeypatch.setattr(nsa, "selective_attention", without_the_first_block)
    with pytest.raises(AssertionError, match="dense"):
        nsa._SELFTESTS["dense"]()


def results_of(kernel: Tensor) -> nsa._Run:
    """A run whose plain results are off by 1e-3 of the exact ones everywhere, beside the kernels' that are given."""
    exact = torch.ones(100, 8, dtype=torch.float64)
    return lambda dtype, on: {"o": kernel if on == "triton" else exact * (1 if dtype == torch.float64 else 1.001)}


ROW_OFF = torch.ones(100, 8)
ROW_OFF[7] += 0.01


@pytest.mark.parametrize(
    "kernel, failure",
    [
        (torch.ones(100, 8) + 0.0019, None),
        (torch.ones(100, 8) + 0.0021, "case, torch.float32: o is off by 2.1e-03, PyTorch by 1.0e-03"),
        (ROW_OFF, "a row of o is off by 1.0e-02, of PyTorch by 1.0e-03"),
        (torch.full((100, 8), torch.nan), "o is off by nan"),
    ],
)
def test_kernels_are_held_to_twice_the_error_of_pytorch(kernel: Tensor, failure: str | None) -> None:
    runs = {("case", torch.float32): results_of(kernel)}
    if failure is None:
        assert nsa._hold_to_float64(runs) == "1 settings against float64: error at most 1.9 times PyTorch's"
        return
    with pytest.raises(nsa._Failure, match=re.escape(failure)):
        nsa._hold_to_float64(runs)


@pytest.mark.parametrize("fault", [None, "another block", "a block twice", "out of order", "too few"])
def test_a_wrong_choice_of_blocks_is_noticed(fault: str | None) -> None:
    choice = nsa._Choice(8, 4, 8, 3, 1, 1)
    torch.manual_seed(0)
    q, k_cmp = torch.randn(1, 60, 4, 16), torch.randn(1, 14, 2, 16)
    _, lse = nsa.compressed_attention(q, k_cmp, k_cmp, 8, 4)
    chosen = nsa.select_blocks(q, k_cmp, lse, **choice._asdict())
    blocks = chosen[0, 59, 1]  # 0, the best one, 7
    if fault == "another block":
        blocks[1] = next(j for j in (3, 4) if j != blocks[1])
    elif fault == "a block twice":
        blocks[1] = 0
    elif fault == "out of order":
        blocks[:2] = blocks[:2].flip(0)
    elif fault == "too few":
        blocks[2] = -1
    if fault is None:
        nsa._require_highest(q, k_cmp, chosen, choice)
        return
    with pytest.raises(nsa._Failure):
        nsa._require_highest(q, k_cmp, chosen, choice)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--help"], 0, "--tune"),
        (["--tuna"], 2, "unrecognized arguments: --tuna"),
        (["--tune", "--dtype", "int8"], 2, "argument --dtype: invalid choice: 'int8'"),
        (["--tune", "--dim-head", "0"], 2, "error: dim_head = 0: must be at least 1"),
    ],
)
def test_arguments(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        nsa._main(arguments)
    assert left.value.code == code
    out, err = capsys.readouterr()
    assert said in (err if code else out)


def test_tuning_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = []
    monkeypatch.setattr(nsa, "tune", lambda *arguments: given.append(arguments) or Path("there.json"))
    assert nsa._main(["--tune", "--dtype", "float16", "--dim-head", "64"]) == 0
    assert given == [(None, torch.float16, 64)]
    assert "written to there.json" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Importing
# ---------------------------------------------------------------------------------------------------------------------

USE = """
import torch
import native_sparse_attention as nsa
block = nsa.NSABlock(nsa.NSAConfig(dim=16, heads=2, block_size=4, seq_len=32))
block(torch.randn(1, 19, 16)).sum().backward()
block.attn.attention_patterns(torch.randn(1, 19, 16))
cache = nsa.NSACache(block.attn.cfg, 1, 32)
with torch.no_grad():
    for _ in range(2):
        block(torch.randn(1, 13, 16), cache=cache)
"""
OPTIONAL = ("triton", "flash_attn", "matplotlib", "tqdm")


def test_importing_and_using_it_prints_nothing_and_loads_no_extras(tmp_path: Path) -> None:
    # torch may import what it likes: only what the file adds counts.
    script = "import sys, torch, einops; before = set(sys.modules)\n" + USE
    script += "added = {name.split('.')[0] for name in set(sys.modules) - before}\n"
    script += "extras = added & {'flash_attn', 'matplotlib', 'tqdm'}; assert not extras, extras\n"
    result = python("-c", script, folder=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_it_works_where_nothing_optional_can_be_imported(tmp_path: Path) -> None:
    """Nor anything else but torch and einops: no GPU, no optional package."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
    result = python("-c", blocked + USE, folder=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---------------------------------------------------------------------------------------------------------------------
# Docstrings
# ---------------------------------------------------------------------------------------------------------------------


def test_the_examples_in_the_docstrings() -> None:
    torch.manual_seed(0)
    result = doctest.testmod(nsa, extraglobs={"torch": torch, "nn": torch.nn, "F": torch.nn.functional})
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("name", nsa.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert getattr(nsa, name).__doc__, f"{name} has no docstring"
    assert not name.startswith("_")
