"""The start-up probe on a run: one sweep of the learning rate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selftune._trees import leaves
from selftune.bilevel import Bilevel, Run
from selftune.probe import Probe
from selftune.tuner._good import Good

log = logging.getLogger("selftune")


@torch.no_grad()
def sweep(bilevel: Bilevel, run: Run, good: Good, probe: Probe, batch: Callable[[], Any]) -> None:
    """Take the probe's steps, return to the best weights it saw, and set the rate it chose and β₁.

    Args:
        bilevel: Takes the steps, without tangents, eagerly.
        run: Changed in place.
        good: Gets the weights at the lowest sum of slopes.
        probe: The sweep.
        batch: Gives training batches.
    """
    earlier: list[Tensor] = []
    while True:
        before = [w.value.clone() for w in run.weights]
        loss, grads, buffers = bilevel.gradient(run, batch())
        if probe.taken:
            steps = zip(grads, before, earlier, strict=True)
            slope = sum(float((g * (now - old)).sum()) for g, now, old in steps)
            if probe.observe(slope):
                for weight, value in zip(run.weights, before, strict=True):
                    weight.average.copy_(value)
                good.keep()
        if probe.ended:
            break
        after = bilevel.advance(run, loss, grads, buffers, rate=probe.factor(probe.taken))
        for old, new in zip(leaves(run), leaves(after), strict=True):
            if new is not old:
                old.copy_(new)
        earlier = before
        probe.taken += 1
    good.rewind()
    hyper = bilevel.hyper
    beta1 = float(hyper.values(run.hyper.raw).get("beta1", 0.0))
    for name, raw in probe.moves(beta1, hyper.horizon).items():
        run.hyper.raw.copy_(hyper.move(run.hyper, name, raw).raw)
    log.info("probe: %d steps, learning rate times %.3g", probe.taken, probe.choice)
