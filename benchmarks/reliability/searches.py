"""Searches whose workers or parent SIGKILL meets at a random moment, and that are called again.

Workers are started as ``select`` starts them, but forked. Truth: a file to which every trial
appends a line when its objective ends. A trial is lost if its line is there and no value of it is
in the storage at the end; what ended while its process was killed may be the one that was running.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.reliability.processes import Broken, Child, apart, scratch, warm_up
from benchmarks.reliability.starts import quiet
from selftune import search
from selftune.search.__main__ import main as worker
from selftune.search._storage import persist, storage_of  # private: read without a search

TRIALS, WORKERS = 6, 2
STORAGES = ("journal", "sqlite")
VICTIMS = ("search", "worker", "parent")
"""A search in one process; one of several workers; the process that started them."""


class Forked:
    """What ``select`` uses of ``subprocess.Popen``, without a new interpreter."""

    def __init__(self, command: list[str], stdin: Any, env: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            try:
                os.dup2(stdin.fileno(), 0)
                quiet()
                with patch("sys.argv", command[2:]), patch("sys.stdin", os.fdopen(0)):
                    worker()
                os._exit(0)
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        """The return code, once it has ended."""
        if self.returncode is None:
            process, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if process else None
        return self.returncode

    def wait(self) -> int | None:
        """For its end."""
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def terminate(self) -> None:
        """Ask it to end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def objective(place: Path, space: search.Space) -> float:
    """A trial that takes a while and leaves a line."""
    x = space.suggest_float("x", -1, 1)
    time.sleep(0.05)
    _leave(place, x)
    return x * x


def built(place: Path, space: search.Space) -> nn.Module:
    """A model, whose weights are kept beside the storage."""
    width = space.suggest_categorical("width", (2, 3, 4, 5))
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))


def _leave(place: Path, x: float) -> None:
    with (place / "ended").open("ab", buffering=0) as file:
        file.write(f"{os.getpid()} {x!r}\n".encode())


def storage(kind: str, place: Path) -> str:
    """Where a study is, of a kind or at an address."""
    if kind.startswith("postgresql:"):
        return kind
    return f"sqlite:///{place}/study.db" if kind == "sqlite" else f"{place}/study.journal"


def run(kind: str, workers: int, models: bool, place: Path) -> None:
    """A search, begun or gone on with."""
    place.mkdir(exist_ok=True)
    options: dict[str, Any] = {}
    if models:
        x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
        batches = [(a, a.sum(1, keepdim=True)) for a in x.split(16)]
        options = dict(
            train=batches[:2], val=batches[2:], steps=8, loss_fn=F.mse_loss, log_dir=place / "runs",
            tuner=dict(compile=False, probe=False),
        )  # fmt: skip
    made: Callable[..., Any] = partial(built if models else objective, place)
    with patch.object(subprocess, "Popen", Forked):
        search.select(
            made, trials=TRIALS, sampler="random", storage=storage(kind, place), workers=workers,
            progress=False, **options,
        )  # fmt: skip


def record(kind: str, place: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials in a storage; none where it was not made yet."""
    opened = persist(partial(storage_of, storage(kind, place)))  # workers may be making tables
    try:
        loaded = optuna.load_study(study_name="selftune", storage=opened)
    except KeyError:
        return []
    return list(loaded.trials)


@dataclass(frozen=True)
class Search:
    """A search that was killed and called again.

    Attributes:
        kind: Of its storage.
        victim: What was killed.
        models: Whether trials train models.
        after: Seconds until then.
        lost: What was lost beyond the trial that was running, in words.
    """

    kind: str
    victim: str
    models: bool
    after: float
    lost: tuple[str, ...]


def kill(kind: str, victim: str, models: bool, seconds: float, seed: int, place: Path) -> Search:
    """Kill once, and search on."""
    place.mkdir()
    draw = random.Random(f"{kind} {victim} {models} {seed}")
    workers = 1 if victim == "search" else WORKERS
    work = partial(run, kind, workers, models, place)
    after = draw.uniform(0, seconds)
    child = Child.of(work)
    hit: set[int] = set()
    if victim == "worker":
        time.sleep(after)
        running = _children(child.process)
        if running:
            chosen = draw.choice(running)
            os.kill(chosen, signal.SIGKILL)
            hit = {chosen}
        try:
            child.result()
        except Broken as error:
            return Search(kind, victim, models, after, (str(error),))
    else:
        child.killed(after)
        hit = {child.process}
    known = apart(partial(complete, kind, place))
    try:
        apart(work)
    except Broken as error:
        return Search(kind, victim, models, after, (str(error),))
    finally:
        _end(child.process)
    return Search(kind, victim, models, after, tuple(apart(partial(lost, kind, place, known, hit))))


def _children(process: int) -> list[int]:
    try:
        return [
            int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:  # it has ended
        return []


def _end(group: int) -> None:
    """Wait for workers that outlived their parent: they go on until there are enough trials."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise RuntimeError(f"workers of {group} do not end")


def complete(kind: str, place: Path) -> dict[int, float | None]:
    """Values of the trials that are complete, by number."""
    return {t.number: t.value for t in record(kind, place) if t.state.name == "COMPLETE"}


def lost(
    kind: str,
    place: Path,
    known: dict[int, float | None],
    hit: set[int],
    failing: int | None = None,
) -> list[str]:
    """What a storage lacks at the end.

    Args:
        kind: Of the storage, or its address.
        place: Where trials left their lines.
        known: What was complete before.
        hit: Processes that were killed.
        failing: Trials that may have failed; by default one for each of these.
    """
    trials, wrong = record(kind, place), []
    values = {t.number: t.value for t in trials if t.state.name in ("COMPLETE", "PRUNED")}
    for number, value in known.items():
        if values.get(number) != value:
            wrong.append(f"trial {number} was {value}, is {values.get(number)}")
    if len(values) < TRIALS:
        wrong.append(f"{len(values)} of {TRIALS} trials")
    states = [t.state.name for t in trials]
    again = {t.user_attrs.get("instead of") for t in trials}
    failed = [t for t in trials if t.state.name == "FAIL"]
    failing = len(hit) if failing is None else failing
    if len(failed) > failing:
        wrong.append(f"{len(failed)} trials failed, of which {failing} were running")
    wrong += [f"trial {t.number} is not tried again" for t in failed
              if t.params and t.number not in again]  # fmt: skip
    wrong += [f"{states.count('RUNNING')} trials still run"] * ("RUNNING" in states)
    xs = {t.params.get("x") for t in trials if t.number in values}
    ended = (place / "ended").read_text().splitlines() if (place / "ended").exists() else []
    for line in ended:
        process, x = line.split()
        if float(x) not in xs and int(process) not in hit:
            wrong.append(f"x={x} ended in process {process}, and is not in the storage")
    return wrong


def searches(count: int) -> list[Search]:
    """All storages and victims in turn; every third search trains models."""
    found: list[Search] = []
    times: dict[tuple[str, str, bool], float] = {}
    with scratch() as place:
        for kind in STORAGES:
            warm_up(partial(run, kind, 1, True, place / kind))
        for seed in range(count):
            key = STORAGES[seed % 2], VICTIMS[seed // 2 % 3], seed // 6 % 3 == 2
            if key not in times:
                workers = 1 if key[1] == "search" else WORKERS
                begun = time.monotonic()
                apart(partial(run, key[0], workers, key[2], place / "-".join(map(str, key))))
                times[key] = time.monotonic() - begun
            found.append(kill(*key, times[key], seed, place / str(seed)))
            shutil.rmtree(place / str(seed))
    return found
