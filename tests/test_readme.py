"""README: its code runs as written, what it says of the configuration is so, and what it points to is there."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from pathlib import Path

from native_sparse_attention import NSAConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run_block(block: str, namespace: dict[str, object]) -> None:
    """Runs it in the namespace; it must print what its comments say."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), namespace)
    promised = re.findall(r"print\(.*\)  # (.*)", block)
    assert printed.getvalue().split("\n")[:-1] == promised, f"prints something else than promised:\n{block}"


def test_code_blocks_run_one_after_another_and_print_what_their_comments_say() -> None:
    assert len(BLOCKS) >= 5, "README's code blocks were not found"
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in BLOCKS:
        run_block(block, namespace)


def test_every_field_of_the_configuration_is_in_the_table() -> None:
    table = README[README.index("## Configuration") : README.index("### Choosing settings")]
    missing = [each.name for each in dataclasses.fields(NSAConfig) if f"`{each.name}`" not in table]
    assert not missing, f"README's configuration table lacks {missing}"


def test_the_settings_by_length_construct() -> None:
    rows = re.findall(r"^\| (?:short|medium|long),.*?\| (\d+) \| (\d+) \| (\d+) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 3, f"expected three recommended settings, found {rows}"
    for window, block, topk in rows:
        NSAConfig(local_window=int(window), block_size=int(block), topk_blocks=int(topk))


def test_files_that_it_points_to_exist() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README) + re.findall(r"python (\S+\.py)", README)
    assert targets, "README points to no file"
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing, f"README points to {missing}"
