"""Implicit differentiation: the response of where training ends, by a linear solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune.estimators._base import AbstractEstimator, Estimate
from selftune.linear_solve import AbstractIteration, AbstractSolver, Neumann, Solution
from selftune.problem import Hparams, Point, Problem


class ImplicitMemory(NamedTuple):
    """What an implicit estimate starts from.

    Attributes:
        batch: The last training batch.
        adjoint: The last solution, or None.
    """

    batch: Any
    adjoint: Tensor | None


@dataclass(frozen=True)
class Implicit(AbstractEstimator):
    """``dL_val/dh = −vᵀ ∂F/∂h`` where ``(∂F/∂w)ᵀ v = ∇L_val`` and F is 0 where training ends.

    Constant memory, whatever the number of hyperparameters; right in so far as training has
    converged. Two choices of F:

    - ``through="loss"``: ``F = ∇L_train`` with its penalties. For everything that is part of the
      loss, coupled weight decay included.
    - ``through="update"``: ``F = (w, s) − U(w, s)``, the fixed point of the update. For learning
      rates, momentum and decoupled weight decay too: at the very end a rate has no influence, and
      before it the rate that gets there faster has.

    Args:
        solver: A :class:`~selftune.Neumann`, :class:`~selftune.CG` or :class:`~selftune.Nystrom`;
            through the update Neumann with scale 1, whose terms look back one step each.
        through: ``"loss"`` or ``"update"``.
        warm: Start each solve from the last one's solution, which is kept (one-pass).

    Raises:
        ValueError: An unknown ``through``; a solver that needs a symmetric matrix through the
            update; hyperparameters that do not enter the training loss, through the loss.

    Source: Lorraine et al. 2020; Clarke et al. 2022 (update, one-pass); Hataya & Yamada 2023.
    """

    sees_all = False

    solver: AbstractSolver = field(default_factory=Neumann)
    through: str = "loss"
    warm: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.through not in ("loss", "update"):
            raise ValueError(f"through={self.through!r} must be 'loss' or 'update'")
        if self.through == "update" and not isinstance(self.solver, Neumann):
            raise ValueError(
                f"solver={type(self.solver).__name__} needs a symmetric matrix, which that of an "
                "update is not: use Neumann, or through='loss'"
            )

    def init(self, problem: Problem, start: Point, hparams: Hparams) -> ImplicitMemory:
        """Nothing to start from; refuses hyperparameters of which the loss knows nothing."""
        if self.through == "loss":
            apart = set(problem.update.hparams) - problem.update.smooth
            idle = [n for n in hparams if n in apart]
            if idle:
                raise ValueError(
                    f"hparams {idle} do not enter the training loss, so its minimum does not "
                    "depend on them: use Implicit(through='update'), Trace, Forward or Unrolled"
                )
        return ImplicitMemory(None, None)

    def observe(
        self, problem: Problem, memory: ImplicitMemory, point: Point, hparams: Hparams
    ) -> ImplicitMemory:
        """Keep the batch."""
        return memory._replace(batch=point.batch)

    def estimate(
        self,
        problem: Problem,
        memory: ImplicitMemory,
        end: Point,
        hparams: Hparams,
        outer_grads: Tensor,
    ) -> Estimate:
        """Solve, and pull the solution back to the hyperparameters."""
        return self.solve(problem, memory, end, hparams, outer_grads)[0]

    def solve(
        self,
        problem: Problem,
        memory: ImplicitMemory,
        end: Point,
        hparams: Hparams,
        outer_grads: Tensor,
    ) -> tuple[Estimate, ImplicitMemory]:
        """``estimate``, and the memory that the next one starts from."""
        point = end._replace(batch=memory.batch)
        run = self._loss if self.through == "loss" else self._update
        start = memory.adjoint if self.warm else None
        estimate = run(problem, point, hparams, outer_grads, start)
        assert estimate.solution is not None
        return estimate, memory._replace(adjoint=estimate.solution.value)

    def _loss(
        self,
        problem: Problem,
        point: Point,
        hparams: Hparams,
        outer_grads: Tensor,
        start: Tensor | None,
    ) -> Estimate:
        def curve(point: Point, hparams: Hparams, vector: Tensor) -> Tensor:
            return problem.curving(point, hparams)(vector)[0]

        def mix(point: Point, hparams: Hparams, vector: Tensor) -> dict[str, Tensor]:
            return {n: -g for n, g in problem.curving(point, hparams)(vector)[1].items()}

        solution = self._solved(problem, self.solver, curve, (point, hparams), outer_grads, start)
        found = problem.graph("mix", mix)(point, hparams, solution.value)
        return Estimate(found, solution=solution)

    def _update(
        self,
        problem: Problem,
        point: Point,
        hparams: Hparams,
        outer_grads: Tensor,
        start: Tensor | None,
    ) -> Estimate:
        names = list(point.state)

        def parts(joined: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            params, *state = joined.view(1 + len(names), -1)
            return params, dict(zip(names, state, strict=True))

        def joined(params: Tensor, state: dict[str, Tensor]) -> Tensor:
            return torch.cat([params, *(state[n] for n in names)])

        def turn(point: Point, hparams: Hparams, vector: Tensor) -> Tensor:
            return vector - joined(*problem.pull(point, hparams, parts(vector))[0])

        def reach(point: Point, hparams: Hparams, vector: Tensor) -> dict[str, Tensor]:
            return problem.pull(point, hparams, parts(vector))[1]

        still = {n: torch.zeros_like(outer_grads) for n in names}
        solver = self.solver
        assert isinstance(solver, Neumann)
        if solver.scale is None:
            solver = replace(solver, scale=1.0)
        rhs = joined(outer_grads, still)
        solution = self._solved(problem, solver, turn, (point, hparams), rhs, start)
        found = problem.graph("reach", reach)(point, hparams, solution.value)
        return Estimate(found, solution=solution)

    @staticmethod
    def _solved(
        problem: Problem,
        solver: AbstractSolver,
        product: Callable[..., Tensor],
        at: tuple[Point, Hparams],
        rhs: Tensor,
        start: Tensor | None,
    ) -> Solution:
        """A solve whose single rounds may be a graph each."""
        times = problem.graph("product", product)
        rounds = None
        if isinstance(solver, AbstractIteration):

            def one(point: Point, hparams: Hparams, carry: Any) -> Any:
                return solver.step(lambda v: product(point, hparams, v), carry)

            graph = problem.graph("round", one)
            rounds = lambda carry: graph(*at, carry)  # noqa: E731
        return solver.solve(lambda v: times(*at, v), rhs, start, rounds)
