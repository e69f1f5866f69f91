"""The validation loss and its gradients at other weights, without a trace in the model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from selftune.optim._block import Block
from selftune.optim._checks import check_dependence, check_outer_loss
from selftune.optim._engine import Engine
from selftune.optim._ranks import is_sharded

Closure = Callable[[], Tensor]
FEWEST, SHARE = 8, 50
"""Validation batches by which the end of a run is compared with its last good weights: one for
every fifty steps, whose passes at both points are about a hundredth of the run."""
ENOUGH = 50
"""Batches that are enough to tell a loss that has worsened from a few unlucky ones."""


@dataclass(frozen=True)
class OuterLoss:
    """Calls the user's closure with other weights in place.

    Args:
        engine: Holds the weights and the statistics of BatchNorm.
    """

    engine: Engine

    @contextmanager
    def showing(self, weights: Sequence[Tensor], good: bool = False) -> Iterator[None]:
        """Weights of every block, with the averaged or the good statistics, for a while."""
        blocks, buffers = self.engine.blocks, self.engine.buffers
        outermost = not buffers.shown
        with torch.no_grad():
            kept = [b.weights() for b in blocks]
            for block, flat in zip(blocks, weights, strict=True):
                block.layout.write(flat, block.params)
            if outermost:
                buffers.exchange(good)
        try:
            yield
        finally:
            with torch.no_grad():
                for block, flat in zip(blocks, kept, strict=True):
                    block.layout.write(flat, block.params)
                if outermost:
                    buffers.exchange(good)

    def gradients(self, closure: Closure, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss and its joined gradients."""
        with self.showing(weights), torch.enable_grad():
            loss = closure()
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
        tensors = self.engine.buffers.tensors()
        kept = [t.clone() for t in tensors]
        with torch.enable_grad():
            loss = closure().detach()
        for tensor, old in zip(tensors, kept, strict=True):
            tensor.copy_(old)
        return loss

    def check_finite(self, closure: Closure) -> None:
        """Tell a closure that is never finite from weights that have blown up."""
        good, _ = self.gradients(closure, [b.good for b in self.engine.blocks])
        if not bool(torch.isfinite(self.engine.ranks.mean(good))):
            raise ValueError(
                f"closure returned {float(good)} at the last good weights too; check the "
                "validation batch and loss for overflow, log(0) or missing values"
            )

    def compared(self, closure: Closure) -> tuple[float, float, float]:
        """Mean losses at averaged and at last good weights, and their difference's error."""
        return _judged(self._losses(closure, min(ENOUGH, self._many())))

    def good_is_better(self, closure: Closure) -> bool:
        """Whether the last good weights beat the averaged ones, by more than the batches' noise."""
        now, then, error = _judged(self._losses(closure, self._many()))
        if not (math.isfinite(now) and math.isfinite(then)):
            return math.isfinite(then)
        return then < now - error

    def _many(self) -> int:
        return max(FEWEST, self.engine.tuning.horizon // SHARE)

    def _losses(self, closure: Closure, count: int) -> tuple[list[float], list[float]]:
        """Losses at the averaged and at the last good weights, of so many batches each."""
        found: dict[bool, list[float]] = {False: [], True: []}
        with self.random():  # around all of them: a closure may draw its batches at random
            for _ in range(count):  # in turns: batches differ
                for good, losses in found.items():
                    weights = [b.good if good else b.average for b in self.engine.blocks]
                    with self.showing(weights, good):
                        losses.append(float(self.engine.ranks.mean(self._value(closure))))
        return found[False], found[True]


def _judged(losses: tuple[list[float], list[float]]) -> tuple[float, float, float]:
    """Two means, and the standard error of their difference."""
    now, then = map(statistics.fmean, losses)
    if not (math.isfinite(now) and math.isfinite(then)):
        return now, then, math.nan
    return now, then, math.sqrt(sum(map(statistics.variance, losses)) / len(losses[0]))


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
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
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
