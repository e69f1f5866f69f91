"""The validation loss and its gradients at other weights, without a trace in the model."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selftune.control.final_weights import BACK, between
from selftune.optim._block import Block
from selftune.optim._checks import check_dependence, check_outer_loss
from selftune.optim._engine import Engine
from selftune.optim._reducer import is_sharded

log = logging.getLogger("selftune")

Closure = Callable[[], Tensor]
RARER = 200
"""Steps of the run for every batch of which slopes are taken at its end, at each place."""


class Weights(NamedTuple):
    """Weights at which the validation loss can be taken.

    Attributes:
        weights: Of every block.
        statistics: Of normalisation layers; passes in training mode write into them.
    """

    weights: Sequence[Tensor]
    statistics: Sequence[Tensor]


@dataclass(frozen=True)
class OuterLoss:
    """Calls the user's closure with other weights in place.

    Args:
        engine: Holds the weights and the statistics of BatchNorm.
    """

    engine: Engine

    @property
    def average(self) -> Weights:
        """The averaged weights."""
        return Weights([b.part.average for b in self.engine.blocks], self.engine.buffers.average)

    @property
    def good(self) -> Weights:
        """The last good weights."""
        return Weights([b.good for b in self.engine.blocks], self.engine.buffers.good)

    @property
    def start(self) -> Weights:
        """Where the run began, until the sweep is proven; the statistics are looked for yet."""
        unproven = self.engine.controller.unproven
        kept = [b.candidate if unproven else b.good for b in self.engine.blocks]
        return Weights(kept, self.engine.buffers.average)

    def at(self, place: float) -> Weights:
        """Copies between the good weights (−1), the average (0) and those in place (1)."""
        weights = [
            between(b.part.average, b.good if place < 0 else b.weights(), abs(place))
            for b in self.engine.blocks
        ]
        return Weights(weights, self.engine.buffers.at(place))

    @contextmanager
    def showing(self, point: Weights) -> Iterator[None]:
        """Other weights and statistics in place, for a while."""
        blocks, buffers = self.engine.blocks, self.engine.buffers
        outermost = not buffers.shown
        with torch.no_grad():
            kept = [b.weights() for b in blocks]
            for block, flat in zip(blocks, point.weights, strict=True):
                block.layout.write(flat, block.params)
            if outermost:
                buffers.exchange(point.statistics)
        try:
            yield
        finally:
            with torch.no_grad():
                for block, flat in zip(blocks, kept, strict=True):
                    block.layout.write(flat, block.params)
                if outermost:
                    buffers.exchange(point.statistics)

    def gradients(self, closure: Closure, point: Weights) -> tuple[Tensor, list[Tensor]]:
        """The loss and its joined gradients."""
        with self.showing(point), self.engine.buffers.apart(), torch.enable_grad():
            loss = _asked(closure)
            check_outer_loss(loss)
            return loss.detach(), outer_gradients(loss, self.engine.blocks)

    def random(self) -> AbstractContextManager[None]:
        """Leaves the random streams alone."""
        device = self.engine.blocks[0].layout.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def value(self, closure: Closure) -> Tensor:
        """The loss at the weights in place; it leaves statistics and random streams alone."""
        with self.random():
            return self._value(closure)

    def _value(self, closure: Closure) -> Tensor:
        with torch.enable_grad(), self.engine.buffers.kept():
            return _asked(closure).detach()

    def check_finite(self, closure: Closure) -> None:
        """Tell a closure that is never finite from weights that have blown up."""
        good, _ = self.gradients(closure, self.at(-1.0))
        if not bool(torch.isfinite(self.engine.reducer.mean(good))):
            raise ValueError(
                f"closure returned {float(good)} at the last good weights too; check the "
                "validation batch and loss for overflow, log(0) or missing values"
            )

    @property
    def end(self) -> Weights:
        """The final weights of the run, if it ended now."""
        guard = self.engine.controller.guard
        lost = guard is not None and guard.lost and not self.engine.clock.last_validation_step
        if self.engine.controller.sweeping or lost:  # a sweep is no run to average
            return self.good
        position = self.engine.controller.final.position
        return self.average if position == 0 else self.at(position)

    def judge_end(self, closure: Closure) -> None:
        """Find the final weights of the run."""
        engine = self.engine
        final, step = engine.controller.final, engine.clock.steps
        if engine.controller.guard is None:
            final.judge(step, self._slopes(closure, (0.0, 1.0))[:, 1])
        else:
            slopes = self._slopes(closure, (*BACK, 1.0))
            final.judge(step, slopes[-2:, 1], slopes[:-1, 0])
        engine.monitor.scalar("final/position", final.position, step)
        log.info("final weights: %s", final)

    def compared(self, closure: Closure) -> tuple[float, float, float]:
        """Mean losses at averaged and at good weights, and the standard error of their difference.

        They are of batches enough to tell a loss that has worsened.
        """
        guard = self.engine.controller.guard
        assert guard is not None
        count = guard.policy.batches(self.engine.shifts.horizon)
        points = self.average, self.good
        found: list[list[float]] = [[] for _ in points]
        with self.random():  # around all of them: a closure may draw its batches at random
            for _ in range(count):  # in turns: batches differ
                for point, losses in zip(points, found, strict=True):
                    with self.showing(point):
                        losses.append(float(self.engine.reducer.mean(self._value(closure))))
        now, then = map(statistics.fmean, found)
        if not (math.isfinite(now) and math.isfinite(then)):
            return now, then, math.nan
        return now, then, math.sqrt(sum(map(statistics.variance, found)) / count)

    def _slopes(self, closure: Closure, places: Sequence[float]) -> Tensor:
        """At some places, on the ways from good to averaged weights and on to those in place.

        Returns:
            Shape (places, 2, batches), float64.
        """
        blocks = self.engine.blocks
        ways = (
            [b.part.average - b.good for b in blocks],
            [b.weights() - b.part.average for b in blocks],
        )
        found = []
        with self.random():
            for _ in range(max(2, self.engine.shifts.horizon // RARER)):
                for place in places:  # copies: passes leave no trace in statistics
                    grads = self.gradients(closure, self.at(place))[1]
                    along = [[g @ w for g, w in zip(grads, way, strict=True)] for way in ways]
                    found.append(torch.stack([torch.stack(a).sum() for a in along]))
        slopes = self.engine.reducer.outer(torch.stack(found)).to("cpu", torch.float64)
        return slopes.view(-1, len(places), 2).movedim(0, -1)


def _asked(closure: Closure) -> Tensor:
    try:
        return closure()
    except StopIteration as error:
        raise RuntimeError(
            "closure ran out of validation batches (StopIteration): draw them from a stream "
            "without an end, such as itertools.cycle(batches), or begin its loader anew"
        ) from error


def outer_gradients(loss: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
    """The joined gradients of every block, zeros where the loss does not depend on a parameter.

    Raises:
        ValueError: The loss depends on none of them.
    """
    grads = _gradients(loss, [p for b in blocks for p in b.params])
    check_dependence(list(grads.values()))
    return [
        b.layout.flatten(
            [torch.zeros_like(p) if (g := grads.get(p)) is None else g for p in b.params]
        )
        for b in blocks
    ]


def _gradients(loss: Tensor, params: Sequence[Tensor]) -> dict[Tensor, Tensor | None]:
    """Gradients of a loss that leave ``.grad`` as it was.

    Sharded parameters get theirs only through ``backward``, whose hooks reduce them.
    """
    leaves = [p for p in params if p.requires_grad]
    if not any(is_sharded(p) for p in leaves):
        try:
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError(
                "closure returned a loss whose graph is gone: return it without calling "
                "backward, hyper_step takes its gradient"
            ) from error
        return dict(zip(leaves, found, strict=True))
    kept = [p.grad for p in leaves]
    for param in leaves:
        param.grad = None
    try:
        loss.backward()
        return {p: p.grad for p in leaves}
    finally:
        for param, grad in zip(leaves, kept, strict=True):
            param.grad = grad
