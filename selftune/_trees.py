"""Traversal of nested tensors; torch's pytree takes as long as a small network's step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dictionaries, always in the same order."""
    tensors: list[Tensor] = []
    _gather(tree, tensors)
    return tensors


def copy_into(old: Any, new: Any) -> None:
    """Write the tensors of a tree into those of another one of the same structure."""
    for tensor, value in zip(leaves(old), leaves(new), strict=True):
        if value is not tensor:
            tensor.copy_(value)


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restores the values of tensors after the block."""
    tensors = list(tensors)
    before = [t.clone() for t in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)  # equal to what a graph may have saved, so no new version


def _gather(tree: Any, tensors: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        tensors.append(tree)
    elif isinstance(tree, dict):
        for value in tree.values():
            _gather(value, tensors)
    else:
        for value in tree:
            _gather(value, tensors)
