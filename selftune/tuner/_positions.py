"""Positions of streams of batches that can say where they are."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from selftune.tuner._checkpoints import plain

log = logging.getLogger("selftune")


def stateful(loader: Any) -> bool:
    """Whether a stream has a position of its own."""
    methods = (getattr(loader, name, None) for name in ("state_dict", "load_state_dict"))
    return all(map(callable, methods))


def position(loader: Any) -> Any:
    """A stream's own position; None if it has none, or restarts by itself, as DataLoaders do."""
    if isinstance(loader, (DataLoader, Iterator)) or not stateful(loader):
        return None
    try:
        place = loader.state_dict()
    except Exception as error:
        log.info("%s has no position before its first batch: %s", type(loader).__name__, error)
        return None
    return copy.deepcopy(place) if plain(place) else None


def restarts(loader: Any) -> bool:
    """Whether a second iteration certainly begins like the first.

    An iterable, or a sampler, of the user's may count its passes, as in a curriculum.
    """
    if not isinstance(loader, DataLoader):
        return isinstance(loader, Sequence)
    parts = (getattr(loader, n, None) for n in ("sampler", "batch_sampler"))
    known = all(type(p).__module__.startswith(("torch.", "selftune.", "builtins")) for p in parts)
    return known and not isinstance(loader.dataset, IterableDataset)


@contextmanager
def read_from(loader: Any, place: Any) -> Iterator[None]:
    """Within the block a stream is read from this position; afterwards from where it was."""
    now = None if place is None else position(loader)
    if now is None:
        yield
        return
    loader.load_state_dict(copy.deepcopy(place))
    try:
        yield
    finally:
        loader.load_state_dict(now)
