"""Forward and backward passes of an objective as pure functions of weights and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selftune._binding import bound, functional_call
from selftune._flat import local
from selftune._gathered import reshard
from selftune._gradient import gradient, plainly
from selftune._trees import unchanged
from selftune.tuner._batch import size
from selftune.tuner._objective import InMode

Passed = tuple[Tensor, list[Tensor], list[Tensor]]
"""Loss, gradients and next buffers of a pass."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes of objectives that share parameters and buffers.

    Attributes:
        views: Returns one tensor for each parameter, from the run's weights.
    """

    params: Sequence[str]
    buffers: Sequence[str]
    views: Callable[[list[Tensor]], list[Tensor]]
    autocast: Callable[[], AbstractContextManager[Any]]

    def __call__(
        self,
        module: nn.Module,
        params: list[Tensor],
        buffers: list[Tensor],
        batch: Any,
        layers: Mapping[str, Tensor],
    ) -> Passed:
        """Loss, gradients and next buffers of an objective on a batch.

        Buffers are not modified; ``layers`` replace some of them, by name.
        """
        tensors: dict[str, Tensor] = {}

        def loss_at(params: list[Tensor], call: Callable[..., Tensor]) -> Tensor:
            tensors.update(zip(self.params, self.views(params), strict=True))
            tensors.update(self._copies(buffers, layers))
            with self.autocast():
                return call(module, tensors, (batch,))

        def whole(params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            loss = loss_at(params, functional_call)
            return loss, [tensors[n] for n in self.buffers]  # the same tensors, or reassigned ones

        if plainly():
            # Activation checkpoints run the module again in the backward pass, on these tensors.
            with ExitStack() as stack:
                call = partial(_call_bound, stack)
                grads, loss, _ = gradient(lambda w: (loss_at(w, call), ()), params)
            after = [tensors[n].detach() for n in self.buffers]
        else:
            grads, loss, after = gradient(whole, params)
        return loss, grads, after

    def _copies(self, buffers: list[Tensor], layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the buffers, which modules modify in place, and the strengths."""
        return {**dict(zip(self.buffers, [b.clone() for b in buffers], strict=True)), **layers}


@dataclass(frozen=True, kw_only=True)
class ShardedPasses(Passes):
    """Passes of a model sharded by ``fully_shard``; torch gathers weights and scatters gradients.

    Attributes:
        joined: The inverse of ``views``.
    """

    trained: Sequence[nn.Parameter]
    joined: Callable[[list[Tensor]], list[Tensor]]

    def __call__(
        self,
        module: nn.Module,
        params: list[Tensor],
        buffers: list[Tensor],
        batch: Any,
        layers: Mapping[str, Tensor],
    ) -> Passed:
        """Loss on this rank's examples, gradients for :meth:`Group.mean`, and next buffers."""
        tensors = self._copies(buffers, layers)
        shards = [local(p.detach()) for p in self.trained]
        mode = module.entered() if isinstance(module, InMode) else nullcontext(module)
        within = put(shards, self.views(params)), torch.enable_grad(), ExitStack()
        with mode as objective, within[0], within[1], within[2] as stack:
            reshard()
            with self.autocast():
                loss = _call_bound(stack, objective, tensors, (batch,))
            if loss.requires_grad:
                (loss * size(batch)).backward()
        after = [tensors[n].detach() for n in self.buffers]
        return loss.detach(), self.joined([_taken(p) for p in self.trained]), after


@contextmanager
def put(targets: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Put values into tensors within a block; tensors of the same memory are left alone."""
    pairs = zip(targets, values, strict=True)
    apart = [(t, v) for t, v in pairs if t.data_ptr() != v.data_ptr()]
    with unchanged(target for target, _ in apart):
        for target, value in apart:
            target.copy_(value)
        yield


def _taken(param: nn.Parameter) -> Tensor:
    """This rank's shard of a gradient, which is removed from the parameter."""
    grad, param.grad = param.grad, None
    return torch.zeros_like(local(param.detach())) if grad is None else local(grad)


def _call_bound(
    stack: ExitStack, module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...]
) -> Any:
    """``functional_call`` whose tensors stay in the module until the stack is closed."""
    stack.enter_context(bound(module, tensors))
    return module(*args)
