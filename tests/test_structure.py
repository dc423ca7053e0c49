"""The tests themselves: what they share stands in `cases.py`, `oracle.py` and `conftest.py`."""

from __future__ import annotations

import ast
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
