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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from torch.nn import functional as F

import selftune as st


def run(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16), strict=True))
    tuner = st.Tuner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, compile=False, **options)
    return tuner.fit(
        batches[:12], batches[12:], epochs=10, progress=False, log_dir=folder, log_every=10
    )


def train(face: str, steps: int, folder: Path, seed: int = 0) -> None:
    """A run of ``steps`` steps with a log, by ``"tuner"`` or by ``"optimizer"``."""
    torch.manual_seed(seed)
    x = torch.randn(512, 8)
    y = x[:, :3].square() + 0.3 * torch.randn(512, 3)
    batches = list(zip(x.split(32), y.split(32), strict=True))
    layers = (nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    model = nn.Sequential(*layers)
    if face == "tuner":
        tuner = st.Tuner(model, F.mse_loss, hparams={"lr": 1e-3}, compile=False)
        tuner.fit(batches[:12], batches[12:], steps=steps, log_dir=folder, progress=False).report()
        return
    opt = st.AdamW(model, lr=1e-3, total_steps=steps, log_dir=folder)
    for step in range(steps):
        x, y = batches[step % 12]
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.report(loss)
        held = batches[12 + step % 4]
        opt.hyper_step(lambda held=held: F.mse_loss(model(held[0]), held[1]))
    opt.finish()


def laid_out(folder: Path) -> layout_pb2.Layout:
    """The last layout of the custom scalars in a log."""
    events = EventAccumulator(str(folder)).Reload().Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(events[-1].tensor_proto.string_val[0])


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
