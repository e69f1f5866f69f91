"""Workers that run the trials: this process, several processes, or other machines."""

from __future__ import annotations

import logging
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from selftune._processes import alive
from selftune.search._storage import (
    RETRIES,
    Unwritable,
    open_study,
    persist,
    pruner_of,
    quiet,
    sampler_of,
    storage_of,
)
from selftune.search._trial import Trainer

log = logging.getLogger("selftune")

JOIN = "SELFTUNE_STORAGE"
"""Environment variable with the storage of the search to join."""
joined: set[str] = set()
"""Storages of the searches that this process has joined as a worker."""
LOOK = 0.2
"""Polling interval of the workers in seconds."""
SIGN = 30.0
"""Seconds within which a worker must sign a requested trial; otherwise it is considered lost.

Samplers that draw all values at once do so before signing, which may take a while.
"""


BEGUN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)
"""States of trials that a worker has begun."""
WHOLE = "all points tried"
"""Attribute of a study whose grid search has ended at the last point."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Everything that a worker needs.

    Attributes:
        about: Settings that must equal those of the study.
        sampler: Name of a sampler, or an Optuna sampler.
        pruner: Name of a pruner, or an Optuna pruner.
        until: Time, as of ``time.time()``, after which no new trial is started.
        most: Largest number of points of a grid, whose end Optuna finds; None for other searches.
    """

    trainer: Trainer
    about: dict[str, Any]
    storage: Any
    study: str
    trials: int
    sampler: Any
    pruner: Any
    until: float | None = None
    most: float | None = None

    def open(self, worker: int = 0) -> optuna.Study:
        """The study, with a sampler seeded for this worker and this call."""
        return persist(lambda: self._open(worker))

    def _open(self, worker: int) -> optuna.Study:
        sampler = sampler_of(self.sampler, self.trainer.seed)
        storage = storage_of(self.storage)
        study = open_study(storage, self.study, sampler, pruner_of(self.pruner), self.about)
        before = len(study.get_trials(deepcopy=False))
        if isinstance(self.sampler, BaseSampler):
            if worker:  # else all workers propose the same points
                study.sampler.reseed_rng()
        elif worker or before:
            seed = (self.trainer.seed + 1000 * worker + before) % 2**32
            study.sampler = sampler_of(self.sampler, seed)
        return study


def work(payload: Payload, study: optuna.Study, bar: tqdm[Any] | None = None) -> bool:
    """Run trials until there are enough; return False if interrupted by Ctrl-C."""

    def enough() -> bool:
        done = taken(study)
        if bar is not None:
            bar.update(len([t for t in done if t.state.is_finished()]) - bar.n)
        if payload.most is not None:  # a grid, whose last point Optuna finds
            return len(done) >= payload.most
        return len(done) >= payload.trials

    def after(study: optuna.Study, trial: FrozenTrial) -> None:
        if enough():
            study.stop()

    begun = False

    def rounds() -> None:
        nonlocal begun
        if begun:  # the connection was lost, and a trial with it
            orphans(study, os.getpid())
        begun = True
        left = None if payload.until is None else max(0.0, payload.until - time.time())
        if not enough() and not whole(study, payload):
            study.optimize(
                payload.trainer.attempt, callbacks=[after], catch=(Exception,), timeout=left,
            )  # fmt: skip
            late = payload.until is not None and time.time() >= payload.until
            if payload.most is not None and not late:
                study.set_user_attr(WHOLE, len(taken(study)) < payload.most)

    try:
        with quiet():
            persist(rounds, study)
    except KeyboardInterrupt:
        orphans(study, os.getpid())
        return False
    except Unwritable:
        with suppress(Exception):  # the trial that was running is tried again
            orphans(study, os.getpid())
        raise
    return True


def whole(study: optuna.Study, payload: Payload) -> bool:
    """Whether a grid search has tried all points, and no lost trial waits to be tried again."""
    if payload.most is None or len(taken(study)) < payload.trials:
        return False
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return bool(study.user_attrs.get(WHOLE)) and not waiting


