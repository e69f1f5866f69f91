"""Buffers as they were before a forward pass, which may change them or replace them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class KeptBuffer(NamedTuple):
    """A buffer before a forward pass: the tensor, which a pass may replace, and its values."""

    module: nn.Module
    name: str
    buffer: Tensor | None
    values: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, name: str) -> KeptBuffer:
        """A buffer as it is now."""
        buffer = getattr(module, name)
        return cls(module, name, buffer, None if buffer is None else buffer.detach().clone())

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


@contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores the modules' own buffers, whether they are changed in place or replaced."""
    kept = [KeptBuffer.of(m, n) for m in modules for n, _ in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer in kept:
            buffer.restore()
