"""README and docs: their code runs, their length is bounded. Truth: execution, and a word count."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


LONG = ("recipes.md", "inspect.md", "structure.md", "selection.md", "from-keras.md")
"""Pages whose code takes seconds."""


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] if p.name in LONG else []) for p in PAGES],
    ids=lambda p: p.name,
)  # fmt: skip
def test_python_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    space: dict[str, object] = {}
    for block in blocks:
        if page.name == "recipes.md":  # each block is a script of its own
            space = {}
        exec(compile(block, str(page), "exec"), space)


def words(*pages: Path) -> int:
    """Words as ``wc -w`` counts them."""
    return sum(len(page.read_text().split()) for page in pages)


def test_the_readme_is_short() -> None:
    assert words(ROOT / "README.md") <= 900


def test_first_pages_are_short() -> None:
    """Until the one-line change and the commands a new user reads the README and the home page."""
    assert words(ROOT / "README.md", ROOT / "docs" / "index.md") <= 1500


def test_every_module_is_in_the_reference() -> None:
    """A missing docs entry fails: each public module is named by reference.md."""
    reference = (ROOT / "docs" / "reference.md").read_text()
    for path in (ROOT / "selftune").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if any(part.startswith("_") for part in parts):
            continue
        name = ".".join(parts[:2])
        assert name in reference, f"docs/reference.md does not mention {name}"
