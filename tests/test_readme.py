"""README and docs/: each code block runs alone, the settings are right, and what the pages point to is there."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from pathlib import Path

import pytest

from native_sparse_attention import NSAConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
# The recipe of huggingface.md needs transformers: test_huggingface.py runs it.
BLOCKS = [
    pytest.param(block, id=f"{page.stem} {number}")
    for page in PAGES
    if page.name != "huggingface.md"
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL), 1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_code_block_runs_alone_and_prints_what_its_comments_say(block: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "code block", "exec"), {"__name__": "block"})
    assert printed.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", block)


def test_code_blocks_are_found() -> None:
    assert len(BLOCKS) >= README.count("```python") >= 5


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 300, "README is to be read at once; tables of measurements belong in docs/"


def test_every_field_of_the_configuration_is_in_the_table() -> None:
    table = README[README.index("## Configuration") : README.index("### Choosing settings")]
    missing = [each.name for each in dataclasses.fields(NSAConfig) if f"`{each.name}`" not in table]
    assert not missing, f"README's configuration table lacks {missing}"


def test_the_settings_by_length_construct() -> None:
    rows = re.findall(r"^\| (?:short|medium|long),.*?\| (\d+) \| (\d+) \| (\d+) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 3, f"expected three recommended settings, found {rows}"
    for window, block, topk in rows:
        NSAConfig(local_window=int(window), block_size=int(block), topk_blocks=int(topk))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_points_to_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    scripts = re.findall(r"(?:python|nproc-per-node \d+) (\S+\.py)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [script for script in scripts if not (ROOT / script).exists()]
    assert not missing, f"{page.name} points to {missing}"


def test_every_page_and_picture_is_pointed_to() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = [*PAGES[1:], *(ROOT / "assets").iterdir()]
    missing = [file.name for file in files if f"{file.parent.name}/{file.name}" not in text]
    assert not missing, f"no page points to {missing}"
