"""A rank's part of the batches of a single process."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

REMEDY = "among ranks: pass a DataLoader with num_workers=1 or more, whose indices are divided"


class RankBatches:
    """Makes loaders yield this rank's part of each batch.

    With worker processes, a DataLoader over an indexable dataset loads only this part. Other
    loaders are read whole on every rank, with the same random numbers, and their batches are
    divided along the first dimension.

    If a rank would get none or only one example of the last batch (BatchNorm does not support one)
    but usually has more, all ranks take the whole batch, which has the same mean.
    """

    def __init__(self, name: str, rank: int, ranks: int) -> None:
        self._name, self._rank, self._ranks = name, rank, ranks
        self._usual = 0  # examples in the first batch

    @property
    def least(self) -> int:
        """Examples in the smallest part of a usual batch."""
        return self._usual // self._ranks

    def __call__(self, loader: Any) -> Any:
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):
            raise ValueError(
                f"{self._name} has a DistributedSampler: pass the DataLoader of a single "
                "process, because the tuner gives each rank its part of every batch"
            )
        groups = getattr(loader, "batch_sampler", None)
        indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if not indexed or groups is None or loader.num_workers == 0:
            return _Parts(steady(loader), self._cut)
        vars(loader)["batch_sampler"] = _Indices(groups, self._bounds)  # DataLoader forbids this
        return steady(loader, self._rank)

    def _bounds(self, count: int) -> slice:
        """The range of this rank's examples."""
        self._usual = self._usual or count
        if self._usual < self._ranks:
            raise ValueError(
                f"{self._name}: batches of {self._usual} cannot be divided among {self._ranks} "
                "ranks: raise the batch size, of which each rank takes its part, or use fewer ranks"
            )
        if count // self._ranks < min(2, self._usual // self._ranks):
            return slice(None)
        ends = (count * r // self._ranks for r in (self._rank, self._rank + 1))
        return slice(*ends)

    def _cut(self, batch: Any) -> Any:
        return cut(batch, self._bounds, self._name, REMEDY)


def cut(batch: Any, bounds: Callable[[int], slice], name: str, remedy: str) -> Any:
    """A range of the examples of a batch.

    ``bounds`` returns the range, given the number of examples; ``remedy`` says in messages why the
    batch is divided and what to do instead.
    """
    batch = dict(batch.items()) if hasattr(batch, "items") else batch
    arrays = [t for t in tree_leaves(batch) if isinstance(t, (Tensor, np.ndarray)) and t.ndim]
    whole = not arrays and not isinstance(batch, (tuple, list))  # refused
    count = 1 if whole else len(arrays[0] if arrays else batch)
    part = slice(None) if whole else bounds(count)

    def of(batch: Any) -> Any:
        if isinstance(batch, (Tensor, np.ndarray)):
            if batch.ndim and len(batch) != count:
                raise ValueError(
                    f"{name}: a batch of {count} examples holds a tensor of shape "
                    f"{tuple(batch.shape)}, which cannot be divided along its first dimension "
                    f"{remedy}"
                )
            if not batch.ndim:
                return batch
            return batch[part].contiguous() if isinstance(batch, Tensor) else batch[part]
        if hasattr(batch, "items"):
            return {k: of(v) for k, v in batch.items()}
        if isinstance(batch, (tuple, list)) and not hasattr(batch, "to"):
            if not any(isinstance(b, (Tensor, np.ndarray, dict, tuple, list)) for b in batch):
                return batch[part] if len(batch) == count else batch
            parts = [of(b) for b in batch]
            return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
        if isinstance(batch, (str, bytes, int, float, type(None))):
            return batch
        raise ValueError(f"{name}: a {type(batch).__name__} in a batch cannot be divided {remedy}")

    return of(batch)


def steady(loader: Any, rank: int = 0) -> Any:
    """Modify a loader so that its workers ignore Ctrl-C and draw different numbers on each rank."""
    if isinstance(loader, DataLoader):
        vars(loader)["worker_init_fn"] = partial(_start_worker, rank, loader.worker_init_fn)
    return loader


class _Parts:
    """Parts of the batches of a loader."""

    def __init__(self, loader: Any, cut: Callable[[Any], Any]) -> None:
        self._loader, self._cut = loader, cut

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return map(self._cut, self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Indices:
    """Parts of the indices of each batch."""

    def __init__(self, groups: Any, bounds: Callable[[int], slice]) -> None:
        self._groups, self._bounds = groups, bounds
        self.sampler = getattr(groups, "sampler", None)
        self.generator = getattr(groups, "generator", None)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Any]:
        for indices in map(list, self._groups):
            yield indices[self._bounds(len(indices))]


def _start_worker(rank: int, then: Callable[[int], None] | None, worker: int) -> None:
    """Initialise a worker of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if rank:
        seed = (torch.initial_seed() + (rank << 32)) % 2**63
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed([seed >> 32, seed & 0xFFFFFFFF])  # noqa: NPY002 - data sets use it
    if then is not None:
        then(worker)
