"""The tensors of a tuner's run."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from selftune.method import HyperState, State

Batch = Any


class RunState(NamedTuple):
    """The state of a run, as tensors.

    Attributes:
        method: State of the method: weights, averages, sensitivities, hyperparameters.
        buffers: Buffers of the model, updated by training passes.
        average_buffers: Buffers of the averaged weights, updated by validation passes.
        step: Steps taken in the run, shape (1,).
        since: Steps at the last restart, shape (1,).
        age: Updates since then, shape (1,).
    """

    method: State
    buffers: list[Tensor]
    average_buffers: list[Tensor]
    step: Tensor
    since: Tensor
    age: Tensor

    @property
    def weights(self) -> list[Tensor]:
        return [p.params for p in self.method.parts]

    @property
    def averages(self) -> list[Tensor]:
        return [p.average for p in self.method.parts]

    @property
    def hyper(self) -> HyperState:
        return self.method.hyper
