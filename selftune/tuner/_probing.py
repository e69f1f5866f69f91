"""The start-up probe on a run: one sweep of the learning rate, and a trial of what it chose."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from selftune._trees import leaves
from selftune.bilevel import Bilevel, Run
from selftune.probe import Probe
from selftune.tuner._good import Good

log = logging.getLogger("selftune")

COOL = math.log(3.0)
"""By how much the log of a rate falls that leads uphill."""


class Probing:
    """Takes a probe's steps, eagerly and in place.

    Args:
        bilevel: The steps.
        run: Their tensors.
        good: Gets the weights at the lowest sum of slopes.
        probe: The sweep.
        batch: Gives training batches.
        most: Steps that may be taken at most.
    """

    def __init__(
        self,
        bilevel: Bilevel,
        run: Run,
        good: Good,
        probe: Probe,
        batch: Callable[[], Any],
        most: int,
    ) -> None:
        self._bilevel, self._run, self._good = bilevel, run, good
        self._probe, self._batch, self._most = probe, batch, most
        self.taken = 0

    @torch.no_grad()
    def sweep(self) -> None:
        """Return to the best weights that the sweep saw, and set the rate it chose and β₁."""
        bilevel, run, probe = self._bilevel, self._run, self._probe
        earlier: list[Tensor] = []
        while True:
            before = self._weights()
            loss, grads, buffers = bilevel.gradient(run, self._batch())
            if probe.taken and probe.observe(_slope(grads, earlier, before)):
                for weight, value in zip(run.weights, before, strict=True):
                    weight.average.copy_(value)
                self._good.keep()
            if probe.ended:
                break
            self._write(bilevel.advance(run, loss, grads, buffers, rate=probe.factor(probe.taken)))
            earlier = before
            probe.taken += 1
        self._good.rewind()
        beta1 = float(bilevel.hyper.values(run.hyper.raw).get("beta1", 0.0))
        for name, raw in probe.moves(beta1, bilevel.hyper.horizon).items():
            self._move(name, raw)
        log.info("probe: %d steps, learning rate times %.3g", probe.taken, probe.choice)

    @torch.no_grad()
    def settle(self) -> None:
        """Take the first training steps; where they lead uphill, go back and lower the rate."""
        bilevel, run, probe = self._bilevel, self._run, self._probe
        last: tuple[list[Tensor], list[Tensor]] | None = None
        while probe.settling and self.taken < self._most:
            loss, grads, buffers = bilevel.gradient(run, self._batch())
            before, here = last, self._weights()
            last = list(grads), here
            if before is not None and probe.settle(
                _slope(before[0], before[1], here), _slope(grads, before[1], here)
            ):
                self._good.rewind()
                self._move("lr", -COOL)
                last = None
                log.info("the rate that the probe chose leads uphill: divided by 3")
                continue
            observe = (int(run.age) + 1) % bilevel.estimator.stride == 0
            self._write(bilevel.advance(run, loss, grads, buffers, observe=observe))

    def _weights(self) -> list[Tensor]:
        return [w.value.clone() for w in self._run.weights]

    def _write(self, after: Run) -> None:
        for old, new in zip(leaves(self._run), leaves(after), strict=True):
            if new is not old:
                old.copy_(new)
        self.taken += 1

    def _move(self, name: str, raw: float) -> None:
        hyper = self._run.hyper
        hyper.raw.copy_(self._bilevel.hyper.move(hyper, name, raw).raw)


def _slope(grads: Sequence[Tensor], there: Sequence[Tensor], here: Sequence[Tensor]) -> float:
    """Along the way from there to here."""
    ways = zip(grads, there, here, strict=True)
    return float(sum((g * (now - then)).sum().double() for g, then, now in ways))  # waits once
