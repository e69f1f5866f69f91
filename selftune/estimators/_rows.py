"""Estimators that drop the curvature: each weight responds for itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selftune.estimators._base import AbstractEstimator, Estimate
from selftune.estimators._directions import Tangent, basis, pushed, still
from selftune.problem import Hparams, Point, Problem
from selftune.update import Tangents, Transition


class AbstractRows(AbstractEstimator):
    """Keeps the response Jacobian J itself, one row a hyperparameter, without curvature.

    A weight then responds to its own hyperparameters only, so that one row serves a learning rate
    shared by all weights as well as one of each layer. The verb ``push`` does for training runs
    what ``observe`` does for a :class:`~selftune.Problem`, from what a step computed anyway.

    Attributes:
        stride: Steps from one that is observed to the next.
        discount: γ, what a step keeps of the response before it.
        closed_forms: Whether responses are taken from a closed form where they have one.
    """

    stride: int
    discount: float
    closed_forms: bool

    @abstractmethod
    def push(
        self, tangents: Tangents, transition: Transition, slopes: Mapping[str, Any]
    ) -> Tangents:
        """The response after a step. The tensors of ``tangents`` are reused: drop the old."""

    def init(self, problem: Problem, start: Point, hparams: Hparams) -> Tangent:
        """No response yet."""
        return still(start, self._moving(problem, hparams))

    @staticmethod
    def _moving(problem: Problem, hparams: Hparams) -> dict[str, Tensor]:
        """A direction for each of the update's hyperparameters, and for each entry of others."""
        outside = {n: h for n, h in hparams.items() if n not in problem.update.hparams}
        inside = {n: h for n, h in hparams.items() if n in problem.update.hparams}
        count = len(inside) + sum(h.numel() for h in outside.values())
        moving = {n: h.new_zeros((count, *h.shape)) for n, h in hparams.items()}
        for i, n in enumerate(inside):
            moving[n][i] = 1.0
        for n, part in (basis(outside) if outside else {}).items():
            moving[n][len(inside) :] = part
        return moving

    def observe(self, problem: Problem, memory: Tangent, point: Point, hparams: Hparams) -> Tangent:
        """Push through the step by differentiating the update; the stride does not count here."""
        problem.products.prepare(point.params, hparams, point.batch)
        mixed = problem.mixed(point, hparams)
        bend = lambda v, moving: mixed(moving)  # noqa: E731
        return pushed(problem, memory, point, hparams, bend, self.discount)

    def estimate(
        self, problem: Problem, memory: Tangent, end: Point, hparams: Hparams, outer_grads: Tensor
    ) -> Estimate:
        """``J ∘ ∇L_val``, summed over what shares a hyperparameter."""
        rows = iter(memory.params * outer_grads)
        inside = [n for n in hparams if n in problem.update.hparams]
        found = {n: problem.gather(n, next(rows), hparams[n]) for n in inside}
        for n, h in hparams.items():
            if n not in found:
                sums = [next(rows).sum() for _ in range(h.numel())]
                found[n] = torch.stack(sums).reshape(h.shape)
        return Estimate({n: found[n] for n in hparams})
