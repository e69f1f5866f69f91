"""Adam and AdamW, as in ``torch.optim``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from selftune._flat import add_to
from selftune.bijections import Memory
from selftune.hparams import SLOW, Hparam
from selftune.rules._base import (
    AbstractRule,
    Dots,
    Evaluation,
    InPlace,
    State,
    Values,
    geometric,
    hoist,
    mix,
    root,
)

BETA1 = Hparam(
    name="beta1", option="betas", index=0, bijection=Memory(), lower=1e-3, upper=1 - 1e-6,
    from_zero=0.1, role="momentum", pace=SLOW,
)  # fmt: skip
BETA2 = Hparam(
    name="beta2", option="betas", index=1, bijection=Memory(), lower=0.1, upper=1 - 1e-6,
    from_zero=0.9,
)  # fmt: skip


FORGOTTEN, MEMORIES = 20, (100, 1000)
"""Length of a run divided by β₂'s memory 1/(1 − β₂), and the bounds of that memory."""


def fitting_beta2(total_steps: int | None) -> float:
    """A β₂ with a memory of a twentieth of the run, clamped to 100…1000 gradients.

    The usual 0.999 if the length of the run is unknown.

    Examples:
        >>> fitting_beta2(500), fitting_beta2(10_000), fitting_beta2(None)
        (0.99, 0.998, 0.999)
    """
    least, most = MEMORIES
    memory = most if total_steps is None else min(most, max(least, total_steps / FORGOTTEN))
    return 1 - 1 / memory


class Adam(AbstractRule):
    """Adam, with the gradient of the L2 penalty added to that of the loss.

    ``m₊ = β₁ m + (1 − β₁) g``; ``v₊ = β₂ v + (1 − β₂) g²``; with bias corrections
    ``cᵢ = 1 − βᵢᵗ``, ``d = (m₊/c₁) / (√(v₊/c₂) + ε)``; with ``amsgrad``, v₊ is replaced by its
    maximum so far. Options read from the values: ``eps``, ``amsgrad``.

    Source: Kingma & Ba 2015, algorithm 1; Reddi et al. 2018, algorithm 2.
    """

    twin: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.Adam
    hparams = (BETA1, BETA2)
    decoupled = False
    shrinks = False
    tuned = ("lr", "decay", "beta1", "weight_decay")
    defaults = MappingProxyType(
        dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False, weight_decay=0.0)
    )

    def init(self, params: Tensor, values: Values) -> State:
        """Zero-initialised first and second moments."""
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(values["amsgrad"])
        return {name: torch.zeros_like(params) for name in names}

    def in_place(self, values: Values) -> InPlace | None:
        """Torch's fused kernel, applied to all tensors at once."""
        fused = torch._fused_adamw_ if self.decoupled else torch._fused_adam_

        return lambda params, grads, state, steps, rate: fused(
            params, grads, state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq", []),
            steps, lr=rate, beta1=values["beta1"], beta2=values["beta2"], eps=values["eps"],
            weight_decay=values["weight_decay"], amsgrad=values["amsgrad"],
            maximize=values.get("maximize", False),
        )  # fmt: skip

    def fitting(self, total_steps: int | None) -> Mapping[str, float]:
        """A β₂ whose memory is a twentieth of the run."""
        return {"beta2": fitting_beta2(total_steps)}

    def direction(
        self, grads: Tensor, state: State, values: Values, age: int | Tensor
    ) -> tuple[Tensor, State]:
        """The bias-corrected ratio of the moments."""
        mean = mix(state["exp_avg"], grads, 1 - values["beta1"])
        square = mix(state["exp_avg_sq"], grads * grads, 1 - values["beta2"])
        after: State = {"exp_avg": mean, "exp_avg_sq": square}
        if values["amsgrad"]:
            square = after["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
        factor, size = _corrections(values, age)
        after["root"] = root(square) + values["eps"] * size
        return mean / after["root"] * factor, after

    def tangent(self, at: Evaluation, dots: Dots) -> tuple[Tensor, State]:
        """Closed form, except for β₂, with ``r = √v₊ + ε √c₂`` and f = √c₂/c₁.

        ``ṁ₊ = β₁ ṁ + (1 − β₁) ġ + β̇₁ (m − g)``; ``v̇₊ = β₂ v̇ + 2 (1 − β₂) g ġ``;
        ``ḋ = f ṁ₊/r − d v̇₊/(2 √v₊ r) + d ḟ/f`` with ``ḟ/f = t β₁ᵗ⁻¹ β̇₁/(1 − β₁ᵗ)``. Over k
        steps, a factor β becomes βᵏ, and the terms added at each step form a geometric sum.
        """
        grads_dot, state_dot, values_dot, discount, steps = dots
        if "beta2" in values_dot:
            return AbstractRule.tangent(self, at, dots)
        grads, state, values, age, direction, after = at
        beta1, step = values["beta1"], age + 1
        decay = beta1 * discount
        gain = geometric(decay, steps)
        mean_dot = _scaled(state_dot.get("exp_avg"), decay**steps, grads)
        if "beta1" in values_dot:
            add_to(mean_dot, state["exp_avg"], gain * values_dot["beta1"])
            add_to(mean_dot, grads, -gain * values_dot["beta1"])
        if grads_dot is not None:
            mean_dot.add_(grads_dot * ((1 - beta1) * gain))
        direction_dot = (mean_dot / after["root"]).mul_(_corrections(values, age)[0])
        if "beta1" in values_dot:
            slope = step * beta1 ** (step - 1) * values_dot["beta1"] / (1 - beta1**step)
            add_to(direction_dot, direction, *hoist(slope))
        after_dot = {"exp_avg": mean_dot}
        if grads_dot is not None or set(state_dot) - {"exp_avg"}:
            decay = values["beta2"] * discount
            square_dot = _scaled(state_dot.get("exp_avg_sq"), decay**steps, grads)
            if grads_dot is not None:
                share = 2 * (1 - values["beta2"]) * geometric(decay, steps)
                square_dot.add_((grads * grads_dot).mul_(share))
            after_dot["exp_avg_sq"] = square_dot
            if values["amsgrad"]:
                old = _scaled(state_dot.get("max_exp_avg_sq"), discount**steps, grads)
                newest = after["exp_avg_sq"] > state["max_exp_avg_sq"]
                square_dot = after_dot["max_exp_avg_sq"] = torch.where(newest, square_dot, old)
            square = after.get("max_exp_avg_sq", after["exp_avg_sq"])
            twice = 2 * square.sqrt().clamp_min(1e-30)
            direction_dot -= direction * square_dot / (twice * after["root"])
        return direction_dot, after_dot


def _scaled(dot: Tensor | None, factor: Any, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if dot is None else dot.mul_(factor)


def _corrections(values: Values, age: Any) -> Sequence[Any]:
    """``f = √c₂/c₁`` and √c₂: the bias corrections, taken out of the tensors."""
    size = (1 - values["beta2"] ** (age + 1)) ** 0.5
    return hoist(size / (1 - values["beta1"] ** (age + 1)), size)


class AdamW(Adam):
    """Adam with decoupled weight decay: ``w₊ = w − η (d + λ w)``.

    Source: Loshchilov & Hutter 2019, algorithm 2.
    """

    twin = torch.optim.AdamW
    decoupled = True
    shrinks = True
    defaults = MappingProxyType({**Adam.defaults, "weight_decay": 1e-2})
