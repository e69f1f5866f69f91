"""Stochastic gradient descent with momentum, as in ``torch.optim.SGD``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from selftune._flat import add_to, plus
from selftune.hparams import MOMENTUM
from selftune.rules._base import AbstractRule, Dots, Evaluation, InPlace, State, Values, geometric


class SGD(AbstractRule):
    """SGD with heavy-ball momentum μ and dampening τ, optionally Nesterov momentum.

    ``b₊ = μ b + (1 − τ) g`` (``b₊ = g`` at the first step); ``d = b₊``, or ``g + μ b₊`` with
    Nesterov momentum. Options read from the values: ``dampening``, ``nesterov``.

    Source: Sutskever et al. 2013, in the form of ``torch.optim.SGD``.
    """

    twin = torch.optim.SGD
    hparams = (MOMENTUM,)
    decoupled = False
    shrinks = True
    tuned = ("lr", "decay", "momentum", "weight_decay")
    defaults = MappingProxyType(
        dict(lr=1e-3, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0)
    )

    def init(self, params: Tensor, values: Values) -> State:
        """A momentum buffer of zeros."""
        return {"momentum_buffer": torch.zeros_like(params)}

    def in_place(self, values: Values) -> InPlace | None:
        """One kernel for all tensors; torch's kernel keeps no buffer without momentum.

        Buffers start at 0, so the first step needs no special case unless dampening is used.
        """
        if values["momentum"] == 0:
            return partial(_plain, values)
        if values["dampening"] != 0:
            return None
        return lambda params, grads, state, steps, rate: torch._fused_sgd_(
            params, grads, state["momentum_buffer"], lr=rate, momentum=values["momentum"],
            dampening=values["dampening"], nesterov=values["nesterov"],
            weight_decay=values["weight_decay"], maximize=values.get("maximize", False),
            is_first_step=False,
        )  # fmt: skip

    def direction(
        self, grads: Tensor, state: State, values: Values, age: int | Tensor
    ) -> tuple[Tensor, State]:
        """The momentum buffer, or Nesterov's look-ahead of it."""
        momentum = values["momentum"]
        buffer = plus(_fresh(grads, values, age), state["momentum_buffer"], momentum)
        direction = plus(grads, buffer, momentum) if values["nesterov"] else buffer
        return direction, {"momentum_buffer": buffer}

    def tangent(self, at: Evaluation, dots: Dots) -> tuple[Tensor, State]:
        """``ḃ₊ = μ ḃ + μ̇ b + (1 − τ) ġ``; ``ḋ = ḃ₊`` or ``ġ + μ ḃ₊ + μ̇ b₊``.

        Over several steps: ``ḃ₊ = μᵏ ḃ + (1 + μ + … + μᵏ⁻¹) (μ̇ b + (1 − τ) ġ)``.
        """
        momentum, momentum_dot = at.values["momentum"], dots.values.get("momentum")
        decay, dot = momentum * dots.discount, dots.state.get("momentum_buffer")
        dot = torch.zeros_like(at.grads) if dot is None else dot.mul_(decay**dots.steps)
        gain = geometric(decay, dots.steps)
        if momentum_dot is not None:
            add_to(dot, at.state["momentum_buffer"], gain * momentum_dot)
        if dots.grads is not None:
            dot.add_(_fresh(dots.grads, at.values, at.age) * gain)
        if not at.values["nesterov"]:
            return dot, {"momentum_buffer": dot}
        direction_dot = momentum * dot
        if momentum_dot is not None:
            direction_dot += momentum_dot * at.after["momentum_buffer"]
        if dots.grads is not None:
            direction_dot += dots.grads
        return direction_dot, {"momentum_buffer": dot}


def _plain(
    values: Values,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]],
    steps: Any,
    rate: float,
) -> None:
    """A step without momentum, ``b₊ = g + λ w``, ``w₊ = w − η b₊``, of all tensors at once."""
    buffers = list(state["momentum_buffer"])
    torch._foreach_copy_(buffers, list(grads))
    if values.get("maximize", False):
        torch._foreach_neg_(buffers)
    if values["weight_decay"] != 0:
        torch._foreach_add_(buffers, list(params), alpha=values["weight_decay"])
    torch._foreach_add_(list(params), buffers, alpha=-rate)


def _fresh(grads: Tensor, values: Values, age: Any) -> Tensor:
    """The dampened gradient: torch skips dampening at the first step and without momentum."""
    dampening, momentum = values["dampening"], values["momentum"]
    if not isinstance(momentum, Tensor) and momentum == 0:
        return grads
    if isinstance(age, Tensor):
        return grads * (1 - dampening * (age > 0).to(age.dtype))
    if age == 0 or (not isinstance(dampening, Tensor) and dampening == 0):
        return grads
    return grads * (1 - dampening)
