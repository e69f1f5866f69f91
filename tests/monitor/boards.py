"""TensorBoard servers for tests."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import selftune as st


def run(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16), strict=True))
    tuner = st.Tuner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, compile=False, **options)
    return tuner.fit(
        batches[:12], batches[12:], epochs=10, progress=False, log_dir=folder, log_every=10
    )


def get(address: str, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"{address}/data/plugin/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@contextmanager
def serving(folder: Path, told: Path, runs: int) -> Iterator[str]:
    """The address of a server over a folder, once it lists its runs."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
    until = time.monotonic() + 60
    with told.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        found = None
        while found is None and time.monotonic() < until:
            time.sleep(0.2)
            found = re.search(r"http://\S+", told.read_text())
        assert found is not None, told.read_text()
        address = found[0].rstrip("/")
        while len(get(address, "scalars/tags")) < runs and time.monotonic() < until:
            time.sleep(0.5)
        yield address
    finally:
        process.kill()
        process.wait()
