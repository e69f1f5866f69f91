"""What an update rule is: a direction, and the one step every rule shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from selftune.hparams import Hparam

State = dict[str, Tensor]
"""Named tensors in the shape of the parameters (momentum, second moments)."""
InPlace = Callable[[list[Tensor], list[Tensor], dict[str, list[Tensor]], list[Tensor], float], None]
"""A whole step in place: of weights by gradients, state, step counts with this one, and rate."""
Values = Mapping[str, Any]
"""Hyperparameters and options by name: numbers, or tensors that broadcast to the weights."""


class AbstractRule(ABC):
    """A pure update rule ``w₊ = w − η (d + λ w)``, λ only where weight decay is decoupled.

    A rule gives the direction ``d`` from the gradient and its state. All operations are
    elementwise, so a rule works on one tensor or on all of them joined, and it is
    differentiable in the gradient, the state and every hyperparameter.

    Attributes:
        hparams: The hyperparameters that enter the direction.
        decoupled: Whether ``weight_decay`` acts on the weights directly instead of through
            the gradient.
        shrinks: Whether weight decay λ shrinks weights by the factor 1 − η λ at a step, as it does
            not where a gradient of λ w is rescaled with the rest.
        tuned: Names tuned unless the user says otherwise.
        defaults: Options and hyperparameters where nobody says, as in ``torch.optim``.
        inactive: Hyperparameters that do not act at present, and have no sensitivities.
    """

    hparams: tuple[Hparam, ...]
    decoupled: bool
    shrinks: bool
    tuned: tuple[str, ...]
    defaults: Mapping[str, Any]
    inactive: frozenset[str] = frozenset()

    @abstractmethod
    def init(self, params: Tensor, values: Values) -> State:
        """The state before the first step."""

    def fresh(self) -> AbstractRule:
        """The rule for another run: the same, as long as it keeps nothing of one."""
        return self

    def fitting(self, total_steps: int | None) -> Mapping[str, float]:
        """Hyperparameters that fit a run of known length better than ``defaults``."""
        return {}

    def at(self, values: Values, step: Any) -> Values:
        """The values that act at a step of the run, where some follow from its number."""
        return values

    def in_place(self, values: Values) -> InPlace | None:
        """The step ``w − η (d + λ w)`` as one kernel of torch, if it has one for these options.

        Steps that nobody observes are taken with it.

        Args:
            values: Hyperparameters and options, all of them numbers.
        """
        return None

    @abstractmethod
    def direction(
        self, grads: Tensor, state: State, values: Values, age: int | Tensor
    ) -> tuple[Tensor, State]:
        """The direction and the next state.

        Beside the state's own names, the second may hold intermediate values for ``tangent``.

        Args:
            grads: Gradients of the penalised loss.
            state: The state, not modified.
            values: Hyperparameters and options.
            age: Updates these weights have had before, 0 at the first.
        """

    @abstractmethod
    def tangent(
        self,
        grads: Tensor,
        state: State,
        values: Values,
        age: int | Tensor,
        moved: tuple[Tensor, State],
        dots: tuple[Tensor | None, State, Mapping[str, Any]],
        discount: float = 1.0,
        steps: int = 1,
    ) -> tuple[Tensor, State]:
        """The derivative of ``direction`` along one tangent.

        Rules derive it by hand where speed matters; ``direction_jvp`` is always right.

        Args:
            grads: As in ``direction``.
            state: As in ``direction``.
            values: As in ``direction``.
            age: As in ``direction``.
            moved: What ``direction`` returned for them.
            dots: Tangents of gradients (None: zero), state (missing: zero; its tensors may be
                overwritten) and hyperparameters (missing: zero).
            discount: What the tangents of the state are to be taken times, at each step.
            steps: How many such steps to take in a row, gradients and state held.

        Returns:
            Tangents of the direction and of the next state (missing: zero).
        """


def mix(old: Tensor, new: Tensor, weight: Any) -> Tensor:
    """The running mean ``(1 − weight) · old + weight · new``, in one operation."""
    if isinstance(weight, Tensor):
        weight = weight.to(old.dtype)
    return torch.lerp(old, new, weight)


SMALLEST = 1e-30


def root(square: Tensor) -> Tensor:
    """√v with a finite slope at 0, where weights that never had a gradient are.

    The infinite one times the 0 by which v moves would be NaN. To values it adds nothing that is
    seen beside ε.
    """
    return (square + SMALLEST).sqrt()


def geometric(factor: Any, steps: int) -> Any:
    """``1 + a + … + a^(steps − 1)``: what a constant input adds up to under the decay a.

    Examples:
        >>> geometric(0.5, 3)
        1.75
    """
    total: Any = 1.0
    for _ in range(steps - 1):
        total = 1 + factor * total
    return total


def direction_jvp(
    rule: AbstractRule,
    grads: Tensor,
    state: State,
    values: Values,
    age: int | Tensor,
    dots: tuple[Tensor | None, State, Mapping[str, Any]],
    discount: float = 1.0,
    steps: int = 1,
) -> tuple[Tensor, State]:
    """``rule.tangent`` by forward-mode differentiation of ``rule.direction``."""
    for _ in range(steps - 1):
        after = direction_jvp(rule, grads, state, values, age, dots, discount)[1]
        dots = (dots[0], after, dots[2])
    grads_dot, state_dot, values_dot = dots
    names = list(values_dot)

    def run(grads: Tensor, state: State, moving: list[Tensor]) -> tuple[Tensor, State]:
        return rule.direction(
            grads, state, {**values, **dict(zip(names, moving, strict=True))}, age
        )

    def like(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=grads.dtype, device=grads.device)

    primals = (grads, dict(state), [like(values[n]) for n in names])
    tangents = (
        torch.zeros_like(grads) if grads_dot is None else grads_dot,
        {k: discount * state_dot.get(k, torch.zeros_like(v)) for k, v in state.items()},
        [like(values_dot[n]).expand_as(p) for n, p in zip(names, primals[2], strict=True)],
    )
    direction, after = torch.func.jvp(run, primals, tangents)[1]
    return direction, {name: after[name] for name in state}
