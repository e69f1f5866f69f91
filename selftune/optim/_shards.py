"""How state of parameters is saved: as torch saves it, so that it fits another number of ranks.

What is kept of every weight has the shape of the parameter, and is a DTensor where the parameter
is one. A slice of the weights is saved by rows of the parameter, ``(rows, most kept in a row)``
with zeros behind those that keep fewer, so that it is sharded as the parameter is; which weights
it holds depends on their place in the whole parameter alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from selftune._flat import local
from selftune.method.slices import Slice
from selftune.optim._reducer import is_sharded


def by_rows(param: Any) -> bool:
    """Whether each process holds a range of a parameter's rows: its slice can be saved by them."""
    if not is_sharded(param):
        return True
    from torch.distributed.tensor import Shard  # a second's import that few need

    split = [p for p in param.placements if not p.is_replicate()]
    return len(split) <= 1 and all(type(p) is Shard and p.dim == 0 for p in split)


def _rows(param: Any) -> range:
    """The rows of a parameter that this process holds."""
    rows = param.shape[0] if param.ndim else 1
    for dim, placement in enumerate(param.placements if is_sharded(param) else ()):
        if not placement.is_replicate():
            size = -(-rows // param.device_mesh.size(dim))  # as torch.chunk
            start = min(rows, param.device_mesh.get_local_rank(dim) * size)
            return range(start, min(rows, start + size))
    return range(rows)


def shard(cut: Slice, params: Sequence[Tensor]) -> Slice:
    """The part of a slice of whole parameters that this process holds."""
    if cut.stride == 1 or not any(is_sharded(p) for p in params):
        return cut
    firsts = cut.firsts([p.numel() for p in params])
    starts = [_rows(p).start * _length(p) for p in params]
    places = [(first - start) % cut.stride for first, start in zip(firsts, starts, strict=True)]
    sizes = [local(p).numel() for p in params]
    return Slice(cut.stride, tuple(zip(sizes, places, strict=True)))


def _length(param: Tensor) -> int:
    """Weights in a row."""
    return param.shape[1:].numel() if param.ndim else 1


def whole(param: Tensor, value: Tensor) -> Tensor:
    """This process's part of something like a parameter, as torch saves it."""
    if not is_sharded(param):
        return value
    return _sharded(param, value, param.shape)


def _sharded(param: Any, value: Tensor, shape: Sequence[int]) -> Tensor:
    """A DTensor that is split as a parameter, behind its own leading dimensions."""
    from torch.distributed.tensor import DTensor, Shard

    lead = value.ndim - len(shape)
    size = torch.Size((*value.shape[:lead], *shape))
    placements = [Shard(p.dim + lead) if isinstance(p, Shard) else p for p in param.placements]
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(
        value.contiguous().to(param.device), param.device_mesh, placements,
        run_check=False, shape=size, stride=stride,
    )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Where the kept weights of a parameter lie when they are saved by its rows.

    Attributes:
        param: The parameter.
        stride: Weights from one kept to the next.
        first: Place of the first kept weight in this process's part of it.
    """

    param: Tensor
    stride: int
    first: int

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, int]:
        """Row and column of each kept weight, and the most that a row keeps."""
        part, length = _rows(self.param), _length(self.param)
        start, end = part.start * length, part.stop * length
        first = start + self.first
        index = torch.arange(first, max(first, end), self.stride)
        row = index // length
        # The first kept weight of a row is the first place from its start on that is one.
        before = (index - row * length) // self.stride
        return row - part.start, before, -(-length // self.stride)

    def save(self, kept: Tensor) -> Tensor:
        """The kept weights, shape (…, kept), as (…, rows, most kept in a row)."""
        row, column, width = self._places
        rows = _rows(self.param)
        shape = (self.param.shape[0] if self.param.ndim else 1, width)
        table = kept.new_zeros((*kept.shape[:-1], len(rows), width))
        table[..., row, column] = kept
        if not is_sharded(self.param):
            return table
        return _sharded(self.param, table, shape)

    def load(self, table: Tensor) -> Tensor:
        """The kept weights from what ``save`` made of them."""
        row, column, _ = self._places
        return local(table)[..., row, column]
