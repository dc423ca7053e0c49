"""The structure of the project: what tests share, and the parts of the library."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = sorted(Path(__file__).parent.glob("*.py"))


def imported(file: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
            names.update(alias.name for alias in node.names if node.level)
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
    return names


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_no_module_imports_a_test_module(file: Path) -> None:
    others = imported(file) & {other.stem for other in TESTS if other.name.startswith("test_")}
    assert not others, f"{file.name} imports {sorted(others)}"


MODULE = Path(__file__).parent.parent / "native_sparse_attention.py"
SCREEN = 70  # lines


@pytest.mark.slow
def test_the_library_without_its_kernels(tmp_path: Path) -> None:
    """Part II, from its first line to its last, can be cut out: the rest passes its self-tests, and names no Triton."""
    before, part_two = MODULE.read_text(encoding="utf-8").split("# Part II  Triton kernels\n")
    after = part_two.split("# End of Part II\n")[1]
    rest = before + after
    assert "triton." not in rest and "tl." not in rest
    (tmp_path / MODULE.name).write_text(rest, encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, MODULE.name], cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 passed, 0 failed, 1 skipped" in result.stdout
    ask = "import torch, native_sparse_attention as n\nx = torch.zeros(1, 4, 1, 8)\n"
    ask += "n.local_attention(x, x, x, 2, backend='triton')"
    result = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True)
    assert "ValueError: backend = 'triton': cannot run here: this file has no kernels" in result.stderr


def test_the_model_first() -> None:
    tree = ast.parse(MODULE.read_text(encoding="utf-8"))
    classes = {node.name: node.lineno for node in tree.body if isinstance(node, ast.ClassDef)}
    assert classes["NSABlock"] < 500


def test_no_function_is_longer_than_a_screen() -> None:
    tree = ast.parse(MODULE.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = {node.name: length for node in functions if (length := node.end_lineno - node.lineno + 1) > SCREEN}
    assert not long


def test_no_two_functions_share_a_name() -> None:
    tree = ast.parse(MODULE.read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "_"]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
