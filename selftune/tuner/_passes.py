"""Forward and backward passes of an objective as pure functions of weights and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.stateless import _reparametrize_module

from selftune._gradient import gradient, plainly

Passed = tuple[Tensor, list[Tensor], list[Tensor]]
"""Loss, gradients and next buffers of a pass."""
APART = 2**24
"""Distance between the random-number counters of two ranks."""


@dataclass(frozen=True)
class Passes:
    """Passes of objectives that share parameters and buffers.

    Args:
        params: Names of the trained parameters.
        buffers: Names of the buffers.
        views: Returns one tensor for each parameter, from the run's weights.
        autocast: Makes the context of the forward pass.
        counters: Offsets of random-number counters for the pass, by buffer name.
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
            buffers: Buffers before the pass; not modified.
            batch: Argument of the objective.
            layers: Buffers to replace, by name.
        """
        tensors: dict[str, Tensor] = {}

        def loss_at(params: list[Tensor], call: Callable[..., Tensor]) -> Tensor:
            held = [b.clone() for b in buffers]  # modules modify buffers in place
            tensors.update(zip(self.params, self.views(params), strict=True))
            tensors.update({**dict(zip(self.buffers, held, strict=True)), **layers})
            for name, ahead in self.counters.items():
                tensors[name].add_(ahead)
            with self.autocast():
                return call(module, tensors, (batch,))

        def whole(params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            loss = loss_at(params, functional_call)
            return loss, [tensors[n] for n in self.buffers]  # the same tensors, or reassigned ones

        if plainly():
            # Activation checkpoints run the module again in the backward pass, on these tensors.
            with ExitStack() as bound:
                call = partial(_call_bound, bound)
                grads, loss, _ = gradient(lambda w: (loss_at(w, call), ()), params)
            after = [tensors[n].detach() for n in self.buffers]
        else:
            grads, loss, after = gradient(whole, params)
        for name, ahead in self.counters.items():
            after[self.buffers.index(name)].sub_(ahead)
        return loss, grads, after


def _call_bound(
    bound: ExitStack, module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...]
) -> Any:
    """``functional_call`` whose tensors stay in the module until the stack is closed."""
    bound.enter_context(_reparametrize_module(module, tensors, tie_weights=True))
    return module(*args)
