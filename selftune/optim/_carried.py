"""Buffers that forward passes in training mode change, in addition to BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Kept(NamedTuple):
    """A buffer before a forward pass: the tensor, which a pass may replace, and its values."""

    module: nn.Module
    name: str
    buffer: Tensor | None
    values: Tensor | None

    @property
    def changed(self) -> bool:
        """Whether the buffer has been replaced or has other values."""
        if getattr(self.module, self.name) is not self.buffer:
            return True
        if self.buffer is None or self.values is None:
            return False
        return not torch.equal(self.buffer, self.values)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the tensor back, with its values."""
        if not self.changed:
            return
        setattr(self.module, self.name, self.buffer)
        if self.buffer is not None and self.values is not None:
            self.buffer.copy_(self.values)


class Carried:
    """Protects training state in buffers from validation passes.

    Vectors of a power iteration, running codebooks and hidden states between batches depend on the
    training batches and weights. A validation pass must not change them, or validation data would
    enter the training. Integer buffers, such as counters of random numbers, may advance.

    Attributes:
        buffers: Module and name of each of these buffers.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[nn.Module, str]] = []
        self._seen: dict[tuple[int, str], Kept] = {}  # by module and name, in the first pass

    def look(self, module: nn.Module, statistics: list[Tensor]) -> None:
        """Note the buffers of a module before its first pass.

        Args:
            module: The module, without its children.
            statistics: Its running statistics, which are handled elsewhere.
        """
        apart = {id(t) for t in statistics}
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and id(buffer) not in apart:
                self._seen.setdefault((id(module), name), _keep(module, name))

    def looked(self) -> None:
        """After the first pass: restore the buffers that it has changed, and protect them."""
        known = {(id(module), name) for module, name in self.buffers}
        for key, kept in self._seen.items():
            if kept.changed and key not in known:
                self.buffers.append((kept.module, kept.name))
            kept.restore()
        self._seen = {}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restores the buffers after the block."""
        before = [_keep(module, name) for module, name in self.buffers]
        try:
            yield
        finally:
            for kept in before:
                kept.restore()


def _keep(module: nn.Module, name: str) -> Kept:
    buffer = getattr(module, name)
    return Kept(module, name, buffer, None if buffer is None else buffer.detach().clone())
