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
    from torch.distributed.tensor import DTensor

    lead = value.ndim - len(shape)
    size = torch.Size((*value.shape[:lead], *shape))
    stride = torch.empty(size, device="meta").stride()
    value = value.contiguous().to(param.device)
    if value.storage_offset():  # torch.save and deepcopy refuse DTensors of such views
        value = value.clone()
    return DTensor.from_local(
        value, param.device_mesh, _placements(param, lead), run_check=False, shape=size,
        stride=stride,
    )  # fmt: skip


def _placements(param: Any, lead: int) -> list[Any]:
    """Those of a parameter, after additional leading dimensions."""
    from torch.distributed.tensor import Shard

    return [Shard(p.dim + lead) if isinstance(p, Shard) else p for p in param.placements]


def _part(param: Any, value: Tensor, shape: Sequence[int]) -> Tensor:
    """This process's part of a saved tensor.

    In a full state dict, torch shards only what a new optimizer keeps under the same key. The rest
    is whole, with dimensions of the given shape after additional leading ones.
    """
    lead = value.ndim - len(shape)
    whole = lead >= 0 and value.shape[lead:] == torch.Size(shape)
    if not is_sharded(param) or is_sharded(value) or not whole:
        return local(value)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(param.device), param.device_mesh, _placements(param, lead), src_data_rank=None
    ).to_local()


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
        table = kept.new_zeros((*kept.shape[:-1], len(rows_of(self.param)), width))
        table[..., row, column] = kept
        return _sharded(self.param, table, self._shape) if is_sharded(self.param) else table

    def load(self, saved: Tensor, view: Tensor) -> Tensor | None:
        """Saved state in the shape of a view; None if the parameter had another shape."""
        if local(saved).shape == view.shape:
            return local(saved)
        part = _part(self.param, saved, self.param.shape)
        if part.shape == view.shape:
            return part
        row, column, width = self._places
        table = _part(self.param, saved, self._shape)
        fits = table.shape == (*view.shape[:-1], len(rows_of(self.param)), width)
        return table[..., row, column] if fits and self.stride > 1 else None

    @property
    def _shape(self) -> tuple[int, int]:
        """The shape of a slice in the row format, in all processes."""
        return self.param.shape[0] if self.param.ndim else 1, self._places[2]
