"""The guard protects a run whose units are closed as it does any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

STEPS, BROKEN, EVERY = 600, 200, 40
FACES = {"AdamW": st.AdamW, "SGD": st.SGD}


def batches(steps: int, *, broken: bool) -> list[tuple[Tensor, Tensor]]:
    """Two classes, whose labels may become random in the middle of the run."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, 64, 8, generator=generator)
    y = (x[..., 0] + x[..., 1] ** 2 > 0.5).long()
    if broken:
        y[BROKEN:] = torch.randint(2, y[BROKEN:].shape, generator=generator)
    return list(zip(x, y, strict=True))


def make() -> tuple[nn.Sequential, st.structure.Gate]:
    torch.manual_seed(0)
    gate = st.structure.Gate(16)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), gate, nn.Linear(16, 2)), gate


def close(gate: st.structure.Gate, step: int) -> bool:
    """Close one unit every few steps, as a goal does; whether one was closed."""
    due = step >= BROKEN and step % EVERY == 0
    if due:
        with torch.no_grad():
            gate.mask[(step - BROKEN) // EVERY] = 0.0
    return due


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("name", FACES)
def test_weights_that_get_worse_beside_closings_are_taken_back(
    name: str, closes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Truth: the same run without a closing, whose guard rewinds."""
    net, gate = make()
    opt = FACES[name](net, lr=0.01, tune=("lr",), total_steps=STEPS)
    good = iter(batches(STEPS, broken=False))
    for step, (x, y) in enumerate(batches(STEPS, broken=True)):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
        v, w = next(good)
        opt.hyper_step(lambda v=v, w=w: F.cross_entropy(net(v), w))
        if closes and close(gate, step):
            opt.sync(weights=False)
    assert "back to the last good weights" in caplog.text


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("name", FACES)
def test_weights_that_get_worse_beside_closings_are_taken_back_by_the_tuner(
    name: str, closes: bool
) -> None:
    """Truth: the same run without a closing, whose guard rewinds."""
    net, gate = make()

    def callback(progress: Any) -> None:
        if closes:
            close(gate, progress.step)

    tuner = st.Tuner(
        net, F.cross_entropy, rule=getattr(st.rules, name)(), hparams={"lr": 0.01}, tune=["lr"]
    )  # fmt: skip
    result = tuner.fit(
        batches(STEPS, broken=True), batches(STEPS, broken=False), steps=STEPS, progress=False,
        evaluate_every=EVERY, callbacks=[callback],
    )  # fmt: skip
    assert len(result.history["rewinds"])
    assert int(gate.mask.sum()) == (5 if closes else 16)  # a rewind does not open units
