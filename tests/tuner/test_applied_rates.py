"""The curve of the applied rate. Truth: peaks and α of the last entry, and the schedule by hand."""

from __future__ import annotations

import pytest
import torch
from jobs import loader, points, tuner

from selftune.monitor import InMemory

STEPS = 120


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_applied_rate_is_that_of_the_weight_step(schedule: str) -> None:
    recorder = InMemory()
    tuner(
        tune=("lr", "decay"), schedule=schedule, every=5, probe=False, guard=False, compile=False
    ).fit(
        loader(), [points(100, seed=1)], steps=STEPS, log_every=5, recorder=recorder,
        progress=False,
    )  # fmt: skip
    steps, rates = recorder.curve("lr/applied")
    assert len(steps) == STEPS // 5
    curves = (recorder.curve(f"hyper/{name}") for name in ("lr", "decay"))
    peaks, decays = (dict(zip(*curve, strict=True)) for curve in curves)
    for step, rate in zip(steps[1:], rates[1:], strict=True):
        factor = 1 - (step - 1) / STEPS if schedule == "linear" else 1.0
        before = step - 5  # the last hyperparameter step
        expected = peaks[before] * factor / (1 + decays[before] * (step - 1))
        assert rate == pytest.approx(expected, rel=1e-5)
    assert torch.tensor(rates).isfinite().all()
