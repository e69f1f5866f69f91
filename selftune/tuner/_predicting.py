"""Prediction of the validation loss at other hyperparameters, and pictures of it for the log."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from selftune._modes import random_states, restore_random_states
from selftune.monitor import pictures
from selftune.tuner._parts import Parts

AROUND = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64, device="cpu")
"""Raw distances from the current value at which the loss is predicted."""
MOST = 12
"""Maximum number of plotted hyperparameters: those with the largest changes."""
BATCHES = 10
"""Validation batches for each point."""


def predicted(training: Parts) -> list[str]:
    """Hyperparameters with a learned sensitivity."""
    return [] if training.fused.whole is None else list(training.steps.whole_step_names)


@torch.no_grad()
def predict(
    training: Parts, asked: Mapping[str, Sequence[float]], most: int | None = None
) -> NDArray[np.float64]:
    """The loss over the validation set at the averaged weights moved by ``J δ``."""
    if training.joined:
        raise RuntimeError(
            "predict needs validation data, and val=None has trained on it: pass fit(val=0.1)"
        )
    steps, whole, known = training.steps, training.fused.whole, predicted(training)
    if not 1 <= len(asked) <= 2:
        raise ValueError(f"predict({', '.join(asked)}): name one or two hyperparameters")
    for name, values in asked.items():
        if name not in known:
            raise ValueError(
                f"predict({name}=…): its sensitivity was not learned, only those of {known}: "
                "tune it with estimator=BestResponse(), or BestResponse(update=True) for the "
                "update's"
            )
        hparam = steps.hyper.hparams[name]
        if not all(hparam.lower <= v <= hparam.upper for v in values):
            raise ValueError(
                f"predict({name}={list(values)}): values must be between {hparam.lower:g} and "
                f"{hparam.upper:g}"
            )
    assert whole is not None
    run = training.fused.run
    present = dict(zip(steps.hyper.names, run.hyper.raw, strict=True))
    outputs = []
    for values in itertools.product(*asked.values()):
        move = {n: torch.zeros_like(present[n]) for n in known}
        for name, value in zip(asked, values, strict=True):
            scale = steps.hyper.hparams[name].bijection
            move[name] = scale.inverse(torch.full_like(present[name], value)) - present[name]
        shift = whole.shift(run, torch.stack([move[n] for n in known]))
        weights = [w + s for w, s in zip(run.averages, shift, strict=True)]
        point = weights, run.average_buffers
        outputs.append(training.scorer.score([point], training.val, 0, most)[0]["loss"])
    return np.asarray(outputs).reshape([len(v) for v in asked.values()])


def picture(training: Parts) -> None:
    """Log the predicted losses around each hyperparameter, and a map of two of them.

    The run's random states do not change, nor those of the validation loader's generators.
    """
    if training.watch.metrics.monitor.on:
        training.watch.digest(training.step)
        streams, own = random_states(), training.val.own()
        _draw(training)
        restore_random_states(streams)
        training.val.settle({"own": own})


def _draw(training: Parts) -> None:
    watch, step, learned = training.watch, training.step, predicted(training)
    known, courses = training.steps.hyper.hparams, watch.history.hparams
    raw = {
        n: torch.tensor(c, device="cpu") for n, c in watch.metrics.course.items() if n in learned
    }
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
