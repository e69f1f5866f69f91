"""Splitting a data set into training and validation parts."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, random_split


def split(train: Any, share: float, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Split a loader's data set at random: ``share`` of it for validation, the rest for training.

    Raises:
        ValueError: ``train`` is not a DataLoader over a data set with a length, has a custom
            sampler, or a part would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"val={share} must be between 0 and 1, or a loader of validation batches")
    if not isinstance(train, DataLoader) or train.batch_size is None:
        raise ValueError(
            f"val={share} (default: 0.1) splits the data set of a DataLoader with a batch_size, "
            f"but train is a {type(train).__name__}: pass such a DataLoader, or validation "
            "batches, fit(train, val)"
        )
    try:
        total = len(train.dataset)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f"val={share} needs a data set with a length: pass validation batches as val= instead"
        ) from None
    drawn = type(train.sampler) is RandomSampler and (
        train.sampler.replacement or train.sampler.num_samples != total
    )
    if drawn or type(train.sampler) not in (RandomSampler, SequentialSampler):
        raise ValueError(
            f"val={share} cannot keep the order of sampler={type(train.sampler).__name__}: split "
            "the data set yourself and pass validation batches as val="
        )
    held = round(share * total)
    if not 0 < held < total:
        raise ValueError(
            f"val={share} of {total} examples leaves {held} to validate and {total - held} to "
            "train on: pass another share, or validation batches"
        )
    generator = torch.Generator().manual_seed(seed)
    rest, chosen = random_split(train.dataset, [total - held, held], generator)

    def loader(data: Any, shuffle: bool, drop_last: bool) -> DataLoader[Any]:
        return DataLoader(
            data, batch_size=train.batch_size, shuffle=shuffle, num_workers=train.num_workers,
            collate_fn=train.collate_fn, pin_memory=train.pin_memory, drop_last=drop_last,
            worker_init_fn=train.worker_init_fn, generator=train.generator,
            persistent_workers=train.persistent_workers, timeout=train.timeout,
            prefetch_factor=train.prefetch_factor,
            multiprocessing_context=train.multiprocessing_context,
        )  # fmt: skip

    shuffled = isinstance(train.sampler, RandomSampler)
    return loader(rest, shuffled, train.drop_last), loader(chosen, True, False)
