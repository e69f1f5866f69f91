"""Estimators without curvature, whose sensitivities are elementwise."""

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
    """Keeps the sensitivity Jacobian J, one row for each hyperparameter, without curvature.

    A weight is then sensitive to its own hyperparameters only, so one row serves both a learning
    rate common to all weights and one for each layer. In training runs ``push`` replaces
    ``observe``, and uses only values already computed in the step.

    Attributes:
        stride: Steps between two tracked steps.
        discount: γ, the factor of the previous sensitivity in a step.
        closed_forms: Whether to use closed forms of sensitivities where they exist.
    """

    stride: int
    discount: float
    closed_forms: bool

    @abstractmethod
    def push(
        self, tangents: Tangents, transition: Transition, slopes: Mapping[str, Any]
    ) -> Tangents:
        """The sensitivities after a step. May overwrite ``tangents``: do not use it afterwards."""

    def init(self, problem: Problem, start: Point, hparams: Hparams) -> Tangent:
        """Zero sensitivities."""
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
        """Propagate through the step by differentiating the update; the stride is not used here."""
        problem.products.prepare(point.params, hparams, point.batch)
        mixed = problem.mixed(point, hparams)
        bend = lambda v, moving: mixed(moving)  # noqa: E731
        return pushed(problem, memory, point, hparams, bend, self.discount)

    def estimate(
        self, problem: Problem, memory: Tangent, end: Point, hparams: Hparams, outer_grads: Tensor
    ) -> Estimate:
        """``J ∘ ∇L_val``, summed over the weights that share a hyperparameter."""
        rows = iter(memory.params * outer_grads)
        inside = [n for n in hparams if n in problem.update.hparams]
        grads = {n: problem.gather(next(rows), hparams[n]) for n in inside}
        for n, h in hparams.items():
            if n not in grads:
                sums = [next(rows).sum() for _ in range(h.numel())]
                grads[n] = torch.stack(sums).reshape(h.shape)
        return Estimate({n: grads[n] for n in hparams})
