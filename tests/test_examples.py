"""What the examples print. Truth: the rows that an honest comparison needs."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent


def test_digits_compares_with_a_tuned_plain_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Momentum, cosine, best-on-validation; at the default rate, and the best of three."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["digits.py", "--quick", "--log-dir", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "digits.py"), run_name="__main__")
    printed = capsys.readouterr().out
    rows = {
        "plain": r"torch\.optim\.SGD, lr 0\.01, cosine +(\d\.\d+) ",
        "best": r"the best of three rates \([\d.]+\) +(\d\.\d+) ",
        "ours": r"selftune\.SGD from lr 0\.01 +(\d\.\d+) ",
    }
    found = {n: re.search(pattern, printed) for n, pattern in rows.items()}
    assert all(found.values()), printed
    losses = {n: float(match[1]) for n, match in found.items() if match}
    assert losses["best"] <= losses["plain"]
    assert re.search(r"test loss of the self-tuned run: \d+% (below|above) the best", printed)


@pytest.mark.slow
def test_structure_ends_smaller(tmp_path: Path) -> None:
    """Start and end of each size, on noise in the shape of the images; half is the budget."""
    noise, files = np.random.default_rng(0), {}
    for part, count in (("train", 1500), ("test", 200)):
        files[f"x_{part}"] = noise.integers(0, 256, (count, 28, 28), np.uint8)
        files[f"y_{part}"] = noise.integers(0, 10, count, np.int64)
    np.savez(tmp_path / "fashion_mnist.npz", **files)
    command = [sys.executable, str(ROOT / "examples" / "structure.py"), "--quick"]
    done = subprocess.run(
        [*command, "--data-dir", str(tmp_path), "--log-dir", str(tmp_path / "run")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    sizes = ("parameters", "multiply-adds", "batch size", "gates of 12")
    for name in (*sizes, "lr", "kernel", "optimizer"):
        assert re.search(rf"^{name} .* → +\S+$", done.stdout, re.MULTILINE), done.stdout
    for name in ("parameters", "multiply-adds"):
        start, end = re.search(rf"^{name} +([\d,]+) → +([\d,]+)", done.stdout, re.M).groups()  # type: ignore[union-attr]
        assert int(end.replace(",", "")) <= 0.5 * int(start.replace(",", ""))
    logged = EventAccumulator(str(tmp_path / "run")).Reload().Tags()["scalars"]
    assert {"hyper/lr", "structure/parameters", "structure/batch_size"} <= set(logged)
