"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from selftune.rules._base import AbstractRule, Dots, Evaluation, State, Values, mix
from selftune.rules.adam import BETA1, BETA2


class Lion(AbstractRule):
    """``d = sign(β₁ m + (1 − β₁) g)``; ``m₊ = β₂ m + (1 − β₂) g``; weight decay decoupled.

    The derivative of the sign is zero almost everywhere, so β₁, β₂ and penalties added to
    the gradient have no hypergradient and cannot be tuned by gradient.

    Source: Chen et al. 2023, algorithm 2.
    """

    hparams = (BETA1, BETA2)
    decoupled = True
    shrinks = True
    tuned = ("lr", "decay", "weight_decay")
    smooth = False
    defaults = MappingProxyType(dict(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=1e-2))

    def init(self, params: Tensor, values: Values) -> State:
        """Zero-initialised momentum."""
        return {"exp_avg": torch.zeros_like(params)}

    def direction(
        self, grads: Tensor, state: State, values: Values, age: int | Tensor
    ) -> tuple[Tensor, State]:
        """The sign of the interpolated momentum, and the updated momentum."""
        mean = state["exp_avg"]
        direction = mix(mean, grads, 1 - values["beta1"]).sign()
        kept = mix(mean, grads, 1 - values["beta2"])
        # The sign of NaN is 0: without this term nobody would see that the momentum is lost.
        return torch.add(direction, kept, alpha=0), {"exp_avg": kept}

    def tangent(self, at: Evaluation, dots: Dots) -> tuple[Tensor, State]:
        """Zero: the sign is constant almost everywhere."""
        return torch.zeros_like(at.grads), {}
