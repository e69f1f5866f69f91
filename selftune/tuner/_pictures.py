"""Pictures of a run for the log: what it predicts around where its hyperparameters are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from selftune.monitor import pictures
from selftune.tuner._predicting import predict

if TYPE_CHECKING:
    from selftune.tuner._training import Training

AROUND = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
"""Raw distances from the present value at which the loss is predicted."""
MOST = 12
"""Hyperparameters that are drawn: those that moved most."""
BATCHES = 10
"""Validation batches a point is judged by."""


def picture(training: Training) -> None:
    """Write the predicted losses around each followed hyperparameter, and a map of two of them."""
    watch, known = training.watch, training.bilevel.hyper.hparams
    if training.fused.followed is None:
        return
    courses = watch.history.hparams
    raw = {n: r for n, r in watch.telling.raw().items() if n in training.bilevel.followed}
    names = sorted(raw, key=lambda n: -float(raw[n].max() - raw[n].min()))[:MOST]
    if not names:
        return
    around, now = {}, {n: courses[n][-1] for n in names}
    for name in names:
        hparam = known[name]
        near = hparam.bijection.forward(raw[name][-1] + AROUND)
        around[name] = sorted(set(near.clamp(hparam.lower, hparam.upper).tolist()))
    found = {n: (around[n], predict(training, {n: around[n]}, BATCHES).tolist()) for n in names}
    watch.telling.monitor.figure("what-if/each", pictures.curves(found, now), training.step)
    if len(names) > 1:
        one, other = names[:2]
        losses = predict(training, {one: around[one], other: around[other]}, BATCHES)
        drawn = pictures.plane(
            (one, other), (around[one], around[other]), losses, (courses[one], courses[other])
        )
        watch.telling.monitor.figure(f"what-if/{one} and {other}", drawn, training.step)
