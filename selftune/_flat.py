"""Concatenation of a list of tensors to one flat vector, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

FEW = 2**20  # values that are exchanged at a time
_HALF = (torch.float16, torch.bfloat16)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (DTensor); other tensors unchanged."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "to_local")


def plus(a: Tensor, b: Tensor, factor: float | Tensor) -> Tensor:
    """``a + factor · b``, in one operation if the factor is a number.

    torch 2.13's compiler loses ``alpha`` if it merges the sum with a matrix product.
    """
    if isinstance(factor, Tensor) or torch.compiler.is_compiling():
        return a + factor * b
    return torch.add(a, b, alpha=factor)


def add_to(target: Tensor, tensor: Tensor, factor: float | Tensor) -> Tensor:
    """``target += factor · tensor``, in place."""
    if isinstance(factor, Tensor) and factor.ndim == 0:
        return target.add_(tensor * factor)
    if isinstance(factor, Tensor):
        return target.addcmul_(tensor, factor.to(target.dtype).expand_as(tensor))
    if torch.compiler.is_compiling():  # as in ``plus``
        return target.add_(factor * tensor)
    return target.add_(tensor, alpha=factor)


def swap(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Exchange the values of two lists of tensors, a few at a time."""
    if sum(t.numel() for t in tensors) > FEW:
        for tensor, other in zip(tensors, others, strict=True):
            pair = [(tensor,), (other,)]
            if tensor.is_contiguous():
                pair = [t.view(-1).split(FEW) for t in (tensor, other)]
            for some, those in zip(*pair, strict=True):
                _swap([some], [those])
    elif tensors:
        _swap(list(tensors), list(others))


def _swap(tensors: list[Tensor], others: list[Tensor]) -> None:
    copies = [t.clone() for t in tensors]
    torch._foreach_copy_(tensors, others)
    torch._foreach_copy_(others, copies)


class Layout:
    """Positions of the tensors of a list in their flat concatenation.

    Half-precision tensors are stored in a float32 vector, so rule state, tangents and averages are
    accumulated in float32.

    Attributes:
        sizes: Number of elements of each tensor.
        numel: Length N of the vector.
        dtype: The vector's dtype.
        native: Whether the tensors are unsharded, on the CPU, and of the vector's dtype.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Take the order, shapes, dtype and device of ``tensors``."""
        self._sharded = any(hasattr(t, "to_local") for t in tensors)
        tensors = self._local(tensors)
        self.shapes = [t.shape for t in tensors]
        self.sizes = [t.numel() for t in tensors]
        self.numel = sum(self.sizes)
        self.device = tensors[0].device
        dtype = tensors[0].dtype
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        self.dtype = torch.float32 if dtype in _HALF else dtype
        whole = not self._sharded and self.device.type == "cpu"
        self.native = whole and all(t.dtype == self.dtype for t in tensors)

    def flatten(self, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """A vector of shape (N,) with the tensors' values: a new one, or ``out``."""
        parts = [t.ravel() for t in self._local(tensors)]
        return torch.cat(parts).to(self.dtype) if out is None else torch.cat(parts, out=out)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors as views of ``flat``; leading dimensions of ``flat`` are kept."""
        lead = flat.shape[:-1]
        parts = flat.split(self.sizes, dim=-1)
        return [p.view((*lead, *s)) for p, s in zip(parts, self.shapes, strict=True)]

    def write(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy the vector's values into ``tensors``, in place."""
        tensors = self._local(tensors)
        with torch.no_grad():
            torch._foreach_copy_(tensors, _unflatten_dense_tensors(flat, tensors))

    def _local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts; whether tensors are sharded is checked only once."""
        return [local(t) for t in tensors] if self._sharded else list(tensors)

    def expand(self, values: Sequence[float]) -> float | Tensor:
        """Expand one value per tensor to shape (N,), or to a number if all are equal."""
        if all(v == values[0] for v in values):
            return values[0]
        repeats = torch.tensor(self.sizes, device=self.device)
        return torch.tensor(values, dtype=self.dtype, device=self.device).repeat_interleave(
            repeats, output_size=self.numel
        )
