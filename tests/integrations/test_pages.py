"""The pages' scripts run as printed. Truth: execution without an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tasks import needs

PAGES = Path(__file__).parents[2] / "docs" / "integrations"
NAMES = ("lightning", "transformers", "accelerate", "skorch", "ignite", "adapters")


@pytest.mark.filterwarnings("ignore::UserWarning")  # advice of the frameworks for real runs
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs("integrations" if n == "adapters" else n)) for n in NAMES]
)
def test_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGES / f"{name}.md"
    space: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
        exec(compile(block, str(page), "exec"), space)
