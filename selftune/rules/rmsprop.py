"""RMSprop, as in ``torch.optim.RMSprop``."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from selftune._flat import add_to, plus
from selftune.bijections import Memory
from selftune.hparams import MOMENTUM, Hparam
from selftune.rules._base import AbstractRule, Dots, Evaluation, State, Values, mix, root

ALPHA = Hparam(name="alpha", bijection=Memory(), lower=1e-3, upper=1 - 1e-6, from_zero=0.1)


class RMSprop(AbstractRule):
    """Gradients divided by the root of their running mean square, followed by momentum μ.

    ``v₊ = a v + (1 − a) g²``; ``r = g / (√v₊ + ε)``, or ``g / (√(v₊ − ḡ₊²) + ε)`` if
    ``centered``; ``b₊ = μ b + r``; ``d = b₊``. Options read from the values: ``eps``,
    ``centered``. The smoothing constant a is torch's ``alpha``; the decay of the learning rate
    is ``decay``.

    Source: Hinton's lecture 6e, 2012; Graves 2013, eq. 38–45 (centered).
    """

    twin = torch.optim.RMSprop
    hparams = (MOMENTUM, ALPHA)
    decoupled = False
    shrinks = False
    tuned = ("lr", "decay", "momentum", "weight_decay")
    defaults = MappingProxyType(
        dict(lr=1e-2, momentum=0.0, alpha=0.99, eps=1e-8, centered=False, weight_decay=0.0)
    )

    def init(self, params: Tensor, values: Values) -> State:
        """Zero-initialised running means."""
        names = ["square_avg", "momentum_buffer"] + ["grad_avg"] * bool(values["centered"])
        return {name: torch.zeros_like(params) for name in names}

    def initial_gain(self, values: Values, step: int) -> float:
        """1/√(1 − aⁿ), because v starts at 0."""
        return float((1 - values["alpha"] ** step) ** -0.5)

    def direction(
        self, grads: Tensor, state: State, values: Values, age: int | Tensor
    ) -> tuple[Tensor, State]:
        """The momentum of the scaled gradients."""
        fresh = 1 - values["alpha"]
        square = mix(state["square_avg"], grads * grads, fresh)
        after: State = {"square_avg": square}
        if values["centered"]:
            mean = after["grad_avg"] = mix(state["grad_avg"], grads, fresh)
            scale = root((square - mean * mean).clamp_min(0))  # rounding may take it below 0
        else:
            scale = root(square)
        scaled = grads / (scale + values["eps"])
        after["momentum_buffer"] = plus(scaled, state["momentum_buffer"], values["momentum"])
        return after["momentum_buffer"], after

    def tangent(self, at: Evaluation, dots: Dots) -> tuple[Tensor, State]:
        """Closed form, except for a: ``ḃ₊ = μ ḃ + μ̇ b + ṡ`` with ``s = g/(r + ε)``, r² = v₊ − ḡ₊².

        ``v̇₊ = a v̇ + 2 (1 − a) g ġ``; ``ṙ = (v̇₊ − 2 ḡ₊ ḡ̇₊)/2r``; ``ṡ = (ġ − s ṙ)/(r + ε)``.
        """
        if "alpha" in dots.values:
            return super().tangent(at, dots)
        dot, state_dot = at.grads, dots.state
        for _ in range(dots.steps):
            dot, state_dot = self._tangent(at, dots._replace(state=state_dot))
        return dot, state_dot

    @staticmethod
    def _tangent(at: Evaluation, dots: Dots) -> tuple[Tensor, State]:
        """The tangent over one step."""
        grads, state, values, _, _, after = at
        grads_dot, state_dot, values_dot, discount, _ = dots
        alpha, momentum = values["alpha"], values["momentum"] * discount
        dot = _scaled(state_dot, "momentum_buffer", momentum, grads)
        if "momentum" in values_dot:
            add_to(dot, state["momentum_buffer"], values_dot["momentum"])
        after_dot = {"momentum_buffer": dot}
        if grads_dot is not None or set(state_dot) - {"momentum_buffer"}:
            fresh = torch.zeros_like(grads) if grads_dot is None else grads_dot
            square_dot = _scaled(state_dot, "square_avg", alpha * discount, grads)
            square_dot += (2 * (1 - alpha)) * grads * fresh
            after_dot["square_avg"] = root_dot = square_dot
            spread = after["square_avg"]
            if values["centered"]:
                mean_dot = _scaled(state_dot, "grad_avg", alpha * discount, grads)
                mean_dot += (1 - alpha) * fresh
                after_dot["grad_avg"] = mean_dot
                root_dot = square_dot - 2 * after["grad_avg"] * mean_dot
                spread = (spread - after["grad_avg"] * after["grad_avg"]).clamp_min(0)
            scale = root(spread)
            bottom = scale + values["eps"]
            root_dot = root_dot / (2 * scale)
            dot.add_((fresh - grads / bottom * root_dot) / bottom)
        return dot, after_dot


def _scaled(dots: State, name: str, factor: Any, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if name not in dots else dots[name] * factor
