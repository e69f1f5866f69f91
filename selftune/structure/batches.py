"""Batches that grow with the gradient noise scale."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler

from selftune._arguments import COUNT, FLAG, FUNCTION, NONE, Instance, Number, Whole, checked
from selftune.monitor import Monitor
from selftune.structure.noise_scale import NoiseScale

log = logging.getLogger("selftune")


class Batches(Sampler[list[int]]):
    """Batch sampler that adjusts the batch size to the noise scale during a run.

    Pass it as ``DataLoader(dataset, batch_sampler=…)``; batches are shuffled. At the start of each
    epoch and every ``interval`` batches the size is set to the power of two nearest to the noise
    scale N, within bounds and within a factor of two of the previous size. Early in a run the noise
    scale is small, and small batches make better use of each example; later it grows, and larger
    batches are just as efficient.

    A target loss takes a number of steps proportional to 1 + N / B, and a step a time proportional
    to ``overhead`` + B. With ``overhead=`` the size is therefore √(overhead · N), at which their
    product, the time to the target, is lowest.

    Args:
        dataset: A dataset of known length.
        start: Batch size in the first epoch.
        most: Largest batch size, for example the largest that fits in memory.
        least: Smallest batch size; by default ``start``.
        scale: Estimator of the noise scale; by default a new one, available as ``batches.scale``.
        interval: Number of batches after which the size changes within an epoch; None for never.
        overhead: Fixed time of a step, divided by the additional time of one example
            (:func:`step_overhead`). If None, examples count instead of time.
        drop_last: Whether to drop an incomplete last batch.
        seed: Seed of the shuffling, which differs in each epoch.
        recorder: Where ``structure/batch_size`` and ``structure/noise_scale`` are logged at the
            start of each epoch and whenever the size is adjusted; the same types as ``log_dir`` of
            the optimizers.

    Attributes:
        size: Current batch size.
        scale: The noise-scale estimator, to be updated in the training loop.
        least: Smallest batch size.
        epoch: Number of epochs started.
        entries: Batch size and noise scale, if known, as they are logged.

    Raises:
        ValueError: ``least ≤ start ≤ most`` is violated, ``interval`` or ``overhead`` is not
            positive, or the dataset has no length or is empty.

    Examples:
        >>> batches = Batches(range(1000), start=32, most=256)
        >>> [len(batch) for batch in batches][:2], len(batches)
        ([32, 32], 32)
        >>> batches.scale.observe(1 + 60 / 16, 1 + 60 / 32, 16, 32)  # a noise scale of 60
        >>> len(next(iter(batches)))
        64

    Source: McCandlish et al. 2018, section 2.3 (steps and examples to a target).
    """

    @checked(
        start=COUNT,
        most=COUNT,
        least=COUNT | NONE,
        scale=Instance((NoiseScale,), "an st.structure.NoiseScale") | NONE,
        interval=COUNT | NONE,
        overhead=Number(above=0, finite=False) | NONE,
        drop_last=FLAG,
        seed=Whole(),
    )
    def __init__(
        self,
        dataset: Sized,
        start: int = 32,
        most: int = 1024,
        *,
        least: int | None = None,
        scale: NoiseScale | None = None,
        interval: int | None = 50,
        overhead: float | None = None,
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
        self.least = least
        self._count, self._most = count, min(most, max(count, start))
        self._interval, self._overhead = interval, overhead
        self._drop_last, self._seed = drop_last, seed
        self._monitor, self._taken = Monitor(recorder), 0
        self._start = start
        self._drawn: list[int] = []  # sizes of the batches of this epoch
        self._last = 0  # examples in the last one
        self._ended = True  # whether all of them are drawn
        self._again: list[int] = []  # sizes of the batches to repeat

    def __len__(self) -> int:
        """Number of batches in an epoch at the current batch size."""
        whole = self._count // self.size
        return whole if self._drop_last else math.ceil(self._count / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        """Start a new epoch, adjusting the batch size."""
        # At the first batch: a DataLoader with workers makes an iterator that it does not use.
        again, self._again, self._drawn, self._ended = self._again, [], [], False
        if not again:
            self._resize()
        self.epoch += 1
        generator = torch.Generator().manual_seed(self._seed * 2**20 + self.epoch)
        order: list[int] = torch.randperm(self._count, generator=generator, device="cpu").tolist()
        place = 0
        for number in itertools.count():
            ends = self._count - place < (self.size if self._drop_last else 1)
            if number < len(again):
                self.size = again[number]
            elif number and self._interval and number % self._interval == 0 and not ends:
                self._resize()
            batch = list(order[place : place + self.size])
            if not batch or (self._drop_last and len(batch) < self.size):
                # The next epoch adjusts the size of a batch that was drawn.
                self.size = self._drawn[-1] if self._drawn else self.size
                self._ended = True
                return
            place += len(batch)
            self._taken += 1
            self._drawn.append(self.size)
            self._last = len(batch)
            yield batch

    def _resize(self) -> None:
        noise = self.scale.value
        if not math.isnan(noise):
            best = max(noise, 1.0)
            if self._overhead is not None:
                best = max(math.sqrt(self._overhead * best), 1.0)
            wanted = 2.0 ** round(math.log2(min(best, 2.0 * self.size)))
            wanted = min(max(wanted, math.ceil(self.size / 2)), 2 * self.size)
            size = int(min(max(wanted, self.least), self._most))
            if size != self.size:
                log.info(
                    "batches of %d examples instead of %d: the noise scale is %.3g",
                    size, self.size, noise,
                )  # fmt: skip
            self.size = size
        self._monitor.scalars(self.entries, self._taken)  # at the number of batches so far
        self._monitor.flush()

    @property
    def initial_length(self) -> int:
        """Number of batches in an epoch at the initial batch size."""
        return math.ceil(self._count / self._start)

    def examples(self, number: int) -> int:
        """Number of examples in a batch of the current epoch, counted from 0."""
        return self._last if number == len(self._drawn) - 1 else self._drawn[number]

    @property
    def entries(self) -> list[tuple[str, float]]:
        """Tags and values for a log."""
        rows = [("structure/batch_size", float(self.size))]
        if math.isfinite(self.scale.value):
            rows.append(("structure/noise_scale", self.scale.value))
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Size, epoch, noise scale, and the sizes of the batches of an incomplete epoch."""
        again = self._again  # loaded, but not repeated yet
        return {
            "size": self.size, "epoch": self.epoch + bool(again), "taken": self._taken + len(again),
            "drawn": list(again or self._drawn), "ended": self._ended,
            "scale": self.scale.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the next epoch, or repeat an incomplete one from its first batch.

        Repeated batches have the same examples as before: skip those already used, for example with
        ``itertools.islice(loader, used, None)``. The workers of a DataLoader draw batches in
        advance: with workers, save between epochs.

        Raises:
            ValueError: The saved batch size is outside the bounds.
        """
        size = int(state["size"])
        if not self.least <= size <= self._most:
            raise ValueError(
                f"state has batches of {size} examples, outside least={self.least} and "
                f"most={self._most}: pass the same least= and most="
            )
        again = [] if state["ended"] else [int(n) for n in state["drawn"]]
        self.size, self._again, self._drawn, self._ended = size, again, [], not again
        self.epoch = int(state["epoch"]) - bool(again)
        self._taken = int(state["taken"]) - len(again)
        self.scale.load_state_dict(state["scale"])


@checked(step=FUNCTION, small=COUNT, large=COUNT, repeats=COUNT)
def step_overhead(
    step: Callable[[int], object], small: int = 16, large: int = 256, *, repeats: int = 10
) -> float:
    """Fixed time of a step, divided by the additional time of one example.

    The time of a step over B examples is taken as a + b B. Both are determined from the median
    times at two batch sizes, measured alternately; the result is a / b.

    Args:
        step: Takes a step over a number of examples and waits until it has finished (on a GPU, by
            ``torch.cuda.synchronize()``). It may change the weights, so it should train a copy.
        small: Smaller batch size.
        large: Larger batch size.
        repeats: Number of steps at each size.

    Returns:
        A number of examples, at least 1; inf if the larger step does not take longer.

    Raises:
        ValueError: ``small`` is not less than ``large``.

    Examples:
        >>> 1 <= step_overhead(lambda size: time.sleep(1e-3 + 1e-5 * size), repeats=3) < 200
        True
    """
    if not small < large:
        raise ValueError(f"small={small} must be less than large={large}")
    seconds: dict[int, list[float]] = {small: [], large: []}
    for size in seconds:  # the first step of each size is slower
        step(size)
    for _ in range(repeats):
        for size, times in seconds.items():
            begun = time.perf_counter()
            step(size)
            times.append(time.perf_counter() - begun)
    short, long = (statistics.median(s) for s in seconds.values())
    each = (long - short) / (large - small)
    return max(1.0, short / each - small) if each > 0 else math.inf
