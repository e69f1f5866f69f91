"""Implicit differentiation at the end of training, by a linear solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune._arguments import COUNT, FLAG, Instance, OneOf, check
from selftune.estimators._base import AbstractEstimator, Estimate
from selftune.linear_solve import AbstractIteration, AbstractSolver, Neumann, Product, Solution
from selftune.problem import Hparams, Point, Problem
from selftune.update import Update


class ImplicitMemory(NamedTuple):
    """The memory of an implicit estimate.

    Attributes:
        batch: The last training batch.
        adjoint: The last solution, or None.
    """

    batch: Any
    adjoint: Tensor | None


@dataclass(frozen=True)
class Implicit(AbstractEstimator):
    """``dL_val/dh = −vᵀ ∂F/∂h`` with ``(∂F/∂w)ᵀ v = ∇L_val``; F is 0 at the end of training.

    Constant memory for any number of hyperparameters; accurate once training has converged. Two
    choices of F:

    - ``through="loss"``: ``F = ∇L_train`` with its penalties. For all hyperparameters of the loss,
      including coupled weight decay.
    - ``through="update"``: ``F = (w, s) − U(w, s)``, the fixed point of the update. Also for
      learning rates, momentum and decoupled weight decay. At convergence a learning rate has no
      influence; before, faster rates are favoured.

    Args:
        solver: A :class:`~selftune.Neumann`, :class:`~selftune.CG` or :class:`~selftune.Nystrom`;
            with ``"update"`` only Neumann, by default with scale 1: each term is one step.
        through: ``"loss"`` or ``"update"``.
        together: Rounds of the solver in one compiled graph. More rounds run faster; fewer compile
            faster and need less memory.
        warm: Start each solve from the last solution (one-pass).

    Raises:
        ValueError: ``through`` is unknown; with ``"update"``, the solver needs a symmetric matrix;
            with ``"loss"``, a hyperparameter does not enter the training loss.

    Source: Lorraine et al. 2020; Clarke et al. 2022 (update, one-pass); Hataya & Yamada 2023.
    """

    sees_all = False

    solver: AbstractSolver = field(default_factory=Neumann)
    through: str = "loss"
    warm: bool = False
    together: int = 10

    def __post_init__(self) -> None:
        kinds = {
            "solver": Instance((AbstractSolver,), "a solver, such as st.Neumann()"),
            "through": OneOf(("loss", "update")), "warm": FLAG, "together": COUNT,
        }  # fmt: skip
        check(kinds, vars(self))
        if self.through == "update" and not isinstance(self.solver, Neumann):
            raise ValueError(
                f"solver={type(self.solver).__name__} needs a symmetric matrix, but that of an "
                "update is not: use Neumann, or through='loss'"
            )

    def init(self, problem: Problem, start: Point, hparams: Hparams) -> ImplicitMemory:
        """The empty memory."""
        self.check(problem.update, list(hparams))
        return ImplicitMemory(None, None)

    def check(self, update: Update, names: Sequence[str], *, endless: bool = False) -> None:
        """Raise an error for hyperparameters that do not enter the loss."""
        apart = set(update.hparams) - update.smooth
        idle = [n for n in names if n in apart]
        if self.through == "loss" and idle:
            raise ValueError(
                f"hparams {idle} do not enter the training loss, so its minimum does not "
                "depend on them: use Implicit(through='update'), Trace, Forward or Unrolled"
            )

    def observe(
        self, problem: Problem, memory: ImplicitMemory, point: Point, hparams: Hparams
    ) -> ImplicitMemory:
        """Keep the batch."""
        problem.products.prepare(point.params, hparams, point.batch)
        return memory._replace(batch=point.batch)

    def estimate(
        self,
        problem: Problem,
        memory: ImplicitMemory,
        end: Point,
        hparams: Hparams,
        outer_grads: Tensor,
    ) -> Estimate:
        """Solve, and multiply the solution by ∂F/∂h."""
        return self.solve(problem, memory, end, hparams, outer_grads)[0]

    def solve(
        self,
        problem: Problem,
        memory: ImplicitMemory,
        end: Point,
        hparams: Hparams,
        outer_grads: Tensor,
    ) -> tuple[Estimate, ImplicitMemory]:
        """``estimate``, and the memory for the next one."""
        point = end._replace(batch=memory.batch)
        run = self._loss if self.through == "loss" else self._update
        start = memory.adjoint if self.warm else None
        estimate = run(problem, point, hparams, outer_grads, start)
        if not self.warm or estimate.solution is None:
            return estimate, memory
        return estimate, memory._replace(adjoint=estimate.solution.value)

    def _loss(
        self,
        problem: Problem,
        point: Point,
        hparams: Hparams,
        outer_grads: Tensor,
        start: Tensor | None,
    ) -> Estimate:
        def read(point: Point, hparams: Hparams, vector: Tensor) -> dict[str, Tensor]:
            return {n: -g for n, g in problem.mixing(point, hparams)(vector).items()}

        return self._solved(problem, problem.hessian, read, (point, hparams), outer_grads, start)

    def _update(
        self,
        problem: Problem,
        point: Point,
        hparams: Hparams,
        outer_grads: Tensor,
        start: Tensor | None,
    ) -> Estimate:
        names = list(point.state)

        def parts(vector: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            params, *state = vector.view(1 + len(names), -1)
            return params, dict(zip(names, state, strict=True))

        def turning(point: Point, hparams: Hparams) -> Product:
            turn = problem.turning(point, hparams)
            return lambda v: v - _joined(turn(parts(v)), names)

        def read(point: Point, hparams: Hparams, vector: Tensor) -> dict[str, Tensor]:
            return problem.pull(point, hparams, parts(vector))[1]

        still = {n: torch.zeros_like(outer_grads) for n in names}
        rhs = _joined((outer_grads, still), names)
        return self._solved(problem, turning, read, (point, hparams), rhs, start)

    def _solved(
        self,
        problem: Problem,
        matrix: Callable[[Point, Hparams], Product],
        read: Callable[[Point, Hparams, Tensor], dict[str, Tensor]],
        at: tuple[Point, Hparams],
        rhs: Tensor,
        start: Tensor | None,
    ) -> Estimate:
        """Solve in compiled graphs, whose rounds share passes of the model."""
        solver = self._scaled(at[0].params.numel())
        if not isinstance(solver, AbstractIteration):
            times = problem.graph("times", lambda point, h, v: matrix(point, h)(v))
            solution = solver.solve(lambda v: times(*at, v), rhs, start)
            return Estimate(problem.graph("read", read)(*at, solution.value), solution=solution)

        def begin(point: Point, hparams: Hparams, rhs: Tensor, start: Tensor | None) -> Any:
            return solver.begin(matrix(point, hparams), rhs, start)

        def go(point: Point, hparams: Hparams, carry: Any, rounds: int) -> Any:
            product = matrix(point, hparams)
            for _ in range(rounds):
                carry = solver.step(product, carry)
            return carry

        def end(point: Point, hparams: Hparams, carry: Any, rhs: Tensor) -> Any:
            solution = solver.end(carry, rhs)
            return read(point, hparams, solution.value), tuple(solution)

        def whole(point: Point, hparams: Hparams, rhs: Tensor, start: Tensor | None) -> Any:
            carry = go(point, hparams, begin(point, hparams, rhs, start), solver.rounds)
            return end(point, hparams, carry, rhs)

        first = "cold" if start is None else "warm"
        if solver.rounds <= self.together:
            grads, solution = problem.graph(f"solve, {first}", whole)(*at, rhs, start)
            return Estimate(grads, solution=Solution(*solution))
        carry = problem.graph(f"begin, {first}", begin)(*at, rhs, start)
        for done in range(0, solver.rounds, self.together):
            rounds = min(self.together, solver.rounds - done)
            carry = problem.graph(f"{rounds} rounds", go)(*at, carry, rounds)
        grads, solution = problem.graph("end", end)(*at, carry, rhs)
        return Estimate(grads, solution=Solution(*solution))

    def _scaled(self, weights: int) -> AbstractSolver:
        """The solver; with ``"update"``, Neumann with a default scale of 1.

        The adjoints of the rule's state have other units, such as squared gradients, so convergence
        is judged by those of the weights only.
        """
        if self.through == "update" and isinstance(self.solver, Neumann):
            return replace(self.solver, scale=self.solver.scale or 1.0, head=weights)
        return self.solver


def _joined(parts: tuple[Tensor, dict[str, Tensor]], names: Sequence[str]) -> Tensor:
    """Weights and state as one vector."""
    return torch.cat([parts[0], *(parts[1][n] for n in names)])
