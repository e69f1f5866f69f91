"""What a model or trainer records of its batches, to which tuning passes must not add."""

from __future__ import annotations

import numbers
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

MOST = 10_000
"""Largest collection or array of records; larger ones are caches or data."""
FRAMEWORKS = {
    "torch", "torchmetrics", "lightning", "pytorch_lightning", "transformers", "accelerate",
    "skorch", "ignite", "selftune", "builtins", "logging", "threading",
}  # fmt: skip
"""Packages whose objects do not record batches of a user's loss."""
OF_TORCH = {"_parameters", "_buffers", "_modules"}
"""Attributes of modules that passes leave alone, or that are kept otherwise."""
Undo = Callable[[], object]


@contextmanager
def records_kept(owners: Iterable[Any]) -> Iterator[None]:
    """Restores numbers and small tensors or arrays, and lists that are appended to.

    Args:
        owners: Objects with such attributes. They may also be entries of their lists and
            dictionaries, or attributes of objects that they hold, as of an average's.
    """
    undo: list[Undo] = []
    seen: set[int] = set()
    for owner in owners:
        _note_table(vars(owner), undo, seen)
        for value in list(vars(owner).values()):
            own = type(value).__module__.partition(".")[0] not in FRAMEWORKS
            if own and hasattr(value, "__dict__") and not isinstance(value, (Tensor, nn.Module)):
                _note_table(vars(value), undo, seen)
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _note_table(table: MutableMapping[Any, Any], undo: list[Undo], seen: set[int]) -> None:
    """Note the records among attributes or entries."""
    before = {n: v for n, v in table.items() if _is_record(v)}
    undo.append(partial(_restore_entries, table, before))
    for value in [v for n, v in table.items() if n not in OF_TORCH]:
        _note(value, undo, seen)


def _note(value: Any, undo: list[Undo], seen: set[int]) -> None:
    """Note what a value holds."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor) and value.numel() <= MOST and not value.is_inference():
        undo.append(partial(_restore_tensor, value, value._version, value.detach().clone()))
    elif isinstance(value, np.ndarray) and value.size <= MOST and value.flags.writeable:
        undo.append(partial(np.copyto, value, value.copy()))
    elif isinstance(value, deque):
        undo.append(partial(_restore_queue, value, list(value)))
    elif isinstance(value, dict) and len(value) <= MOST:
        undo.append(partial(_drop_new, value, set(value)))
        _note_table(value, undo, seen)
    elif isinstance(value, list):
        few = len(value) <= MOST
        before = {i: v for i, v in enumerate(value) if _is_record(v)} if few else {}
        undo.append(partial(_restore_list, value, len(value), before))
        for entry in value if few else ():
            _note(entry, undo, seen)


def _is_record(value: Any) -> bool:
    return isinstance(value, numbers.Number) or (
        isinstance(value, Tensor) and value.numel() <= MOST
    )


def _restore_entries(table: MutableMapping[Any, Any], before: dict[Any, Any]) -> None:
    for name, value in before.items():
        if table.get(name) is not value:
            table[name] = value


def _restore_tensor(tensor: Tensor, version: int, value: Tensor) -> None:
    if tensor._version != version:
        tensor.data.copy_(value)


def _restore_queue(queue: deque[Any], before: list[Any]) -> None:
    queue.clear()
    queue.extend(before)


def _restore_list(values: list[Any], length: int, before: dict[int, Any]) -> None:
    del values[length:]
    for index, value in before.items():
        if index < len(values):
            values[index] = value


def _drop_new(table: dict[Any, Any], names: set[Any]) -> None:
    """Drop new records; other new entries may be caches."""
    for name in [n for n, v in table.items() if n not in names]:
        if _is_record(table[name]) or isinstance(table[name], list):
            del table[name]
