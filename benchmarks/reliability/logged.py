"""Logged runs one after another in a process: what is left of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

import selftune as st
from benchmarks.reliability.kills import net, points
from benchmarks.reliability.processes import apart, scratch

WARM = 12
"""Runs before the first look."""


@dataclass(frozen=True)
class Held:
    """What a process holds.

    Attributes:
        threads: Of the system.
        descriptors: Open ones.
        megabytes: Resident memory.
    """

    threads: int
    descriptors: int
    megabytes: float

    @classmethod
    def now(cls) -> Held:
        """After garbage collection."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return cls(*(len(os.listdir(f"/proc/self/{n}")) for n in ("task", "fd")), megabytes)


def fitted(folder: Path) -> None:
    """A run of the tuner."""
    x, y = points(100, 0)
    batches = list(zip(x.split(20), y.split(20), strict=True))
    tuner = st.Tuner(net(), F.cross_entropy, compile=False, probe=False)
    tuner.fit(batches[:4], batches[4:], steps=24, log_dir=folder, log_every=5, progress=False)


def looped(shell: str, ends: bool, folder: Path) -> None:
    """A loop of one's own, which calls ``finish()`` or does not."""
    model, (x, y) = net(), points(40, 0)
    opt = getattr(st, shell)(model, lr=0.01, probe=False, log_dir=folder)
    for _ in range(24):
        opt.zero_grad()
        loss = F.cross_entropy(model(x[:20]), y[:20])
        loss.backward()
        opt.step()
        opt.report(loss)
        opt.hyper_step(lambda: F.cross_entropy(model(x[20:]), y[20:]))
    opt.flush()
    if ends:
        opt.finish()


RUNS: tuple[Callable[[Path], None], ...] = (
    fitted, partial(looped, "SGD", True), partial(looped, "AdamW", False),
)  # fmt: skip


def _growth(count: int) -> Held:
    with scratch() as place:
        torch.manual_seed(0)
        before = None
        for number in range(WARM + count):
            if number == WARM:
                before = Held.now()
            RUNS[number % len(RUNS)](place / str(number))
        after = Held.now()
    assert before is not None
    return Held(
        after.threads - before.threads, after.descriptors - before.descriptors,
        after.megabytes - before.megabytes,
    )  # fmt: skip


def growth(count: int) -> Held:
    """By how much a process grows in so many runs after the first few."""
    return apart(partial(_growth, count))  # type: ignore[no-any-return]
