"""What the examples print. Truth: the rows that an honest comparison needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_digits_compares_with_a_tuned_plain_run(tmp_path: Path) -> None:
    """Momentum, cosine, best-on-validation; at the default rate, and the best of three."""
    pytest.importorskip("sklearn")
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--quick"]
    done = subprocess.run(
        [*command, "--log-dir", str(tmp_path)], capture_output=True, text=True, check=True
    )
    rows = {
        "plain": r"torch\.optim\.SGD, lr 0\.01, cosine +(\d\.\d+) ",
        "best": r"the best of three rates \([\d.]+\) +(\d\.\d+) ",
        "ours": r"selftune\.SGD from lr 0\.01 +(\d\.\d+) ",
    }
    found = {n: re.search(pattern, done.stdout) for n, pattern in rows.items()}
    assert all(found.values()), done.stdout
    losses = {n: float(match[1]) for n, match in found.items() if match}
    assert losses["best"] <= losses["plain"]
    assert re.search(r"test loss of the self-tuned run: \d+% (below|above) the best", done.stdout)
