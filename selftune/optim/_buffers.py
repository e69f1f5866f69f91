"""Statistics of normalisation layers that belong to the averaged weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def modules_called() -> Iterator[list[nn.Module]]:
    """Collects the modules whose forward runs inside the block.

    An optimizer is given parameters, not the model; the first validation closure shows which
    model they belong to.
    """
    called: list[nn.Module] = []
    handle = register_module_forward_pre_hook(lambda module, _: called.append(module))
    try:
        yield called
    finally:
        handle.remove()


class Buffers:
    """Running statistics, averaged as the weights are.

    BatchNorm's running mean and variance describe the weights they were gathered with. The
    averaged weights have statistics of their own here: gathered by validation passes in
    training mode, and otherwise a running average of the training weights' statistics.

    Args:
        modules: Modules to search, with their children, for layers with running statistics.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        """Take the present statistics as the average and as the last good ones."""
        found = {id(m): m for top in modules for m in top.modules() if _tracks(m)}
        self._owners = [weakref.ref(m) for m in found.values()]
        self.average = [t.clone() for t in self._tensors()]
        self.good = [t.clone() for t in self._tensors()]

    def _layers(self) -> list[nn.Module]:
        return [m for ref in self._owners if (m := ref()) is not None]

    def _tensors(self) -> list[Tensor]:
        return [t for m in self._layers() for t in (m.running_mean, m.running_var)]  # type: ignore[misc]

    def exchange(self) -> None:
        """Swap the modules' statistics with the averaged ones."""
        for tensor, kept in zip(self._tensors(), self.average, strict=True):
            held = tensor.clone()
            tensor.copy_(kept)
            kept.copy_(held)

    def blend(self, share: float) -> None:
        """Move the average toward the modules' statistics, unless passes at it update it."""
        if self.average and not any(m.training for m in self._layers()):
            torch._foreach_lerp_(self.average, self._tensors(), share)

    def keep(self) -> None:
        """Remember the averaged statistics as good."""
        for kept, average in zip(self.good, self.average, strict=True):
            kept.copy_(average)

    def restore(self) -> None:
        """Put the good statistics back, for the training weights and the average."""
        for tensor, average, kept in zip(self._tensors(), self.average, self.good, strict=True):
            tensor.copy_(kept)
            average.copy_(kept)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The averaged and the good statistics."""
        return {
            "average": [t.clone() for t in self.average],
            "good": [t.clone() for t in self.good],
        }

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Continue from ``state_dict``, if it is of as many layers."""
        for mine, saved in ((self.average, state["average"]), (self.good, state["good"])):
            if [t.shape for t in mine] == [t.shape for t in saved]:
                for tensor, value in zip(mine, saved, strict=True):
                    tensor.copy_(value)


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.running_mean is not None
