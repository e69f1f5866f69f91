"""What a model or trainer records of its batches, to which tuning passes must not add."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

MOST = 1000
"""Largest collection whose entries may be lists of outputs, and largest tensor of counts."""


@contextmanager
def records_kept(owners: Iterable[Any]) -> Iterator[None]:
    """Restores numbers and small tensors, and shortens lists that are appended to.

    Args:
        owners: Objects with such attributes. Lists may also be entries of lists and dictionaries.
    """
    attributes = [vars(owner) for owner in owners]
    entries = [(table, n, v) for table in attributes for n, v in table.items()]
    numbers = [e for e in entries if isinstance(e[2], (bool, int, float))]
    small = [e for e in entries if isinstance(e[2], Tensor) and e[2].numel() <= MOST]
    copies = [(tensor, tensor._version, tensor.detach().clone()) for *_, tensor in small]
    collections: dict[int, tuple[Any, int]] = {}
    for *_, value in entries:
        _find(value, collections)
    try:
        yield
    finally:
        for table, name, value in (*numbers, *small):
            table[name] = value
        for tensor, version, value in copies:
            if tensor._version != version:
                tensor.data.copy_(value)
        for collection, length in collections.values():
            if isinstance(collection, list):
                del collection[length:]
                continue
            for key in list(collection)[length:]:
                if isinstance(collection[key], list):
                    del collection[key]


def _find(value: Any, found: dict[int, tuple[Any, int]]) -> None:
    """Add lists and dictionaries within a value, with their lengths."""
    if not isinstance(value, (list, dict)) or id(value) in found:
        return
    if isinstance(value, list) or len(value) <= MOST:
        found[id(value)] = value, len(value)
    if len(value) <= MOST:
        for entry in list(value.values()) if isinstance(value, dict) else value:
            _find(entry, found)
