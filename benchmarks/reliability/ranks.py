"""Two gloo ranks, of which SIGKILL meets one at a random moment, and that are started again.

Truth: the same run on two ranks, which nobody kills, bit for bit; and the batches that were read.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import selftune as st
from benchmarks.reliability.kills import batches, digest, net
from benchmarks.reliability.processes import Broken, Child, apart, scratch, warm_up

RANKS, STEPS = 2, 88
SAVES = (1, 7)
"""Steps from one checkpoint to the next."""
PATIENCE = 10.0
"""Seconds until a rank that did not notice is ended, as torchrun ends it."""
GONE = "another rank has died"


class Noted:
    """Batches, each of which leaves a mark in a file when it is read."""

    def __init__(self, path: Path) -> None:
        self._batches, self._path = batches(205, 0), path

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            with self._path.open("ab", buffering=0) as file:
                file.write(b".")
            yield batch


def trained(rank: int, port: int, save: int, folder: Path) -> tuple[str, int]:
    """A rank of a run with everything random in it, begun or gone on with.

    Returns what the run ended with, and the steps of its sweep, which writes no checkpoints.
    """
    known = dict(RANK=rank, WORLD_SIZE=RANKS, MASTER_ADDR="localhost", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in known.items()})
    torch.manual_seed(3)
    tuner = st.Tuner(
        net(), F.cross_entropy, rule=st.rules.SGD(), hparams={"lr": 0.01, "momentum": 0.9},
        compile=False, parallel="ddp",
    )  # fmt: skip
    result = tuner.fit(
        Noted(folder / f"read by {rank}"), batches(60, 1), steps=STEPS, log_dir=folder / "run",
        evaluate_every=11, checkpoint_every=save, resume=True, progress=False,
    )  # fmt: skip
    end = digest([result.history, result.best_weights, result.hparams, result.best_loss])
    return end, int(np.isnan(result.history["train_loss"]).argmin())


def started(save: int, folder: Path) -> list[Child]:
    """All ranks of a run."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = int(free.getsockname()[1])
    return [Child.of(partial(trained, rank, port, save, folder)) for rank in range(RANKS)]


@dataclass(frozen=True)
class Kill:
    """A run of two ranks, one of which was killed.

    Attributes:
        victim: Its number.
        save: Steps from one checkpoint to the next.
        after: Seconds until the kill.
        lost: Whole steps behind the last checkpoint; None where the run had ended before.
        most: What it may be: one step; before the end of the sweep, the sweep's.
        noticed: Whether the other rank ended with the error that names the remedy.
        same: Whether the run that went on ends as the one that nobody killed.
    """

    victim: int
    save: int
    after: float
    lost: int | None
    most: int
    noticed: bool
    same: bool


def kill(seed: int, seconds: float, whole: tuple[str, int], folder: Path) -> Kill:
    """Kill a rank once, and start all of them again."""
    draw, victim, save = random.Random(f"rank {seed}"), seed % RANKS, SAVES[seed // RANKS % 2]
    ranks, after = started(save, folder), draw.uniform(0.05, seconds)
    killed = ranks[victim].killed(after)
    noticed = _noticed(ranks[1 - victim])
    steps, last = _begun(folder, 0), folder / "run" / "last.pt"
    # A rank that waits for the killed one to come is ended by torchrun.
    noticed |= _begun(folder, victim) < 1
    saved = apart(lambda: torch.load(last, weights_only=False)["numbers"][0]) if (
        last.exists()) else 0  # fmt: skip
    try:
        ends = [rank.result() for rank in started(save, folder)]
    except Broken as error:
        ends = [(str(error), 0)]
    lost, most = max(0, steps - saved) if killed else None, 1 + (0 if saved else whole[1])
    return Kill(victim, save, after, lost, most, noticed, ends == [whole] * RANKS)


def _begun(folder: Path, rank: int) -> int:
    """Steps that a rank has taken, by the batches it has read."""
    read = folder / f"read by {rank}"
    return len(read.read_bytes()) - 2 if read.exists() else 0  # one looked at, one in its step


def _noticed(rank: Child) -> bool:
    """Whether a rank ends by itself: with the error that says so, or with the run."""
    until = time.monotonic() + PATIENCE
    while os.waitid(os.P_PID, rank.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > until:
            os.kill(rank.process, signal.SIGKILL)
        time.sleep(0.02)
    try:
        rank.result()
    except Broken as error:
        return GONE in str(error)
    return True


def ranks(count: int) -> list[Kill]:
    """Both ranks in turn, with checkpoints every step and every seventh."""
    with scratch() as place:
        (place / "warm").mkdir()
        warm_up(partial(_alone, place / "warm"))
        wholes, seconds = {}, {}
        for save in SAVES:
            begun = time.monotonic()
            found = [rank.result() for rank in started(save, place / f"whole {save}")]
            assert found[0] == found[1]
            wholes[save], seconds[save] = found[0], time.monotonic() - begun
        kills = []
        for seed in range(count):
            save = SAVES[seed // RANKS % 2]
            kills.append(kill(seed, seconds[save], wholes[save], place / str(seed)))
            shutil.rmtree(place / str(seed))
        return kills


def _alone(folder: Path) -> None:
    """A run in one process, to import what it needs."""
    tuner = st.Tuner(net(), F.cross_entropy, compile=False)
    tuner.fit(batches(205, 0), batches(60, 1), steps=5, log_dir=folder, progress=False)
