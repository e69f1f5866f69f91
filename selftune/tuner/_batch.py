"""Batches: tensors within containers of any kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device; arrays become tensors."""
    if isinstance(batch, Tensor):
        if batch.device == device:
            return batch
        if device.type == "cuda" and batch.device.type == "cpu":
            return batch.pin_memory().to(device, non_blocking=True)
        return batch.to(device)
    if type(batch) in (tuple, list):  # the usual case, tested before slower look-ups
        return tuple([to_device(b, device) for b in batch])
    if hasattr(batch, "items") and not hasattr(batch, "__array__"):  # a data frame is an array
        return {k: to_device(v, device) for k, v in batch.items()}
    if hasattr(batch, "to"):  # packed sequences, graphs
        return batch.to(device)
    if hasattr(batch, "_fields"):
        return type(batch)(*(to_device(b, device) for b in batch))
    if isinstance(batch, (tuple, list)):
        return tuple([to_device(b, device) for b in batch])
    if hasattr(batch, "__array__"):
        array = np.asarray(batch)  # that of a data frame is read-only
        return torch.as_tensor(array if array.flags.writeable else array.copy()).to(device)
    return batch


def copied(batch: Any) -> Any:
    """A copy of a batch on the device, which a pass may change in place.

    Objects that cannot be copied are shared.
    """
    if isinstance(batch, Tensor):
        return batch.clone()
    if type(batch) is tuple:
        return tuple([copied(b) for b in batch])
    if isinstance(batch, dict):
        return {k: copied(v) for k, v in batch.items()}
    if hasattr(batch, "_fields") and not isinstance(batch, PackedSequence):
        return type(batch)(*map(copied, batch))
    try:
        return copy.deepcopy(batch)
    except Exception:  # of the user's class: a handle of a file, a tensor with a graph
        return batch


def structure(batch: Any, top: bool = True) -> Any:
    """Properties that must be equal in all batches: containers, keys, dtypes.

    Sequences within a batch may have any length: captions, boxes of an image.
    """
    if isinstance(batch, Tensor):
        return batch.dtype
    if isinstance(batch, dict):
        return {k: structure(v, False) for k, v in batch.items()}
    if isinstance(batch, tuple) and top:
        return tuple([structure(b, False) for b in batch])
    return type(batch).__name__


def size(batch: Any) -> int:
    """Examples in a batch on the device, by its first tensor with a dimension.

    Tensors inside sequences count only if there are no others: they may be single examples, such as
    images of several sizes. Sequences of dictionaries, names or alike, or of tensors that differ in
    length, have an example in each entry.
    """
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if not isinstance(batch, (dict, tuple, list)):
        # Graphs of PyTorch Geometric and DGL know their number; others, as dataclasses, are read.
        counts = [getattr(batch, name, None) for name in ("num_graphs", "batch_size")]
        if known := [count for count in counts if isinstance(count, int)]:
            return known[0]
        batch = getattr(batch, "__dict__", {})
    parts = list(batch.values()) if isinstance(batch, dict) else batch
    found = (p for p in parts if isinstance(p, (PackedSequence, Tensor)))
    first = next((p for p in found if isinstance(p, PackedSequence) or p.ndim), None)
    return _within(parts) if first is None else size(first)


def _within(parts: Sequence[Any]) -> int:
    """Examples in the first dictionary or sequence."""
    rows = [part for part in parts if type(part) is tuple and part]
    apart = any(not isinstance(each, (Tensor, tuple)) for row in rows for each in row)
    apart |= any(len(set(map(size, row))) > 1 for row in rows)
    first = next((p for p in parts if isinstance(p, dict) or (type(p) is tuple and p)), None)
    if first is None:
        return 1
    return len(first) if apart and type(first) is tuple else size(first)
