"""The interface of an estimator: ``init``, ``observe``, ``estimate``."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from selftune._arguments import MAPPING, Instance, checked
from selftune.linear_solve import Solution
from selftune.problem import Hparams, Point, Problem
from selftune.update import Update

log = logging.getLogger("selftune")


class Estimate(NamedTuple):
    """Hypergradients with their variance and the solver's result.

    Attributes:
        grads: dL_val/dh by name, in the shapes of the hyperparameters.
        variance: Total variance, summed over all entries, if the estimate is random.
        solution: Result of the linear solver, if there is one.
        windows: By name, one hypergradient for each window of steps, shape (windows, …), if
            the steps of a window share a value (:class:`~selftune.Unrolled`).
    """

    grads: dict[str, Tensor]
    variance: Tensor | None = None
    solution: Solution | None = None
    windows: Mapping[str, Tensor] | None = None


class AbstractEstimator(ABC):
    """Observes weight steps and estimates the gradient of an outer loss w.r.t. hyperparameters.

    ``init``, ``observe`` and ``estimate`` are pure functions of tensors; ``estimate`` is linear in
    the outer gradients, up to the error of a linear solver.

    Attributes:
        sees_all: Whether it must observe every step, or only the last one before an estimate.
        answers_for_update: Whether, in training runs, it also covers the hyperparameters of the
            update, not only those inside the model and the loss.
        needs_outputs: Whether it needs the loss in two parts, outputs and a criterion.
    """

    sees_all: ClassVar[bool] = True

    def sees(self, step: int, *, last: bool) -> bool:
        """Whether it observes a step of a training run.

        Args:
            step: Number of steps before.
            last: Whether an estimate follows, or may follow.
        """
        return self.sees_all or last

    @property
    def answers_for_update(self) -> bool:
        """Whether it covers hyperparameters of the update in training runs."""
        return True

    @property
    def needs_outputs(self) -> bool:
        """Whether it needs the loss as outputs and a criterion."""
        return False

    def check(  # noqa: B027 - most support all
        self, update: Update, names: Sequence[str], *, endless: bool = False
    ) -> None:
        """Raise an error for unsupported hyperparameters.

        Args:
            update: The weight step.
            names: The requested hyperparameters.
            endless: Whether it is used in a training run, without ``Problem.split``.

        Raises:
            ValueError: A hyperparameter is unsupported; the message names the remedy.
        """

    @abstractmethod
    def init(self, problem: Problem, start: Point, hparams: Hparams) -> Any:
        """The memory before the first step."""

    @abstractmethod
    def observe(self, problem: Problem, memory: Any, point: Point, hparams: Hparams) -> Any:
        """The memory after the step from ``point``; called before the step is taken."""

    @abstractmethod
    def estimate(
        self, problem: Problem, memory: Any, end: Point, hparams: Hparams, outer_grads: Tensor
    ) -> Estimate:
        """Hypergradients.

        Args:
            problem: The bilevel problem.
            memory: The memory of the steps.
            end: The point after the last step.
            hparams: The hyperparameters.
            outer_grads: ∇L_val there, shape (N,).
        """

    def shift(self, problem: Problem, memory: Any, params: Tensor, move: Tensor) -> Tensor:
        """``J δ``, the predicted change of the weights at other hyperparameters, shape (N,).

        Args:
            problem: The bilevel problem.
            memory: The memory of the steps.
            params: The weights, shape (N,).
            move: δ in raw (log or log-odds) space, shape (entries of all hyperparameters,).

        Raises:
            ValueError: The estimator does not keep J.
        """
        raise ValueError(f"{self} keeps no sensitivities to predict with: use BestResponse")

    def solve(
        self, problem: Problem, memory: Any, end: Point, hparams: Hparams, outer_grads: Tensor
    ) -> tuple[Estimate, Any]:
        """``estimate``, and the memory after it."""
        return self.estimate(problem, memory, end, hparams, outer_grads), memory


@checked(
    problem=Instance((Problem,), "a selftune.Problem"), hparams=MAPPING,
    estimator=Instance((AbstractEstimator,), "an estimator, such as st.Forward()"),
)  # fmt: skip
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
        estimator: The estimator.
        params: The weights at the start, shape (N,).
        hparams: The hyperparameters by name.
        batches: Training batches, one for each step.
        outer_batch: The validation batch.

    Raises:
        ValueError: A hyperparameter has no influence or is not a tensor of floating-point numbers;
            the message names it. There are no hyperparameters, or no batches.

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
    if not hparams:
        raise ValueError("hparams is empty: pass the hyperparameters by name")
    for name, value in hparams.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(
                f"hparams[{name!r}]={value!r} must be a tensor of floating-point numbers"
            )
    point = problem.start(params, hparams)
    memory, step = estimator.init(problem, point, hparams), -1
    for step, batch in enumerate(batches):
        point = point._replace(batch=batch)
        if step == 0:
            problem.check_influence(point, hparams)
            problem.products.prepare(params, hparams, batch)
        point = problem.known(point, hparams)
        memory = estimator.observe(problem, memory, point, hparams)
        point = problem.step(point, hparams)
    if step < 0:
        raise ValueError("batches is empty: pass one training batch for each step")
    outer_grads = torch.func.grad(problem.outer_loss)(point.params, outer_batch)
    estimate = estimator.estimate(problem, memory, point, hparams, outer_grads)
    if estimate.solution is not None and bool(estimate.solution.diverged):
        log.warning(
            "%s: the linear solve diverged; using its best iterate (relative residual %.2g): "
            "add damping, or use fewer terms", estimator, float(estimate.solution.residual),
        )  # fmt: skip
    return estimate._replace(grads={n: g.detach() for n, g in estimate.grads.items()})
