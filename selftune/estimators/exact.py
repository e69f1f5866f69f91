"""Reference estimators for short runs: reverse mode through every step, finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selftune._arguments import Number, check
from selftune.estimators._base import AbstractEstimator, Estimate
from selftune.problem import Hparams, Point, Problem
from selftune.update import Update

Run = tuple[Point, ...]


class AbstractReference(AbstractEstimator):
    """Keeps the start and all batches, and repeats the run."""

    def check(self, update: Update, names: Sequence[str], *, endless: bool = False) -> None:
        """Refuse training runs, all steps of which it would repeat at each estimate."""
        if endless:
            raise ValueError(
                f"estimator={self} is a reference for short runs of selftune.hypergradient: pass "
                "Forward() or Unrolled(horizon) in training runs"
            )

    def init(self, problem: Problem, start: Point, hparams: Hparams) -> Run:
        """No steps yet."""
        return ()

    def observe(self, problem: Problem, memory: Run, point: Point, hparams: Hparams) -> Run:
        """Record one more step."""
        return (*memory, point)

    @staticmethod
    def end(problem: Problem, memory: Run, hparams: Hparams) -> Tensor:
        """The weights after all recorded steps, as a function of the hyperparameters."""
        state = problem.start(memory[0].params, hparams).state
        point = memory[0]._replace(state=state, grads=None)
        for step, at in enumerate(memory):
            after = memory[step + 1].batch if step + 1 < len(memory) else None
            point = problem.step(point._replace(batch=at.batch), hparams, after)
        return point.params


@dataclass(frozen=True)
class Exact(AbstractReference):
    """``dL_val(w_T(h))/dh`` by autograd through all T steps: the reference for other estimators.

    Memory grows with T; meant for short runs and tests.

    Raises:
        RuntimeError: An operation of the training loss has no correct second derivative.

    Source: Maclaurin et al. 2015; Franceschi et al. 2017, section 3.1.
    """

    def estimate(
        self, problem: Problem, memory: Run, end: Point, hparams: Hparams, outer_grads: Tensor
    ) -> Estimate:
        """Reverse mode."""
        problem.products.check_double_backward(memory[0].params, hparams, memory[0].batch)

        def reached(hparams: Hparams) -> Tensor:
            return self.end(problem, memory, hparams) @ outer_grads

        return Estimate(torch.func.grad(reached)(dict(hparams)))


@dataclass(frozen=True)
class FiniteDifference(AbstractReference):
    """``∇L_val · (w_T(h + ε) − w_T(h − ε)) / 2ε``: independent of autograd.

    Args:
        relative_step: ε over |h|; the error is of order ε², the rounding error of order 1e-16/ε.
    """

    relative_step: float = 1e-5

    def __post_init__(self) -> None:
        check({"relative_step": Number(above=0)}, vars(self))

    def estimate(
        self, problem: Problem, memory: Run, end: Point, hparams: Hparams, outer_grads: Tensor
    ) -> Estimate:
        """Central differences in each entry of each hyperparameter."""
        grads = {}
        for name, value in hparams.items():
            slopes = [
                self._slope(problem, memory, hparams, name, i, outer_grads)
                for i in range(value.numel())
            ]
            grads[name] = torch.stack(slopes).reshape(value.shape)
        return Estimate(grads)

    def _slope(
        self, problem: Problem, memory: Run, hparams: Hparams, name: str, entry: int, grads: Tensor
    ) -> Tensor:
        value = hparams[name]
        step = self.relative_step * value.flatten()[entry].abs().clamp_min(1e-3)
        one = torch.zeros_like(value).view(-1).index_fill(0, torch.tensor(entry, device="cpu"), 1.0)
        offset = step * one.view(value.shape)
        up, down = (
            self.end(problem, memory, {**hparams, name: value + sign * offset}) for sign in (1, -1)
        )
        return (up - down) @ grads / (2 * step)
