"""Whole-step estimation: estimators that need more than the values computed in a step.

They treat the run as a bilevel :class:`~selftune.problem.Problem`, with one point per step.
The driver supplies gradients at other weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selftune.estimators import AbstractEstimator
from selftune.problem import Hparams, Point, Problem

log = logging.getLogger("selftune")


class WholeSteps:
    """An estimator that observes a training run, with its memory.

    Args:
        estimator: Observes the steps.

    Attributes:
        memory: None before the first step and after ``forget``.
    """

    def __init__(self, estimator: AbstractEstimator) -> None:
        self.estimator = estimator
        self.memory: Any = None
        self._warned: set[str] = set()

    def observe(self, problem: Problem, point: Point, hparams: Hparams) -> None:
        """Observe the step from ``point``."""
        if self.memory is None:
            problem.products.prepare(point.params, hparams, point.batch)
            self.memory = self.estimator.init(problem, point, hparams)
        self.memory = self.estimator.observe(problem, self.memory, point, hparams)

    def estimate(
        self, problem: Problem, end: Point, hparams: Hparams, grads: Tensor
    ) -> Mapping[str, Tensor]:
        """Hypergradients at the end of the last step, along an outer gradient of length 1.

        The outer gradient at the averaged weights replaces that at the last iterate. Before any
        step the hypergradients are NaN, and no hyperparameter step is taken.
        """
        if self.memory is None:
            return {n: torch.full_like(h, torch.nan) for n, h in hparams.items()}
        length = grads.norm().clamp_min(torch.finfo(grads.dtype).tiny)
        solved, self.memory = self.estimator.solve(
            problem, self.memory, end, hparams, grads / length
        )
        solution = solved.solution
        if solution is not None and "solve" not in self._warned and bool(solution.diverged):
            self._warned.add("solve")
            log.warning(
                "the linear solve diverged; using its best iterate (relative residual %.2g): "
                "add damping, or use fewer terms", float(solution.residual),
            )  # fmt: skip
        fine = all(bool(torch.isfinite(g).all()) for g in solved.grads.values())
        if not fine and "finite" not in self._warned:
            self._warned.add("finite")
            log.warning("hypergradients are not finite, so the hyperparameters do not change: %s",
                        {n: g.tolist() for n, g in solved.grads.items()})  # fmt: skip
        return solved.grads

    def forget(self) -> None:
        """Reset the memory, after a rewind."""
        self.memory = None
