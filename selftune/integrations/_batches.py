"""Validation batches drawn by (seed, step), so that resuming needs no saved position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

WHOLE = (SequentialSampler, RandomSampler, DistributedSampler)
"""Samplers that visit every example of their ``data_source`` or ``dataset``."""


KNOWN = {"torch", "torchdata", "accelerate", "lightning", "pytorch_lightning", "transformers"}
"""Packages whose loaders and samplers are known."""


class ValidationBatches:
    """Draws the validation batches of a training step.

    A batch is a uniform sample without replacement of the loader's dataset, or of the indices of
    its ``SubsetRandomSampler``, collated by the loader's ``collate_fn``. It depends only on (seed,
    step). The batches of n processes are the parts of one sample, so n processes with b examples
    each tune as one process with n b examples, if there are that many. Loaders without indexable
    examples (iterable datasets, samplers and batch samplers of another class) are read repeatedly
    in their own order; a resumed run starts at their beginning.

    Args:
        loader: A DataLoader, or any iterable of batches.
        seed: Seed of the random batches.

    Raises:
        ValueError: The loader has no batches.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> batches = ValidationBatches(DataLoader(range(100), batch_size=3))
        >>> next(batches.at(7)).tolist() == next(batches.at(7)).tolist()
        True
    """

    def __init__(self, loader: Iterable[Any], seed: int = 0) -> None:
        self._seed = seed
        self._draw = _sampled(loader)
        self._stream = None if self._draw is not None else _endless(loader)

    def at(self, *step: int) -> Iterator[Any]:
        """An endless iterator of batches for a step.

        Args:
            *step: Number of the step, or several numbers such as epoch and batch.
        """
        if self._draw is None:
            assert self._stream is not None
            while True:  # not ``yield from``, which closes the stream with this iterator
                yield next(self._stream)
        else:
            random = Random(f"{self._seed} 0 {step}")
            while True:
                yield self._draw(random)


def _sampled(loader: Iterable[Any]) -> Callable[[Random], Any] | None:
    """A function that draws a batch; None if examples are not indexable."""
    if isinstance(loader, Sequence) and loader:
        return partial(_element, loader)
    within = getattr(loader, "_dataloader", None)  # Fabric wraps loaders
    device = getattr(loader, "device" if within is None else "_device", None)  # Accelerate's, too
    draw = _drawn(loader if within is None else within)
    return draw if draw is None or device is None else partial(_moved, draw, device)


def _drawn(loader: Iterable[Any]) -> Callable[[Random], Any] | None:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    methods = (getattr(type(loader), name, None) for name in ("__iter__", "_get_iterator"))
    if not all(_known(method) for method in methods if method is not None):
        return None  # it may change its batches
    batched: Any = loader.batch_sampler
    shares = _shares(loader)
    while hasattr(batched, "batch_sampler"):  # Accelerate shards batch samplers by wrapping them
        batched = batched.batch_sampler
    if batched is not None and type(batched) is not BatchSampler:
        return None
    indices = _indices(loader.dataset, loader.sampler if batched is None else batched.sampler)
    if not indices:
        return None
    size = None if batched is None else min(batched.batch_size // shares, len(indices))
    return partial(_batch, loader, indices, size)


def _shares(loader: DataLoader[Any]) -> int:
    """Processes that divide each batch of a loader, with Accelerate's ``split_batches``."""
    split = any(getattr(o, "split_batches", False) for o in (loader, loader.batch_sampler))
    return _ranks()[1] if split else 1


# Functions of the module, not closures, so that an object that holds them can be pickled.
def _element(batches: Sequence[Any], random: Random) -> Any:
    return batches[_mine(random, range(len(batches)), 1)[0]]


def _batch(
    loader: DataLoader[Any], indices: Sequence[int], size: int | None, random: Random
) -> Any:
    chosen = _mine(random, indices, size or 1)
    if size is None:  # the dataset's items are batches
        return loader.collate_fn(loader.dataset[chosen[0]])
    together = getattr(loader.dataset, "__getitems__", None)  # as torch's own fetcher does
    examples = [loader.dataset[i] for i in chosen] if together is None else together(chosen)
    return loader.collate_fn(examples)


def _moved(draw: Callable[[Random], Any], device: Any, random: Random) -> Any:
    # transformers' BatchEncoding is no pytree, but has ``to``.
    return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, draw(random))


def _indices(dataset: Any, sampler: Any) -> Sequence[int] | None:
    """The indices of a sampler; None if unknown."""
    if type(sampler) is SubsetRandomSampler:
        return list(sampler.indices)
    own = getattr(sampler, "data_source", getattr(sampler, "dataset", None)) is dataset
    if own and isinstance(sampler, WHOLE) and _known(type(sampler).__iter__):
        return range(len(dataset))
    grouped = "LengthGroupedSampler" in type(sampler).__name__  # transformers'
    return range(len(dataset)) if grouped and len(sampler.lengths) == len(dataset) else None


def _known(method: Any) -> bool:
    """Whether a method is of a package whose loaders and samplers leave nothing out."""
    return str(method.__module__).partition(".")[0] in KNOWN


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty, batches, end = True, iter(loader), object()
        while True:
            with _apart(loader):
                batch = next(batches, end)
            if batch is end:
                break
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "the validation loader has no more batches: pass a DataLoader, or an iterable "
                "that can be iterated over again"
            )


@contextmanager
def _apart(loader: Any) -> Iterator[None]:
    """Keeps an open Accelerate loader from being the active one, at whose end gradients sync."""
    state = getattr(loader, "gradient_state", None)
    if state is None:
        yield
        return
    before = list(state.dataloader_references)
    try:
        yield
    finally:
        state.dataloader_references = before


def _mine(random: Random, indices: Sequence[int], size: int) -> list[int]:
    """This process's part of a random sample; all draw the same one, without replacement."""
    rank, ranks = _ranks()
    if ranks * size <= len(indices):
        return random.sample(indices, ranks * size)[rank * size : (rank + 1) * size]
    return [random.sample(indices, size) for _ in range(rank + 1)][-1]  # too few for all


def _ranks() -> tuple[int, int]:
    """The rank of this process, and their number."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not together:
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
