"""Who takes the weight step: a rule of the library, or another optimizer from outside."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from selftune.optim._block import Block
from selftune.rules import AbstractRule
from selftune.rules._base import State, Values
from selftune.update import Clock, Transition, Update, learning_rate

Grads = Sequence[tuple[Tensor, Tensor | None]]
"""Joined gradients of every block, with a mask where parameters have none."""


class AbstractStepper(ABC):
    """Takes weight steps, and owns whatever state they need beyond the blocks'.

    Attributes:
        name: What a saved state must have been stepped by.
        commits: Whether ``move`` writes parameters and state, so that it cannot be taken back.
    """

    name: str
    commits: bool

    @abstractmethod
    def move(
        self,
        blocks: Sequence[Block],
        values: Sequence[Values],
        grads: Grads,
        clocks: Sequence[Clock],
    ) -> list[Transition]:
        """The weight step of every block; the parameters may be left unwritten."""

    def unobserved(
        self, blocks: Sequence[Block], values: Sequence[Values], clocks: Sequence[Clock]
    ) -> bool:
        """Take a step in place that nobody observes; false, and nothing done, if it cannot be."""
        return False

    @abstractmethod
    def forget(self) -> None:
        """Drop that state, for a fresh start."""

    @abstractmethod
    def expose(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Put that state where it is saved."""

    @abstractmethod
    def adopt(self, state: Mapping[Tensor, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Take that state, and the parameter groups, from where they were loaded."""


class RuleStepper(AbstractStepper):
    """Steps by a rule, whose state the blocks keep."""

    commits = False

    def __init__(self, update: Update) -> None:
        self._update = update
        self.name = type(update.rule).__name__

    def move(
        self,
        blocks: Sequence[Block],
        values: Sequence[Values],
        grads: Grads,
        clocks: Sequence[Clock],
    ) -> list[Transition]:
        """The pure update of every block."""
        transitions = []
        for block, value, (flat, mask), clock in zip(blocks, values, grads, clocks, strict=True):
            clock = clock._replace(age=block.age())
            update = self._update.joined(block.layout)
            step = update.observed(block.before(), flat, block.state, value, clock)[2]
            transitions.append(step if mask is None else step.masked(mask))
        return transitions

    def unobserved(
        self, blocks: Sequence[Block], values: Sequence[Values], clocks: Sequence[Clock]
    ) -> bool:
        """By torch's fused kernels, where all gradients are there and finite."""
        if self._update.penalties or any(isinstance(v, Tensor) for o in values for v in o.values()):
            return False
        kernels = [self._update.rule.in_place(v) for v in values]
        found = [b.gradients() for b in blocks]
        grads = [g for part in found if part is not None for g in part]
        if None in kernels or None in found:
            return False
        if not math.isfinite(float(torch.stack(torch._foreach_norm(grads)).sum())):
            return False
        for block, kernel, part, value, clock in zip(
            blocks, kernels, found, values, clocks, strict=True
        ):
            assert kernel is not None
            assert part is not None
            block.step(kernel, part, float(learning_rate(value, clock)))
        return True

    def forget(self) -> None:
        """Nothing: the blocks keep it all."""

    def expose(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Nothing: the blocks keep it all."""

    def adopt(self, state: Mapping[Tensor, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Nothing: the blocks keep it all."""


class Opaque(AbstractRule):
    """A rule of which only its effect is known: ``w₊ = w − η (d + λ w)``, d from what it did."""

    hparams = ()
    decoupled = True
    shrinks = False
    tuned = ("lr", "weight_decay")
    defaults: Mapping[str, Any] = MappingProxyType({})

    def init(self, params: Tensor, values: Values) -> State:
        """No state of ours."""
        return {}

    def direction(
        self, grads: Tensor, state: State, values: Values, age: Any
    ) -> tuple[Tensor, State]:
        """Not known beforehand."""
        raise TypeError("an opaque optimizer takes its own steps; there is no direction to ask for")

    def tangent(
        self,
        grads: Tensor,
        state: State,
        values: Values,
        age: Any,
        moved: tuple[Tensor, State],
        dots: tuple[Tensor | None, State, Mapping[str, Any]],
        discount: float = 1.0,
        steps: int = 1,
    ) -> tuple[Tensor, State]:
        """None of its hyperparameters is ours."""
        return torch.zeros_like(grads), {}


class InnerStepper(AbstractStepper):
    """Lets another optimizer step, and reads the direction off what it did to the weights."""

    commits = True

    def __init__(self, inner: torch.optim.Optimizer, update: Update) -> None:
        self._inner = inner
        self._update = update
        self.name = f"SelfTuning({type(inner).__name__})"

    def move(
        self,
        blocks: Sequence[Block],
        values: Sequence[Values],
        grads: Grads,
        clocks: Sequence[Clock],
    ) -> list[Transition]:
        """``d + λ w = (w − w₊)/η``, with the tuned η and λ shown to the inner optimizer."""
        before = [b.before() for b in blocks]
        rates = [float(learning_rate(v, c)) for v, c in zip(values, clocks, strict=True)]
        shown = [(g["lr"], g["weight_decay"]) for g in self._inner.param_groups]
        for value, rate in zip(values, rates, strict=True):
            group = self._inner.param_groups[value["index"]]
            group["lr"], group["weight_decay"] = rate, value["weight_decay"]
        try:
            self._step()
        finally:
            for group, (lr, decay) in zip(self._inner.param_groups, shown, strict=True):
                group["lr"], group["weight_decay"] = lr, decay
        transitions = []
        for block, old, value, rate, clock, (flat, _) in zip(
            blocks, before, values, rates, clocks, grads, strict=True
        ):
            moved = block.weights()
            total = (old - moved) / max(rate, 1e-30)
            direction = total - value["weight_decay"] * old
            transitions.append(
                Transition(self._update, old, flat, {}, value, clock, direction, total, {}, moved)
            )
        return transitions

    def _step(self) -> None:
        """The inner step without its hook wrapper, so that global step hooks fire once."""
        step = type(self._inner).step
        getattr(step, "__wrapped__", step)(self._inner)

    def forget(self) -> None:
        """Clear the inner optimizer's state, which it makes anew at its next step."""
        self._inner.state.clear()

    def expose(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Show the inner state of each parameter under ``inner``."""
        for param, inner in self._inner.state.items():
            state[param]["inner"] = dict(inner)

    def adopt(self, state: Mapping[Tensor, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Take the inner state of each parameter from ``inner``."""
        for param, entry in state.items():
            if "inner" in entry:
                self._inner.state[param] = dict(entry["inner"])
        self._inner.param_groups = groups
