"""Runs on gloo ranks, which the tests of several processes share."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Dying, Outage, points
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import selftune as st

STEPS = 100
ROUNDING = dict(rtol=1e-7, atol=1e-9)  # of float64 sums in another order, over 100 steps


def loader(count: int, seed: int, **options: Any) -> DataLoader[Any]:
    x, y = points(count, seed)
    return DataLoader(TensorDataset(x.double(), y), shuffle=True, **options)


def net(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), *middle, nn.Tanh(), nn.Linear(16, 3)).double()


def train(
    model: nn.Module,
    folder: Path | None = None,
    *,
    size: int = 201,
    died: int | None = None,
    killed: bool = False,
    workers: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """100 steps on shuffled batches of 20, of which the last of an epoch holds one example."""
    torch.manual_seed(3)
    fit: dict[str, Any] = dict(steps=STEPS, evaluate_every=25, checkpoint_every=10, progress=False)
    fit |= {"resume": options.pop("resume", False), **options.pop("fit", {})}
    given = dict(hparams={"lr": 0.01, "weight_decay": 1e-3}, rule=st.rules.SGD(), compile=False)
    given["loss_fn"] = F.cross_entropy
    val = options.pop("val", loader(61, 1, batch_size=16))
    batches: Any = options.pop("batches", None)
    tuner = st.Tuner(model, **(given | options))
    batches = batches or loader(size, 0, batch_size=20, num_workers=workers)
    if died is not None:
        batches = Dying(batches, died)
    fit["callbacks"] = [lambda progress: killed and os.kill(os.getpid(), signal.SIGKILL)]
    rows: list[Any] = []
    fit["recorder"] = lambda values, step: rows.append(step)
    result = tuner.fit(batches, val, log_dir=folder, **fit)
    return {
        "hparams": {n: torch.as_tensor(v) for n, v in result.history.items()},
        "weights": result.best_weights,
        "loss": result.best_loss,
        "stream": torch.get_rng_state(),
        "rows": len(rows),
        "folder": result.folder,
    }


def cut(folder: Path, died: int = 47, **options: Any) -> None:
    """The first steps, of which a checkpoint holds a multiple of 10."""
    with pytest.raises(Outage):
        train(net(), folder, died=died, **options)


def launched(number: int, port: int) -> None:
    """The environment that torchrun would give a rank."""
    torch.set_num_threads(1)
    known = dict(RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.environ.update(known)


def refusal(case: Callable[[int], Any], number: int) -> str:
    try:
        case(number)
    except ValueError as error:
        return str(error)
    return "accepted"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def assert_close(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    for part in ("hparams", "weights"):
        torch.testing.assert_close(one[part], other[part], equal_nan=True, **tolerance)
    assert one["loss"] == pytest.approx(other["loss"], rel=max(tolerance.values()))
