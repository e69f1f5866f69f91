"""Weights of which each process holds a range of rows (FSDP2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selftune._flat import is_sharded
from selftune.method.slices import Slice


def by_rows(param: Any) -> bool:
    """Whether each process holds a range of a parameter's rows, so that slices can be sharded."""
    if not is_sharded(param):
        return True
    from torch.distributed.tensor import Shard  # takes a second to import, and is rarely needed

    split = [p for p in param.placements if not p.is_replicate()]
    return len(split) <= 1 and all(type(p) is Shard and p.dim == 0 for p in split)


def copies(param: Any, processes: int) -> int:
    """In how many processes each element of a parameter is."""
    for dim, placement in enumerate(param.placements if is_sharded(param) else ()):
        if not placement.is_replicate():
            processes //= param.device_mesh.size(dim)
    return processes


def rows_of(param: Any, rank: int | None = None) -> range:
    """The rows of a parameter in a process, by default in this one."""
    rows = param.shape[0] if param.ndim else 1
    for dim, placement in enumerate(param.placements if is_sharded(param) else ()):
        if not placement.is_replicate():
            size = -(-rows // param.device_mesh.size(dim))  # as torch.chunk
            place = param.device_mesh.get_local_rank(dim) if rank is None else rank
            start = min(rows, place * size)
            return range(start, min(rows, start + size))
    return range(rows)


def shard(cut: Slice, params: Sequence[Tensor], rank: int | None = None) -> Slice:
    """The part of a slice of whole parameters in a process, by default in this one."""
    if cut.stride == 1 or not any(is_sharded(p) for p in params):
        return cut
    firsts, parts = cut.firsts([p.numel() for p in params]), [rows_of(p, rank) for p in params]
    lengths = [row_length(p) for p in params]
    starts = [part.start * length for part, length in zip(parts, lengths, strict=True)]
    places = [(first - start) % cut.stride for first, start in zip(firsts, starts, strict=True)]
    sizes = [len(part) * length for part, length in zip(parts, lengths, strict=True)]
    return Slice(cut.stride, tuple(zip(sizes, places, strict=True)))


def row_length(param: Tensor) -> int:
    """Weights in a row."""
    return param.shape[1:].numel() if param.ndim else 1
