"""Batches that grow with the gradient noise scale."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler

from selftune.monitor import Monitor
from selftune.structure.noise_scale import NoiseScale

log = logging.getLogger("selftune")


class Batches(Sampler[list[int]]):
    """Batch sampler that adjusts the batch size to the noise scale between epochs.

    Pass it as ``DataLoader(dataset, batch_sampler=…)``; batches are shuffled. At the start of each
    epoch the size is set to the power of two nearest to the noise scale, within bounds and within
    a factor of two of the previous size. Early in a run the noise scale is small, and small batches
    make better use of each example; later it grows, and larger batches are just as efficient.

    Args:
        dataset: A dataset of known length.
        start: Batch size in the first epoch.
        most: Largest batch size, for example the largest that fits in memory.
        least: Smallest batch size; by default ``start``.
        scale: Estimator of the noise scale; by default a new one, available as ``batches.scale``.
        drop_last: Whether to drop an incomplete last batch.
        seed: Seed of the shuffling, which differs in each epoch.
        recorder: Where ``structure/batch_size`` and ``structure/noise_scale`` are logged at the
            start of each epoch; the same types as ``log_dir`` of the optimizers.

    Attributes:
        size: Batch size of the current epoch.
        scale: The noise-scale estimator, to be updated in the training loop.
        epoch: Number of epochs started.

    Raises:
        ValueError: ``least ≤ start ≤ most`` is violated, or the dataset has no length or is empty.

    Examples:
        >>> batches = Batches(range(1000), start=32, most=256)
        >>> [len(batch) for batch in batches][:2], len(batches)
        ([32, 32], 32)
        >>> batches.scale.observe(1 + 60 / 16, 1 + 60 / 32, 16, 32)  # a noise scale of 60
        >>> len(next(iter(batches)))
        64
    """

    def __init__(
        self,
        dataset: Sized,
        start: int = 32,
        most: int = 1024,
        *,
        least: int | None = None,
        scale: NoiseScale | None = None,
        drop_last: bool = False,
        seed: int = 0,
        recorder: Any = None,
    ) -> None:
        least = start if least is None else least
        if not 1 <= least <= start <= most:
            raise ValueError(
                f"least={least}, start={start}, most={most} must be in this order and at least 1"
            )
        try:
            count = len(dataset)
        except TypeError as error:
            raise ValueError(
                f"dataset={type(dataset).__name__} has no length: batches of a stream cannot be "
                "resized here; accumulate gradients over scale.value examples instead"
            ) from error
        if count == 0:
            raise ValueError("dataset is empty")
        self.size, self.epoch = start, 0
        self.scale = NoiseScale() if scale is None else scale
        self._count, self._least, self._most = count, least, min(most, max(count, start))
        self._drop_last, self._seed = drop_last, seed
        self._monitor, self._taken = Monitor(recorder), 0

    def __len__(self) -> int:
        """Number of batches in an epoch at the current batch size."""
        whole = self._count // self.size
        return whole if self._drop_last else math.ceil(self._count / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        """Start a new epoch, adjusting the batch size."""
        self._resize()
        self.epoch += 1
        self._log()
        generator = torch.Generator().manual_seed(self._seed * 2**20 + self.epoch)
        order, size = torch.randperm(self._count, generator=generator).tolist(), self.size
        end = self._count - (self._count % size if self._drop_last else 0)
        return (order[i : min(i + size, end)] for i in range(0, end, size))

    def _log(self) -> None:
        """Log the new epoch, at the number of batches before it."""
        rows = [("structure/batch_size", float(self.size))]
        if math.isfinite(self.scale.value):
            rows.append(("structure/noise_scale", self.scale.value))
        self._monitor.scalars(rows, self._taken)
        self._monitor.flush()
        self._taken += len(self)

    def _resize(self) -> None:
        noise = self.scale.value
        if math.isnan(noise):
            return
        wanted = 2.0 ** round(math.log2(min(max(noise, 1.0), 2.0 * self.size)))
        wanted = min(max(wanted, self.size / 2), 2 * self.size)
        size = int(min(max(wanted, self._least), self._most))
        if size != self.size:
            log.info(
                "batches of %d examples instead of %d: the noise scale is %.3g",
                size, self.size, noise,
            )  # fmt: skip
        self.size = size

    def state_dict(self) -> dict[str, Any]:
        """Size, epoch, noise scale. Save it between epochs: a partial epoch cannot be resumed."""
        own = {"size": self.size, "epoch": self.epoch, "taken": self._taken}
        return {**own, "scale": self.scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the epoch that follows the saved one.

        Raises:
            ValueError: The saved batch size is outside the bounds.
        """
        size = int(state["size"])
        if not self._least <= size <= self._most:
            raise ValueError(
                f"state has batches of {size} examples, outside least={self._least} and "
                f"most={self._most}: pass the same least= and most="
            )
        self.size, self.epoch, self._taken = size, int(state["epoch"]), int(state["taken"])
        self.scale.load_state_dict(state["scale"])
