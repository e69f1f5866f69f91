"""The three verbs of an estimator: ``init``, ``observe``, ``estimate``."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from selftune.linear_solve import Solution
from selftune.problem import Hparams, Point, Problem
from selftune.update import Update

log = logging.getLogger("selftune")


class Estimate(NamedTuple):
    """Hypergradients, and how much they are to be trusted.

    Attributes:
        grads: dL_val/dh by name, in the shapes of the hyperparameters.
        variance: Of the whole vector, summed over its entries, where the estimate is random.
        solution: What the linear solver found, where there is one.
        windows: For each name, the hypergradients of a window of steps each, shape
            (windows, …), where one is shared by a window (:class:`~selftune.Unrolled`).
    """

    grads: dict[str, Tensor]
    variance: Tensor | None = None
    solution: Solution | None = None
    windows: Mapping[str, Tensor] | None = None


class AbstractEstimator(ABC):
    """Watches weight steps and tells how an outer loss at their end responds to hyperparameters.

    All three verbs are pure functions of tensors, and ``estimate`` is linear in the outer
    gradients.

    Attributes:
        sees_all: Whether it must observe every step, or the last before an estimate is enough.
        answers_for_update: Whether, in training runs, it answers for hyperparameters of the update
            too, or only for those inside the model and the loss.
        needs_outputs: Whether it needs the loss in two parts, outputs and a criterion of them.
    """

    sees_all: ClassVar[bool] = True

    @property
    def answers_for_update(self) -> bool:
        """Whether it answers for hyperparameters of the update in training runs."""
        return True

    @property
    def needs_outputs(self) -> bool:
        """Whether it needs outputs and a criterion of them."""
        return False

    def check(  # noqa: B027 - most can do all
        self, update: Update, names: Sequence[str], *, endless: bool = False
    ) -> None:
        """Refuse what it cannot do.

        Args:
            update: The weight step.
            names: The hyperparameters asked for.
            endless: Whether it is to follow a training run, which knows no ``Problem.split``.

        Raises:
            ValueError: What that is, and what to do.
        """

    @abstractmethod
    def init(self, problem: Problem, start: Point, hparams: Hparams) -> Any:
        """What is remembered before the first step."""

    @abstractmethod
    def observe(self, problem: Problem, memory: Any, point: Point, hparams: Hparams) -> Any:
        """What is remembered after the step from ``point``, which is about to be taken."""

    @abstractmethod
    def estimate(
        self, problem: Problem, memory: Any, end: Point, hparams: Hparams, outer_grads: Tensor
    ) -> Estimate:
        """Hypergradients.

        Args:
            problem: The bilevel problem.
            memory: What was remembered of the steps.
            end: Where they led.
            hparams: The hyperparameters.
            outer_grads: ∇L_val there, shape (N,).
        """

    def shift(self, problem: Problem, memory: Any, params: Tensor, move: Tensor) -> Tensor:
        """``J δ``, how weights would differ at other hyperparameters, shape (N,).

        Args:
            problem: The bilevel problem.
            memory: What was remembered of the steps.
            params: The weights, shape (N,).
            move: δ in raw (log or odds) space, shape (entries of all hyperparameters,).

        Raises:
            ValueError: It holds no response to predict with.
        """
        raise ValueError(f"{self} holds no response to predict with: use BestResponse")

    def solve(
        self, problem: Problem, memory: Any, end: Point, hparams: Hparams, outer_grads: Tensor
    ) -> tuple[Estimate, Any]:
        """``estimate``, and what is remembered of it."""
        return self.estimate(problem, memory, end, hparams, outer_grads), memory


def hypergradient(
    problem: Problem,
    estimator: AbstractEstimator,
    params: Tensor,
    hparams: Hparams,
    batches: Iterable[Any],
    outer_batch: Any,
) -> Estimate:
    """``dL_val(w_T(h))/dh`` after a step on each batch, by any estimator.

    Args:
        problem: The bilevel problem.
        estimator: How it is estimated.
        params: The weights at the start, shape (N,).
        hparams: The hyperparameters asked for, by name.
        batches: Of training, one a step.
        outer_batch: Of validation.

    Raises:
        ValueError: A hyperparameter that influences nothing, named.

    Examples:
        >>> import torch, selftune as st
        >>> problem = st.Problem(
        ...     update=st.Update(st.rules.SGD()),
        ...     inner_loss=lambda w, h, batch: (w**2).sum() / 2,
        ...     outer_loss=lambda w, batch: (w**2).sum() / 2,
        ... )
        >>> start, lr = torch.ones(1), {"lr": torch.tensor(0.1)}
        >>> found = hypergradient(problem, st.Forward(), start, lr, [None], None)  # w = 1 - lr
        >>> found.grads
        {'lr': tensor(-0.9000)}
    """
    point = problem.start(params, hparams)
    memory = estimator.init(problem, point, hparams)
    for step, batch in enumerate(batches):
        point = point._replace(batch=batch)
        if step == 0:
            problem.check_influence(point, hparams)
            problem.products.prepare(params, hparams, batch)
        point = problem.known(point, hparams)
        memory = estimator.observe(problem, memory, point, hparams)
        point = problem.step(point, hparams)
    outer_grads = torch.func.grad(problem.outer_loss)(point.params, outer_batch)
    found = estimator.estimate(problem, memory, point, hparams, outer_grads)
    if found.solution is not None and bool(found.solution.diverged):
        log.warning(
            "%s: the linear solve diverged and its best iterate is used, with a relative residual "
            "of %.2g: add damping, or take fewer terms", estimator, float(found.solution.residual),
        )  # fmt: skip
    return found._replace(grads={n: g.detach() for n, g in found.grads.items()})
