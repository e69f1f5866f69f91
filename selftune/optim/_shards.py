"""Saved state of parameters in torch's format, loadable on any number of ranks.

State over all weights has the shape of the parameter, and is a DTensor if the parameter is one. A
slice of the weights is saved by rows of the parameter, ``(rows, largest number in a row)``, padded
with zeros, so that it is sharded like the parameter. Its weights depend only on positions in the
whole parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from selftune._flat import is_sharded, local
from selftune.method.shards import row_length, rows_of


def whole(param: Tensor, value: Tensor) -> Tensor:
    """This process's part of a tensor shaped like a parameter, in torch's format."""
    if not is_sharded(param):
        return value
    return _sharded(param, value, param.shape)


def _sharded(param: Any, value: Tensor, shape: Sequence[int]) -> Tensor:
    """A DTensor sharded like a parameter, with additional leading dimensions."""
    from torch.distributed.tensor import DTensor, Shard

    lead = value.ndim - len(shape)
    size = torch.Size((*value.shape[:lead], *shape))
    placements = [Shard(p.dim + lead) if isinstance(p, Shard) else p for p in param.placements]
    stride = torch.empty(size, device="meta").stride()
    value = value.contiguous().to(param.device)
    if value.storage_offset():  # torch.save and deepcopy refuse DTensors of such views
        value = value.clone()
    return DTensor.from_local(
        value, param.device_mesh, placements, run_check=False, shape=size, stride=stride
    )


@dataclass(frozen=True)
class Rows:
    """Positions of the slice of a parameter in the row format.

    Attributes:
        stride: Distance between two weights of the slice.
        first: Position of the first weight of the slice in this process's part.
    """

    param: Tensor
    stride: int
    first: int

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, int]:
        """Row and column of each weight of the slice, and the largest number in a row."""
        part, length = rows_of(self.param), row_length(self.param)
        start, end = part.start * length, part.stop * length
        first = start + self.first
        index = torch.arange(first, max(first, end), self.stride, device="cpu")
        row = index // length
        # Number of slice weights that precede each one in its row.
        before = (index - row * length) // self.stride
        return row - part.start, before, -(-length // self.stride)

    def save(self, kept: Tensor) -> Tensor:
        """Convert a slice of shape (…, slice) to (…, rows, largest number in a row)."""
        row, column, width = self._places
        rows = rows_of(self.param)
        shape = (self.param.shape[0] if self.param.ndim else 1, width)
        table = kept.new_zeros((*kept.shape[:-1], len(rows), width))
        table[..., row, column] = kept
        if not is_sharded(self.param):
            return table
        return _sharded(self.param, table, shape)

    def fits(self, saved: Tensor, view: Tensor) -> bool:
        """Whether a saved tensor has the shape of a view, or that of its rows."""
        if local(saved).shape == view.shape:
            return True
        rows = (*view.shape[:-1], len(rows_of(self.param)), self._places[2])
        return self.stride > 1 and local(saved).shape == rows

    def load(self, table: Tensor) -> Tensor:
        row, column, _ = self._places
        return local(table)[..., row, column]
