"""Base class of update rules: a rule defines a direction; the step itself is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selftune._flat import Layout
from selftune.hparams import Hparam

State = dict[str, Tensor]
"""Named tensors in the shape of the parameters (momentum, second moments)."""
InPlace = Callable[[list[Tensor], list[Tensor], dict[str, list[Tensor]], list[Tensor], float], None]
"""An in-place step of (weights, gradients, state, step counts including this one, rate)."""
Values = Mapping[str, Any]
"""Hyperparameters and options by name: numbers, or tensors that broadcast to the weights."""


class ParameterOptions(NamedTuple):
    """Options of a single parameter, for rules that do not treat all parameters alike.

    Attributes:
        options: Options of the rule by name.
        rate: Factor of the learning rate.
    """

    options: Mapping[str, Any]
    rate: float = 1.0


def concatenated(
    own: Sequence[ParameterOptions], layout: Layout
) -> tuple[dict[str, Any], float | Tensor]:
    """Options of concatenated parameters, as tuples, and the factors of their learning rates."""
    if not own:
        return {}, 1.0
    options = {name: tuple(o.options[name] for o in own) for name in own[0].options}
    return options, layout.expand([o.rate for o in own])


class AbstractRule(ABC):
    """A pure update rule ``w₊ = w − η (d + λ w)``; the λ term only with decoupled weight decay.

    A rule computes the direction ``d`` from the gradient and its state. Operations are elementwise
    unless ``elementwise`` is False, so a rule works on a single tensor or on all tensors
    concatenated, and it is differentiable with respect to the gradient, the state and every
    hyperparameter.

    Attributes:
        hparams: The hyperparameters that enter the direction.
        decoupled: Whether ``weight_decay`` acts on the weights directly instead of through
            the gradient.
        shrinks: Whether weight decay λ shrinks weights by the factor 1 − η λ at each step. False
            for rules that rescale the gradient of the decay term, such as Adam with L2.
        tuned: Names of the hyperparameters that are tuned by default.
        defaults: Default options and hyperparameters, as in ``torch.optim``.
        inactive: Hyperparameters that currently have no effect and no sensitivities.
        smooth: Whether the direction depends smoothly on the gradient. A sign does not: neither
            the rule's hyperparameters nor penalties added to the gradient have a hypergradient.
        elementwise: Whether all operations are elementwise. If not, ``joined`` returns the rule
            for concatenated tensors, and sharded weights are not supported.
    """

    hparams: tuple[Hparam, ...]
    decoupled: bool
    shrinks: bool
    tuned: tuple[str, ...]
    defaults: Mapping[str, Any]
    inactive: frozenset[str] = frozenset()
    smooth: bool = True
    elementwise: bool = True

    @property
    def without_gradient(self) -> frozenset[str]:
        """Hyperparameters of which the derivative of the direction is zero almost everywhere."""
        return frozenset(() if self.smooth else (h.name for h in self.hparams))

    @abstractmethod
    def init(self, params: Tensor, values: Values) -> State:
        """The state before the first step."""

    def fresh(self) -> AbstractRule:
        """A rule for a new run; returns ``self`` unless the rule stores state of a run."""
        return self

    def joined(self, layout: Layout) -> AbstractRule:
        """The same rule for the flat vector of ``layout``."""
        return self

    def by_parameter(self, model: nn.Module, params: Sequence[Tensor]) -> list[ParameterOptions]:
        """Each parameter's own values; empty if all parameters share the same values."""
        return []

    def fitting(self, total_steps: int | None) -> Mapping[str, float]:
        """Hyperparameters that suit a run of this length better than ``defaults``."""
        return {}

    def at(self, values: Values, step: Any) -> Values:
        """The values in effect at a step, for rules whose values depend on the step number."""
        return values

    def initial_gain(self, values: Values, step: int) -> float:
        """Factor of the n-th step of a run because running means start at 0, without momentum.

        Above 1 if a running mean of squares divides the step, and its bias is not corrected.

        Args:
            values: Hyperparameters and options, all of them numbers.
            step: n, from 1.
        """
        return 1.0

    def in_place(self, values: Values) -> InPlace | None:
        """The step ``w − η (d + λ w)`` as a fused torch kernel, if torch has one for these options.

        Tracked steps use it for the weights, and the pure step for the slice.

        Args:
            values: Hyperparameters and options, all of them numbers.
        """
        return None

    @abstractmethod
    def direction(
        self, grads: Tensor, state: State, values: Values, age: int | Tensor
    ) -> tuple[Tensor, State]:
        """The direction and the next state.

        The returned state may also contain intermediate values for ``tangent``.

        Args:
            grads: Gradients of the penalised loss.
            state: The state, not modified.
            values: Hyperparameters and options.
            age: Number of earlier updates of these weights, 0 at the first.
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

        Built-in rules implement it by hand for speed; ``direction_jvp`` works for any rule.

        Args:
            grads: As in ``direction``.
            state: As in ``direction``.
            values: As in ``direction``.
            age: As in ``direction``.
            moved: The return value of ``direction`` for these arguments.
            dots: Tangents of gradients (None: zero), state (missing: zero; its tensors may be
                overwritten) and hyperparameters (missing: zero).
            discount: Factor by which the tangents of the state are multiplied at each step.
            steps: Number of consecutive steps to apply, with gradients and state held constant.

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
    """√v with a finite slope at 0, the value for weights that never had a gradient.

    An infinite slope times the zero tangent of v would be NaN. The offset is negligible next to ε.
    """
    return (square + SMALLEST).sqrt()


def geometric(factor: Any, steps: int) -> Any:
    """``1 + a + … + a^(steps − 1)``: the sum of a constant input with decay a.

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
