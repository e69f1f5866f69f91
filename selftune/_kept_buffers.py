"""Buffers as they were before a forward pass, which may change them or replace them."""

from __future__ import annotations

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
