"""Normalisation layers and their running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

kept_in: WeakKeyDictionary[nn.Module, list[list[Tensor]]] = WeakKeyDictionary()
"""What each optimizer that shows statistics in a layer keeps instead: first those of training."""


def places(params: Iterable[Tensor]) -> dict[int, int]:
    return {id(p): place for place, p in enumerate(params)}


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def exchanged(layer: nn.Module, own: Sequence[Tensor]) -> Sequence[Tensor]:
    """Where the statistics exchanged for others lie.

    In the layer, or with the optimizer that has shown others after them.
    """
    kept = kept_in.get(layer, [])
    after = [k for before, k in pairwise(kept) if before[0] is own[0]]
    return after[0] if after else statistics(layer)


def tracks(module: nn.Module) -> bool:
    """Whether a module is a layer with running statistics of its own."""
    mean = module.running_mean if isinstance(module, _NormBase) else None
    return mean is not None and not wrapped(mean)


def sound(layer: nn.Module) -> list[Tensor]:
    """The running statistics of a layer, reset if a batch had NaN before the start."""
    if not all(map(finite, statistics(layer))):
        layer.reset_running_stats()  # type: ignore[operator]
    return statistics(layer)


def wrapped(tensor: Tensor) -> bool:
    """Whether a tensor exists only inside a transform of ``torch.func``."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def statistics(layer: nn.Module) -> list[Tensor]:
    tensors = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    return [t for t in tensors if isinstance(t, Tensor)]
