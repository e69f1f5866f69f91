"""An estimator along a training run."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from selftune.estimators._base import AbstractEstimator, Estimate
from selftune.problem import Hparams, Point, Problem

log = logging.getLogger("selftune")


class Follower:
    """Keeps what an estimator remembers of a run, and warns once of solves that diverge.

    Args:
        estimator: Follows the run.

    Attributes:
        memory: What it remembers; None before the first step and after ``forget``.
    """

    def __init__(self, estimator: AbstractEstimator) -> None:
        self.estimator = estimator
        self.memory: Any = None
        self._warned = False

    def observe(self, problem: Problem, point: Point, hparams: Hparams) -> None:
        """Take note of the step from ``point``."""
        if self.memory is None:
            problem.products.prepare(point.params, hparams, point.batch)
            self.memory = self.estimator.init(problem, point, hparams)
        self.memory = self.estimator.observe(problem, self.memory, point, hparams)

    def solve(self, problem: Problem, end: Point, hparams: Hparams, grads: Tensor) -> Estimate:
        """Hypergradients for outer gradients at the end of the last step."""
        found, self.memory = self.estimator.solve(problem, self.memory, end, hparams, grads)
        if found.solution is not None and not self._warned and bool(found.solution.diverged):
            self._warned = True
            log.warning(
                "the linear solve diverged and its best iterate is used, with a relative residual "
                "of %.2g: add damping, or take fewer terms", float(found.solution.residual),
            )  # fmt: skip
        return found

    def forget(self) -> None:
        """Begin anew: the run has gone elsewhere."""
        self.memory = None
