"""A checkpoint of two ranks continues in one process. Truth: the run that stays on two ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tasks import needs
from two_ranks import RUNS


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n.split()[0])) for n in RUNS])
def test_goes_on_with_another_number_of_ranks(name: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_ranks.py")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script), name, port, str(tmp_path)]
    done = subprocess.run(command, timeout=300, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    want, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert want["hparams"] == other["hparams"]
    found = RUNS[name](tmp_path, 1)
    assert found["hparams"] == pytest.approx(want["hparams"], rel=1e-4)
    for key, weight in found["weights"].items():
        assert torch.allclose(weight, want["weights"][key], atol=1e-4), key
