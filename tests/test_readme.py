"""README and docs/: each code block runs alone, settings and commands are right, and links point to what is there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from native_sparse_attention import NSAConfig

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
    assert printed.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", block)


def test_code_blocks_are_found() -> None:
    assert len(BLOCKS) >= README.count("```python") >= 5
    for name, text in TEXTS.items():
        languages = set(re.findall(r"^ *```(\S*)", text, flags=re.MULTILINE))
        assert languages <= {"", "python", "sh", "bibtex"}, f"{name} has code blocks that no test runs: {languages}"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 300, "README is to be read at once; tables of measurements belong in docs/"


def test_the_table_of_the_configuration_has_every_field_and_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|.*?\| (.*?) \|", section("## Configuration"), flags=re.MULTILINE))
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


# Drawings -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    """tests/benchmarks/draw.py."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw", ROOT / "tests" / "benchmarks" / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_the_measured_speed_is_complete() -> None:
    results = json.loads((ROOT / "docs" / "speed.json").read_text(encoding="utf-8"))
    assert {"command", "date", "card", "torch", "triton", "measured", "curves"} <= results.keys()
    for curve in results["curves"]:
        assert {"heads", "kv_heads", "dim_head", "setting", "rows"} <= curve.keys()
        lengths = [row["tokens"] for row in curve["rows"]]
        assert lengths == sorted(set(lengths)) and all(row["nsa"] > 0 for row in curve["rows"])