def join(storage: str, script: str, rest: Sequence[str]) -> None:
    """Run a script as an additional worker of its search."""
    os.environ[JOIN] = storage
    sys.argv = [script, *rest]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")
    if storage not in joined:
        raise ValueError(
            f"--storage {storage}: no select() of {script} has a storage of this name, or none; "
            "its searches ran by themselves"
        )


def to_join(own: Any) -> str | None:
    """The storage that this process joins as a worker, if it is that of a search.

    It may have another address here (a mounted folder, a server's host), so names are compared.
    """
    storage = os.environ.get(JOIN)
    if storage is None:
        return None
    addresses = [str(s) for s in (own, storage) if isinstance(s, (str, Path))]
    names = {Path(a.partition("?")[0]).name for a in addresses}
    if len(names) > 1 and not any(a.startswith("grpc://") for a in addresses):
        log.warning(
            "storage=%s: this search is not the one of --storage %s, and runs by itself",
            own, storage,
        )  # fmt: skip
        return None
    joined.add(storage)
    return storage


def taken(study: optuna.Study) -> list[FrozenTrial]:
    """Finished and running trials, without those whose worker was lost."""
    trials = study.get_trials(deepcopy=False, states=BEGUN)
    return [t for t in trials if not (t.state == TrialState.FAIL and "error" not in t.user_attrs)]


def orphans(study: optuna.Study, own: int | None = None) -> None:
    """Fail trials of dead workers on this machine, and enqueue them again.

    ``own`` is a process that has given up its trial.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        signed = trial.user_attrs.get("worker", ())  # without a start, from earlier versions
        host, process, begun = (*signed, None, None, None)[:3]
        if host != socket.gethostname() or (process != own and alive(process, begun)):
            continue
        study.tell(trial.number, state=TrialState.FAIL)
        retries = trial.user_attrs.get("retries", 0)
        if trial.params and retries < RETRIES:
            attrs = {"retries": retries + 1, "instead of": trial.number}
            study.enqueue_trial(trial.params, user_attrs=attrs)


def reclaim(study: optuna.Study) -> int:
    """Fail trials of dead workers, including those that have not signed their trial yet.

    Returns:
        The number of unsigned trials; waits only if there are any.
    """
    orphans(study)
    first, until = unsigned(study), time.monotonic() + SIGN
    while first and time.monotonic() < until:
        time.sleep(LOOK)
        first &= unsigned(study)
    for number in first:
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
    return len(first)


def unsigned(study: optuna.Study) -> set[int]:
    """Numbers of running trials that no worker has signed."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return {t.number for t in running if "worker" not in t.user_attrs}


def crowd(payload: Payload, study: optuna.Study, workers: int, bar: tqdm[Any]) -> bool:
    """Run trials in several processes; if one dies, only its trial is lost, and is retried.

    Returns False if interrupted by Ctrl-C.
    """
    import cloudpickle

    # An unnamed file, which does not outlive a killed process; each worker maps it.
    with tempfile.TemporaryFile() as file:
        cloudpickle.dump(payload, file)
        file.flush()
        started = 0

        def start() -> subprocess.Popen[bytes]:
            nonlocal started
            started += 1
            command = [sys.executable, "-m", "selftune.search", str(started)]
            # As in multiprocessing: modules beside the script are found.
            path = os.pathsep.join(p or os.getcwd() for p in sys.path if isinstance(p, str))
            return subprocess.Popen(command, stdin=file, env=os.environ | {"PYTHONPATH": path})

        running = [start() for _ in range(min(workers, payload.trials))]
        try:
            while running:
                time.sleep(LOOK)
                for process in [p for p in running if p.poll() is not None]:
                    running.remove(process)
                    lost = process.returncode != 0
                    persist(lambda: orphans(study), study)
                    begun = persist(lambda: study.get_trials(False, BEGUN), study)
                    if lost and started - len(running) >= workers and not begun:
                        raise RuntimeError(
                            f"the first {workers} workers ended before a trial, the last with exit "
                            f"status {process.returncode}: their messages are above. Try workers=1"
                        )
                    if lost and started < workers + RETRIES * payload.trials:
                        running.append(start())
                done = persist(lambda: [t for t in taken(study) if t.state.is_finished()], study)
                bar.update(len(done) - bar.n)
        except KeyboardInterrupt:
            return False
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            orphans(study)
    return True
