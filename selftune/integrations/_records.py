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

MOST = 1000
"""Largest collection whose entries are looked at, and most entries of an object in all."""
COPIED = 10_000
"""Largest tensor or array that is copied, because a pass may change it in place."""
FRAMEWORKS = {
    "torch", "torchmetrics", "lightning", "pytorch_lightning", "transformers", "accelerate",
    "skorch", "ignite", "selftune", "builtins", "logging", "threading",
}  # fmt: skip
"""Packages whose objects do not record batches of a user's loss."""
OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes of every module: passes leave them alone, or they are restored elsewhere."""
ATOMS = (str, numbers.Number, type(None))
"""Values that cannot change, and have no entries."""
Undo = Callable[[], object]


@contextmanager
def records_kept(owners: Iterable[Any]) -> Iterator[None]:
    """Restores numbers, strings, small tensors, arrays, tuples and sets, and longer lists.

    Args:
        owners: Objects with such attributes. They may also be entries of their lists and
            dictionaries, or attributes of meters that they hold. If such an attribute is replaced,
            all are restored, as others may describe it; new ones are removed.
    """
    undo: list[Undo] = []
    seen: set[int] = set()
    for owner in owners:
        _note_table(vars(owner), undo, seen)
    try:
        yield
    finally:
        for restore in undo:
            restore()


@contextmanager
def silent(owner: Any) -> Iterator[None]:
    """Calls of an object's ``log`` have no effect within the block."""
    own = vars(owner).get("log")
    vars(owner)["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if own is None:
            del vars(owner)["log"]
        else:
            vars(owner)["log"] = own


def _records(value: Any) -> bool:
    """Whether an object, such as a meter, may record batches; data sets and loaders do not."""
    kind = type(value)
    if isinstance(value, (type, Tensor)) or not hasattr(value, "__dict__"):
        return False
    if all(hasattr(kind, name) for name in ("update", "compute", "reset")):  # of torchmetrics
        return True
    if isinstance(value, nn.Module):
        return False
    data = any(hasattr(value, name) for name in ("__getitem__", "__iter__", "__len__"))
    return not data and kind.__module__.partition(".")[0] not in FRAMEWORKS


def _note_table(table: MutableMapping[Any, Any], undo: list[Undo], seen: set[int]) -> None:
    """Note all attributes or entries, and what they hold."""
    before = {n: v for n, v in table.items() if n not in OF_TORCH}
    undo.append(partial(_restore_table, table, before))
    pending = deque(v for v in before.values() if not isinstance(v, ATOMS))
    for _ in range(MOST):
        if not pending:
            break
        entries = _note(pending.popleft(), undo, seen)
        pending.extend(e for e in entries if not isinstance(e, ATOMS))


def _note(value: Any, undo: list[Undo], seen: set[int]) -> list[Any]:
    """Note a value, and return its entries, or the attributes of a meter."""
    if id(value) in seen:
        return []
    if isinstance(value, Tensor):
        if value.numel() <= COPIED and not value.is_inference():
            undo.append(partial(_restore_tensor, value, value._version, value.detach().clone()))
        return []
    if isinstance(value, np.ndarray):
        if value.size <= COPIED and value.flags.writeable:
            undo.append(partial(_restore_array, value, value.copy()))
        return []
    if isinstance(value, deque):
        undo.append(partial(_restore_queue, value, list(value)))
        return []
    if isinstance(value, tuple):
        return list(value) if len(value) <= MOST else []
    if isinstance(value, set):
        if len(value) <= COPIED:
            undo.append(partial(_restore_set, value, set(value)))
        return []
    if _records(value):
        seen.add(id(value))
        before = dict(vars(value))
        undo.append(partial(_restore_table, vars(value), before))
        return list(before.values())
    if not isinstance(value, (dict, list)):
        return []
    seen.add(id(value))
    few = len(value) <= MOST
    if isinstance(value, dict):
        if few:
            undo.append(partial(_restore_entries, value, dict(value)))
        return list(value.values()) if few else []
    undo.append(partial(_restore_list, value, len(value), list(value) if few else None))
    return list(value) if few else []


def _is_record(value: Any) -> bool:
    small = isinstance(value, Tensor) and value.numel() <= COPIED
    return small or isinstance(value, (*ATOMS, np.ndarray, tuple, set))


def _restore_table(table: MutableMapping[Any, Any], before: dict[Any, Any]) -> None:
    """Restore the attributes if a record among them was replaced or is new."""
    new = [n for n in table if n not in before and n not in OF_TORCH and _is_new_record(table[n])]
    if new or any(_is_record(v) and table.get(n) is not v for n, v in before.items()):
        table.update(before)
    for name in new:
        del table[name]


def _restore_entries(table: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Restore records, and drop new ones; other new entries may be caches."""
    table.update({n: v for n, v in before.items() if _is_record(v)})
    for name in [n for n in table if n not in before]:
        if _is_new_record(table[name]):
            del table[name]


def _is_new_record(value: Any) -> bool:
    return _is_record(value) or isinstance(value, list)


def _restore_set(values: set[Any], before: set[Any]) -> None:
    values.intersection_update(before)
    values.update(before)


def _restore_tensor(tensor: Tensor, version: int, value: Tensor) -> None:
    if tensor._version != version and tensor.shape == value.shape:
        tensor.data.copy_(value)


def _restore_array(array: Any, value: Any) -> None:
    if array.shape == value.shape:
        np.copyto(array, value)


def _restore_queue(queue: deque[Any], before: list[Any]) -> None:
    queue.clear()
    queue.extend(before)


def _restore_list(values: list[Any], length: int, before: list[Any] | None) -> None:
    if before is None:
        del values[length:]
    else:
        values[:] = before
