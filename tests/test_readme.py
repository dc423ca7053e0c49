"""README and docs/: each code block runs alone, settings and commands are right, and links point to what is there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from native_sparse_attention import NSAConfig, __version__

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
# The recipe of huggingface.md needs transformers: test_huggingface.py runs it.
BLOCKS = [
    pytest.param(block, id=f"{page.stem} {number}")
    for page in PAGES
    if page.name != "huggingface.md"
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", TEXTS[page.name], re.DOTALL), 1)
]
# `python SCRIPT ARGUMENTS`, in a code block or between backticks; ` -- ` hands what follows to the training example.
COMMANDS = sorted({
    (script, re.sub(r"\s+", " ", arguments).strip())
    for text in TEXTS.values()
    for script, arguments in re.findall(r"(?:python|nproc-per-node \d+) (\S+\.py)\b([^`#&;]*?)(?=[`#&;]|\n[^ ])", text)
})


@pytest.mark.parametrize("block", BLOCKS)
def test_a_code_block_runs_alone_and_prints_what_its_comments_say(block: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "code block", "exec"), {"__name__": "block"})
    if torch.distributed.is_initialized():  # by the block, for itself
        torch.distributed.destroy_process_group()
    assert printed.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", block)


def test_code_blocks_are_found() -> None:
    assert len(BLOCKS) >= README.count("```python") >= 5
    for name, text in TEXTS.items():
        languages = set(re.findall(r"^ *```(\S*)", text, flags=re.MULTILINE))
        assert languages <= {"", "python", "sh", "bibtex"}, f"{name} has code blocks that no test runs: {languages}"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 300, "README is to be read at once; tables of measurements belong in docs/"


def test_the_table_of_the_configuration_has_every_field_and_its_default() -> None:
    found = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|.*?\| (.*?) \|", section("## Configuration"), flags=re.MULTILINE)
    pairs = ((names.split(", "), defaults) for names, defaults in found)
    rows = {
        name.strip("`"): default
        for names, defaults in pairs
        for name, default in zip(names, [defaults] if len(names) == 1 else defaults.split(", "), strict=True)
    }
    derived = {"dim_head": "dim / heads", "kv_heads": "heads", "stride": "block_size",
               "select_block_size": "block_size"}  # fmt: skip
    for field in dataclasses.fields(NSAConfig):
        expected = derived.get(field.name, "`" + repr(field.default).replace("'", '"') + "`")
        assert rows.get(field.name) == expected, f"README's default of {field.name}"


def section(title: str) -> str:
    """Text of README from this title to the next of its level or above."""
    start = README.index(title + "\n")
    marks = len(title.split()[0])
    following = re.search(rf"^#{{1,{marks}}} ", README[start + len(title) :], flags=re.MULTILINE)
    return README[start : start + len(title) + following.start()] if following else README[start:]


def test_the_settings_by_length_construct() -> None:
    rows = re.findall(r"^\| (?:short|medium|long),.*?\| (\d+) \| (\d+) \| (\d+) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 3, f"expected three recommended settings, found {rows}"
    for window, block, topk in rows:
        NSAConfig(local_window=int(window), block_size=int(block), topk_blocks=int(topk))


def test_the_setting_of_the_paper_constructs() -> None:
    [setting] = re.findall(r"27B model has `(.*?)`", README, flags=re.DOTALL)
    config = eval(f"NSAConfig(dim=64 * 40, {setting})", {"NSAConfig": NSAConfig})
    assert (config.heads, config.kv_heads, config.stride) == (64, 4, 16)


def test_the_citation_has_the_version_of_the_library() -> None:
    assert re.findall(r"version = \{(.*?)\}", section("## Citation")) == [__version__]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_points_to_exist(page: Path) -> None:
    text = TEXTS[page.name]
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [script for script, _ in COMMANDS if script in text and not (ROOT / script).exists()]
    assert not missing, f"{page.name} points to {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_titles_that_a_page_points_to_exist(page: Path) -> None:
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", TEXTS[page.name]):
        target = (page.parent / file).read_text(encoding="utf-8") if file else TEXTS[page.name]
        titles = re.findall(r"^#+ (.*)$", target, flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert anchor in anchors, f"{page.name} points to #{anchor}; there are {sorted(anchors)}"


def test_every_page_and_picture_is_pointed_to() -> None:
    files = [*PAGES[1:], *(ROOT / "assets").iterdir()]
    missing = [file.name for file in files if f"{file.parent.name}/{file.name}" not in "".join(TEXTS.values())]
    assert not missing, f"no page points to {missing}"


@functools.cache
def usage(script: str) -> str:
    finished = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize(("script", "arguments"), COMMANDS, ids=lambda part: part or "alone")
def test_a_script_knows_the_arguments_of_a_command(script: str, arguments: str) -> None:
    own, _, handed_on = arguments.partition("-- ")
    for program, words in ((script, own.split()), ("nsa_gpt_training.py", handed_on.split())):
        for word in words:
            if word.startswith("--") or word == words[0] and re.fullmatch(r"[a-z]+", word):
                known = re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", usage(program))
                assert known, f"{program} --help does not have {word}"


def test_commands_are_found() -> None:
    scripts = {script for script, _ in COMMANDS}
    assert {"nsa_gpt_training.py", "tests/benchmarks/cpu.py", "tests/benchmarks/gpu.py"} <= scripts


def test_the_measured_speed_is_complete() -> None:
    results = json.loads((ROOT / "docs" / "speed.json").read_text(encoding="utf-8"))
    assert {"command", "date", "card", "torch", "triton", "measured", "curves"} <= results.keys()
    for curve in results["curves"]:
        assert {"heads", "kv_heads", "dim_head", "setting", "rows"} <= curve.keys()
        lengths = [row["tokens"] for row in curve["rows"]]
        assert lengths == sorted(set(lengths)) and all(row["nsa"] > 0 for row in curve["rows"])
