"""Buffers that forward passes in training mode change, in addition to BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook


class Kept(NamedTuple):
    """A buffer before a forward pass: the tensor, which a pass may replace, and its values."""

    module: nn.Module
    name: str
    buffer: Tensor | None
    values: Tensor | None

    @torch.no_grad()
    def restore(self) -> None:
        """Put the tensor back, with its values."""
        if getattr(self.module, self.name) is not self.buffer:
            setattr(self.module, self.name, self.buffer)
        if self.buffer is None or self.values is None:
            return
        if self.buffer.shape != self.values.shape:
            self.buffer.data = self.values
        elif not torch.equal(self.buffer, self.values):  # a copy would invalidate earlier graphs
            self.buffer.copy_(self.values)


class Carried:
    """Protects training state in buffers from validation passes.

    Vectors of a power iteration, running codebooks and hidden states between batches depend on the
    training batches and weights. A validation pass must not change them, or validation data would
    enter the training. Integer buffers, such as counters of random numbers, may advance, and so may
    modules outside of a model with parameters, such as metrics.

    Attributes:
        buffers: Module and name of each floating-point buffer of the models that the closure calls;
            None before its first pass.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[nn.Module, str]] | None = None

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restores the buffers after the block, whose first one also finds them."""
        kept: dict[tuple[int, str], Kept] = {}

        def look(module: nn.Module, _: Any = None) -> None:
            if any(True for _ in module.parameters()):
                for part, name in _floating(module):
                    if (id(part), name) not in kept:
                        kept[id(part), name] = _keep(part, name)

        for module, name in self.buffers or ():
            kept[id(module), name] = _keep(module, name)
        handle = register_module_forward_pre_hook(look) if self.buffers is None else None
        try:
            yield
            self.buffers = [(k.module, k.name) for k in kept.values()]
        finally:
            if handle is not None:
                handle.remove()
            for one in kept.values():
                one.restore()


def _floating(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Module and name of the floating-point buffers, without BatchNorm's statistics."""
    for part in module.modules():
        if not isinstance(part, _NormBase):
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    yield part, name


def _keep(module: nn.Module, name: str) -> Kept:
    buffer = getattr(module, name)
    return Kept(module, name, buffer, None if buffer is None else buffer.detach().clone())
