"""Batches: tensors within containers of any kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


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
    """Examples in a batch on the device: the first dimension of its first tensor that has one."""
    first = _first(batch)
    return 1 if first is None else len(first)


def _first(batch: Any) -> Tensor | None:
    """The first tensor with a dimension in tuples and dictionaries, if any."""
    if isinstance(batch, Tensor):
        return batch if batch.ndim else None
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else ()
    return next((tensor for tensor in map(_first, parts) if tensor is not None), None)
