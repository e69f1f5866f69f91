"""Base class of update rules: a rule defines a direction; the step itself is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

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


class Evaluation(NamedTuple):
    """Arguments and results of ``direction``.

    Attributes:
        grads: As in ``direction``.
        state: As in ``direction``.
        values: As in ``direction``.
        age: As in ``direction``.
        direction: The direction.
        after: The next state, with intermediate values.
    """

    grads: Tensor
    state: State
    values: Values
    age: int | Tensor
    direction: Tensor
    after: State


class Dots(NamedTuple):
    """Tangents of the arguments of ``direction``.

    Attributes:
        grads: Of the gradients (None: zero).
        state: Of the state (missing: zero); its tensors may be overwritten.
        values: Of the hyperparameters (missing: zero).
        discount: Factor by which the tangents of the state are multiplied at each step.
        steps: Number of consecutive steps to apply, with gradients and state held constant.
    """

    grads: Tensor | None
    state: State
    values: Mapping[str, Any]
    discount: float = 1.0
    steps: int = 1


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
    twin: ClassVar[type[torch.optim.Optimizer] | None] = None
    """torch's optimizer that takes the same steps, if any."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Drop what describes the steps of a base class if a class has its own."""
        super().__init_subclass__(**options)

        def where(*names: str) -> int:
            return min(i for i, c in enumerate(cls.__mro__) for n in names if n in vars(c))

        if "twin" not in vars(cls):
            cls.twin = None
        for name, of in (("in_place", ("direction", "at")), ("tangent", ("direction",))):
            if where(name) > where(*of):
                setattr(cls, name, getattr(AbstractRule, name))

    def __init__(self, **hyperparameters: Any) -> None:
        """Refuse hyperparameters, which belong to the run."""
        if hyperparameters:
            name, given = type(self).__name__, hyperparameters
            raise TypeError(
                f"rules.{name} takes no hyperparameters: pass hparams={given} to st.Tuner, or "
                f"{', '.join(given)} to the optimizer"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def without_gradient(self) -> frozenset[str]:
        """Hyperparameters of which the derivative of the direction is zero almost everywhere."""
        return frozenset(() if self.smooth else (h.name for h in self.hparams))

    @abstractmethod
    def init(self, params: Tensor, values: Values) -> State:
        """The state before the first step: zeros, to which rewinds reset it."""

    def fresh(self) -> AbstractRule:
        """A rule for a new run; returns ``self`` unless the rule stores state of a run."""
        return self

    def joined(self, layout: Layout) -> AbstractRule:
        """The same rule for the flat vector of ``layout``."""
        return self

    def by_parameter(self, model: nn.Module, params: Sequence[Tensor]) -> list[ParameterOptions]:
        """Each parameter's own values; empty if all parameters share the same values."""
        return []

    def grouped(self, params: Any, lr: float) -> Any:
        """Parameters, or groups of them, with the learning rates of the groups."""
        return params

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

    def tangent(self, at: Evaluation, dots: Dots) -> tuple[Tensor, State]:
        """The derivative of ``direction`` along one tangent, by forward-mode differentiation.

        Built-in rules have closed forms, which are faster.

        Args:
            at: Arguments and results of ``direction``.
            dots: Tangents of the arguments.

        Returns:
            Tangents of the direction and of the next state (missing: zero).
        """
        for _ in range(dots.steps - 1):
            dots = dots._replace(state=self._forward(at, dots)[1])
        return self._forward(at, dots)

    def _forward(self, at: Evaluation, dots: Dots) -> tuple[Tensor, State]:
        """The tangent over one step."""
        names = list(dots.values)

        def run(grads: Tensor, state: State, moving: list[Tensor]) -> tuple[Tensor, State]:
            moved = dict(zip(names, moving, strict=True))
            return self.direction(grads, state, {**at.values, **moved}, at.age)

        def like(value: Any) -> Tensor:
            return torch.as_tensor(value, dtype=at.grads.dtype, device=at.grads.device)

        primals = (at.grads, dict(at.state), [like(at.values[n]) for n in names])
        tangents = (
            torch.zeros_like(at.grads) if dots.grads is None else dots.grads,
            {
                k: dots.discount * dots.state.get(k, torch.zeros_like(v))
                for k, v in at.state.items()
            },
            [like(dots.values[n]).expand_as(p) for n, p in zip(names, primals[2], strict=True)],
        )
        direction, after = torch.func.jvp(run, primals, tangents)[1]
        return direction, {name: after[name] for name in at.state}


def mix(old: Tensor, new: Tensor, weight: Any) -> Tensor:
    """The running mean ``(1 − weight) · old + weight · new``, in one operation."""
    if isinstance(weight, Tensor):
        weight = weight.to(old.dtype)
    return torch.lerp(old, new, weight)


def hoist(*scalars: Any) -> Sequence[Any]:
    """The same scalars; as tensors, computed once instead of once for every few weights.

    torch's CPU compiler inlines scalars into its loops over weights, where a power takes as long as
    the rest of a step. The entries of a stack are in memory instead.
    """
    if not all(isinstance(s, Tensor) and s.ndim == 0 for s in scalars):
        return scalars
    return torch.stack([*scalars, scalars[0]]).unbind()[:-1]  # a stack of one would be inlined


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
