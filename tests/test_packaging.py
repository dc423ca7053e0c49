"""The distributions that pyproject.toml describes: what they hold, what they say of themselves, and that they work."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import native_sparse_attention

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from hatchling import build; print(getattr(build, 'build_' + sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, out: Path) -> Path:
    """Path of the sdist or wheel that the build backend makes of a source tree."""
    pytest.importorskip("hatchling")
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    finished = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return out / finished.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"native_sparse_attention-{native_sparse_attention.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from the sdist alone."""
    return zipfile.ZipFile(build("wheel", sdist, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    assert [name for name in wheel.namelist() if ".dist-info/" not in name] == ["native_sparse_attention.py"]
    assert wheel.read("native_sparse_attention.py") == (ROOT / "native_sparse_attention.py").read_bytes()


def test_the_wheel_says_what_it_is_and_needs(metadata: Message) -> None:
    expected = dict(Name="native-sparse-attention", Version=native_sparse_attention.__version__)
    expected |= {"License-Expression": "MIT", "Description-Content-Type": "text/markdown", "Requires-Python": ">=3.10"}
    assert {field: metadata[field] for field in expected} == expected
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [re.split(r"[<>=!~; ]", need)[0] for need in sorted(needs)] == ["einops", "torch"]
    assert not any("<" in need or "==" in need for need in needs), f"a newer release would be downgraded: {needs}"
    for field in ("Summary", "Keywords", "Classifier", "Project-URL", "License-File"):
        assert metadata[field], f"the metadata has no {field}"


def test_no_requirement_holds_a_newer_release_back() -> None:
    needs = (ROOT / "requirements.txt").read_text().splitlines()
    assert "torch" in {re.split(r"[<>=]", need)[0] for need in needs}
    assert not [need for need in needs if re.search(r"<|==\d|~=", need)]


def test_the_description_is_understood_without_its_pictures() -> None:
    """A package index shows a picture's words in place of it, as the address is relative to the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<img" not in text, "an index does not show HTML"
    words = re.findall(r"!\[([^]]*)\]", text)
    assert words and all(len(each.split()) >= 8 for each in words), f"each picture is described in words: {words}"


def test_the_sdist_holds_the_repository(sdist: Path) -> None:
    packed = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    for folder in ("tests", "docs", "assets"):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".png", ".svg", ".json")]
        missing = sorted({path.relative_to(ROOT).as_posix() for path in files} - packed)
        assert files and not missing, f"the sdist lacks {missing}"
    top = {name for name in packed if "/" not in name}
    texts = {"README.md", "CHANGELOG.md", "LICENSE", "requirements.txt", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert top == texts | {"native_sparse_attention.py", "nsa_gpt_training.py"}


@pytest.mark.slow
def test_the_tests_in_the_sdist_collect(sdist: Path) -> None:
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    finished = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=sdist, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-2000:]
    missing = [file.name for file in ROOT.glob("tests/test_*.py") if f"tests/{file.name}" not in finished.stdout]
    assert not missing, f"not collected: {missing}"
