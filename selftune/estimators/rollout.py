"""A recorded stretch of training that can be run again at other hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selftune.rules import AbstractRule
from selftune.update import Clock, Update

Loss = Callable[[Tensor], Tensor]
"""A loss as a function of the weights, with its batch inside."""


@dataclass
class Rollout:
    """Weight steps from fixed weights on recorded losses: the map from hyperparameters to weights.

    Args:
        update: The weight step.
        params: The weights at the start, one tensor.
        values: Options and hyperparameters that are held fixed.
        rate: The schedule's factor by step.
    """

    update: Update
    params: Tensor
    values: Mapping[str, Any]
    rate: Callable[[int], float] = lambda step: 1.0
    losses: list[Loss] = field(default_factory=list)

    @property
    def rule(self) -> AbstractRule:
        """The rule whose state is rolled out with the weights."""
        return self.update.rule

    def end(self, hparams: Mapping[str, Tensor]) -> Tensor:
        """The weights after all recorded steps, differentiable in ``hparams``."""
        values = {**self.values, **hparams}
        params, state = self.params, self.rule.init(self.params, values)
        for step, loss in enumerate(self.losses):
            grads = torch.func.grad(loss)(params)
            clock = Clock(step, self.rate(step), step)
            params, state = self.update(params, grads, state, values, clock)
        return params
