"""Pictures of predicted losses around the current hyperparameters, for the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from selftune.monitor import pictures
from selftune.tuner._predicting import predict, predicted
from selftune.tuner._randomness import restore, snapshot

if TYPE_CHECKING:
    from selftune.tuner._training import Training

AROUND = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
"""Raw distances from the current value at which the loss is predicted."""
MOST = 12
"""Maximum number of plotted hyperparameters: those with the largest changes."""
BATCHES = 10
"""Validation batches for each point."""


def picture(training: Training) -> None:
    """Log the predicted losses around each hyperparameter, and a map of two of them.

    The run's random states do not change, nor those of the validation loader's generators.
    """
    if training.watch.metrics.monitor.on:
        training.watch.digest(training.step)
        streams, own = snapshot(), training.val.own()
        _draw(training)
        restore(streams)
        training.val.settle({"own": own})


def _draw(training: Training) -> None:
    watch, step, learned = training.watch, training.step, predicted(training)
    known, courses = training.steps.hyper.hparams, watch.history.hparams
    raw = {n: torch.tensor(c) for n, c in watch.metrics.course.items() if n in learned}
    names = sorted(raw, key=lambda n: -float(raw[n].max() - raw[n].min()))[:MOST]
    if not names:
        return
    around = {}
    for name in names:
        hparam = known[name]
        near = hparam.bijection.forward(raw[name][-1] + AROUND)
        around[name] = sorted(set(near.clamp(hparam.lower, hparam.upper).tolist()))
    monitor = watch.metrics.monitor
    for name in names:
        losses = predict(training, {name: around[name]}, BATCHES).tolist()
        drawn = pictures.curve(name, around[name], losses, courses[name][-1])
        monitor.figure(f"what-if/{name}", drawn, step)
    if len(names) > 1:
        one, other = sorted(names[:2])  # the same picture, whichever moved more
        plane = predict(training, {one: around[one], other: around[other]}, BATCHES)
        drawn = pictures.plane(
            (one, other), (around[one], around[other]), plane, (courses[one], courses[other])
        )
        monitor.figure(f"what-if/{one} and {other}", drawn, step)
