"""Forward and backward passes of an objective as pure functions of weights and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from selftune._gradient import gradient

Passed = tuple[Tensor, list[Tensor], list[Tensor]]
"""Loss, gradients and next buffers of a pass."""
APART = 2**24
"""How far the counters of random numbers of two ranks are from each other."""


@dataclass(frozen=True)
class Passes:
    """Passes of objectives that share parameters and buffers.

    Args:
        params: Names of the trained parameters.
        buffers: Names of the buffers.
        views: One tensor a parameter, of what the run keeps of its weights.
        autocast: Makes the context of the forward pass.
        counters: What is added, for the pass, to buffers that count random numbers, by name.
    """

    params: Sequence[str]
    buffers: Sequence[str]
    views: Callable[[list[Tensor]], list[Tensor]]
    autocast: Callable[[], AbstractContextManager[Any]]
    counters: Mapping[str, int] = field(default_factory=dict)

    def __call__(
        self,
        module: nn.Module,
        params: list[Tensor],
        buffers: list[Tensor],
        batch: Any,
        layers: Mapping[str, Tensor],
    ) -> Passed:
        """Loss, gradients and next buffers of an objective on a batch.

        Args:
            module: The objective.
            params: The run's weights.
            buffers: Before the pass; they are left alone.
            batch: Passed to the objective.
            layers: Buffers with another value, by name.
        """

        def objective(params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            held = [b.clone() for b in buffers]  # modules write into them, which must not show
            tensors = dict(zip(self.params, self.views(params), strict=True))
            tensors |= {**dict(zip(self.buffers, held, strict=True)), **layers}
            for name, ahead in self.counters.items():
                tensors[name].add_(ahead)
            with self.autocast():
                loss = functional_call(module, tensors, (batch,))
            return loss, [tensors[n] for n in self.buffers]  # the same, or what was bound anew

        grads, loss, after = gradient(objective, params)
        for name, ahead in self.counters.items():
            after[self.buffers.index(name)].sub_(ahead)
        return loss, grads, after
