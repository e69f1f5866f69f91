"""The search: Optuna proposes candidates, and self-tuned runs evaluate them."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FixedTrial
from tqdm import tqdm

from selftune._arguments import (
    COUNT,
    FLAG,
    FOLDER,
    FUNCTION,
    MAPPING,
    NONE,
    PATH,
    REPEATABLE,
    TEXT,
    Instance,
    Kind,
    Number,
    Whole,
    check,
)
from selftune._modes import every_random_kept
from selftune.holdout import HoldOut
from selftune.search._candidates import (
    MOST,
    SET,
    Candidates,
    builders_of,
    check_own,
    points_of,
)
from selftune.search._identity import about
from selftune.search._pruning import settings_of
from selftune.search._result import Selection, selected
from selftune.search._shape import Shape, some
from selftune.search._storage import check_sampler, finished, persist, writable
from selftune.search._trial import STUDY, Trainer, rule_of
from selftune.search._weights import Weights
from selftune.search._workers import Payload, crowd, reclaim, to_join, work
from selftune.search.families import AbstractFamily
from selftune.search.memory import Memory, Task

log = logging.getLogger("selftune")

ARGUMENTS: dict[str, Kind] = {
    "train": REPEATABLE,
    "val": REPEATABLE,
    "trials": COUNT,
    "epochs": COUNT | NONE,
    "steps": COUNT | NONE,
    "loss_fn": FUNCTION | NONE,
    "metric": TEXT,
    "maximize": FLAG,
    "timeout": Number(above=0) | NONE,
    "sampler": TEXT | Instance((BaseSampler,), "a sampler of Optuna"),
    "storage": PATH | NONE | Instance((BaseStorage,), "a storage of Optuna"),
    "trust_storage": FLAG,
    "study": TEXT,
    "workers": COUNT,
    "warm_start": FLAG,
    "memory": Instance((Memory,), "a selftune.search.Memory") | NONE,
    "patience": COUNT | NONE,
    "ensemble": COUNT,
    "tuner": MAPPING | NONE,
    "fit": MAPPING | NONE,
    "log_dir": FOLDER | NONE,
    "seed": Whole(least=0, most=2**32 - 1),
    "force": FLAG,
    "progress": FLAG,
}
"""Allowed values of the arguments of ``select``."""


@every_random_kept()
def select(
    candidates: Candidates,
    train: Any = None,
    val: Any = 0.2,
    *,
    trials: int = 20,
    epochs: int | None = None,
    steps: int | None = None,
    loss_fn: Callable[..., Any] | None = None,
    metric: str = "loss",
    maximize: bool = False,
    sampler: Any = "tpe",
    pruner: Any = "asha",
    timeout: float | None = None,
    storage: Any = None,
    trust_storage: bool = False,
    study: str = STUDY,
    workers: int = 1,
    warm_start: bool = True,
    memory: Memory | None = None,
    patience: int | None = None,
    structure: str | Mapping[str, Any] | None = None,
    ensemble: int = 1,
    tuner: Mapping[str, Any] | None = None,
    fit: Mapping[str, Any] | None = None,
    log_dir: str | Path | None = None,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Selection:
    """Search for a model, each trial being one self-tuned run.

    Continuous hyperparameters (learning rate, weight decay, momentum, …) are tuned within
    a run; only discrete choices are searched.

    Args:
        candidates: ``"auto"`` (families that fit the data); a function that takes a
            :class:`~selftune.search.Space` and returns a model, a
            :class:`~selftune.search.Candidate` or, as an objective, the value of the trial; a
            dictionary of several of these by name; or a list of families.
        train: A DataLoader, or any iterable of batches that can be iterated over repeatedly.
        val: Validation batches, or the fraction of the training data to set aside for validation.
        trials: Total number of trials, including those of earlier calls and of other workers. A
            grid search ignores it and runs one trial per point.
        epochs: Length of a run in passes over ``train``. Pass this or ``steps``.
        steps: Length of a run in optimizer steps.
        loss_fn: As for :class:`~selftune.Tuner`; by default the usual loss for the task.
        metric: ``"loss"``, or the name of one of ``tuner["metrics"]``.
        maximize: Whether higher values of the metric are better.
        sampler: ``"grid"``, ``"random"``, ``"tpe"``, ``"gp"``, ``"cmaes"``, or an Optuna sampler.
        pruner: ``"asha"``, ``"hyperband"``, ``"median"``, ``"none"``, or an Optuna pruner.
        timeout: Seconds after which no new trial is started.
        storage: A path (a journal), a URL (``sqlite:///…``, ``grpc://host:port``) or an Optuna
            storage. The search is continued from it, if its candidates, metric, length, loss and
            number of validation examples are the same, and other workers can join. By default the
            study is kept in memory.
        trust_storage: Whether ``sampler="cmaes"`` may unpickle its state from the storage. Whoever
            can write to the storage can then run code in this process.
        study: Name of the study in the storage.
        workers: Number of processes on this machine.
        warm_start: Whether a run starts from the final hyperparameters of the best earlier runs of
            its family.
        memory: Results of earlier searches. The first runs start from the final hyperparameters of
            similar tasks, the candidates selected there are tried first, and the best result of
            this search is added.
        patience: Number of evaluations without improvement after which a run ends.
        structure: ``"inside"`` to start each model at its largest sizes and to remove units and
            blocks during its run instead of searching over widths, or a mapping with arguments of
            :class:`~selftune.structure.Goal`, such as ``dict(budget=0.25)``. By default sizes are
            searched.
        ensemble: Number of the best trials from which an ensemble is chosen: the weighted mean of
            outputs with the lowest validation loss. 1 for the best model alone.
        tuner: Further arguments of :class:`~selftune.Tuner`. By default ``every`` is a thirtieth of
            the run, between 5 and 20 steps.
        fit: Further arguments of ``Tuner.fit``.
        log_dir: Folder for TensorBoard logs (one run per trial) and the best weights; by default
            next to the journal.
        seed: Seed of the sampler, the initial weights and the data order.
        force: Whether to allow a grid of more than 1,000 points.
        progress: Whether to show a progress bar.

    Returns:
        The trained best model and all trials.

    Raises:
        ValueError: An argument is invalid, or the storage belongs to a different search.
        RuntimeError: No trial finished.

    Examples:
        >>> import torch, selftune.search as search
        >>> x = torch.randn(64, 4)
        >>> batches = [(a, a.sum(1, keepdim=True)) for a in x.split(16)]
        >>> def build(space):
        ...     width = space.suggest_categorical("width", (4, 8))
        ...     return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 1))
        >>> found = search.select(build, batches[:3], batches[3:], epochs=2, trials=2,
        ...                       loss_fn=torch.nn.functional.mse_loss, progress=False)
        >>> found.params["width"] in (4, 8)
        True
    """
    check(ARGUMENTS, locals())
    check_own("tuner", tuner, **SET)
    own = ("train", "val", "epochs", "steps", "patience", "log_dir")
    check_own("fit", fit, **{name: f"{name}= of select" for name in own})
    goal = settings_of(structure)
    builders = builders_of(candidates, train, val)
    joined = to_join(storage)
    storage = _absolute(joined or storage)
    folder = None if log_dir is None else Path(log_dir).absolute()
    shared = storage  # by others, who may write to it
    if storage is None and workers > 1:
        shared = None if folder is None else folder / "study.journal"
        storage = (folder or Path(tempfile.mkdtemp(prefix="selftune-"))) / "study.journal"
    if folder is None and isinstance(storage, (str, Path)) and "://" not in str(storage):
        folder = Path(f"{storage}.runs")
    if folder is None and workers > 1:  # for the weights of trials of other processes
        folder = Path(tempfile.mkdtemp(prefix="selftune-"))
    check_sampler(sampler, shared, trust_storage=trust_storage)
    if workers > 1 and not isinstance(storage, (str, Path)):
        raise ValueError(
            f"workers={workers} needs a storage that all workers can open: pass a path or a URL"
        )
    most: float | None = None
    if sampler == "grid":
        trials = points_of(builders, force, structure is not None)
        most = math.inf if force else MOST
    of_data = any(isinstance(b, AbstractFamily) for b in builders.values())
    length = {k: v for k, v in (("epochs", epochs), ("steps", steps)) if v is not None}
    # An objective, which trains nothing here, needs neither.
    if len(length) == 2 or (of_data and not length):
        raise ValueError(f"epochs={epochs}, steps={steps}: pass one of the two")
    if loss_fn is None and of_data:
        loss_fn = Shape.of(train).loss()
    if ensemble > 1 and (loss_fn is None or "objective" in (tuner or {})):
        raise ValueError(
            f"ensemble={ensemble} needs loss_fn, the loss of outputs and targets, for the mean of "
            "the models' outputs: pass it instead of objective=, or omit ensemble="
        )
    if (val is None or isinstance(val, HoldOut)) and (ensemble > 1 or structure is not None):
        raise ValueError(
            f"val={val!r} lets validation examples join the training data, on which neither "
            "ensemble= nor structure= can rely: pass val=0.2, or validation batches"
        )
    trainer = Trainer(
        candidates=builders, train=train, val=val, loss_fn=loss_fn, metric=metric,
        sign=-1 if maximize else 1,
        length=length, fit={"patience": patience, **(fit or {})}, tuner=dict(tuner or {}),
        structure=goal, warm=warm_start, weights=Weights(folder, ensemble), seed=seed,
        memory=memory,
        task=None if memory is None else task_of(train, epochs, steps, dict(tuner or {})),
    )  # fmt: skip
    settings = about(trainer)
    payload = Payload(
        trainer=trainer, about=settings, storage=storage, study=study, trials=trials,
        sampler=sampler, pruner=pruner, most=most,
        until=None if timeout is None else time.time() + timeout,
    )  # fmt: skip
    worker = os.getpid() if joined else 0
    with writable(storage, lambda: payload.open(worker)):
        opened = payload.open(worker)
        before = persist(lambda: _begin(trainer, opened), opened)
    mark = partial(opened.set_user_attr, "selftune", settings)
    with writable(storage, mark), tqdm(total=trials, disable=not progress, unit="trial") as bar:
        run = partial(crowd, workers=workers) if workers > 1 else work
        ended = run(payload, opened, bar=bar)
        # Replace trials whose workers were killed before they began.
        if ended and persist(lambda: reclaim(opened), opened):
            run(payload, opened, bar=bar)
    if not ended and not finished(opened):
        raise KeyboardInterrupt
    selection = persist(lambda: selected(trainer, opened, before), opened)
    if memory is not None and trainer.task is not None and len(opened.trials) > before:
        schedule = None if selection.schedule is None else asdict(selection.schedule)
        try:
            rule = selection.study.best_trial.user_attrs.get("rule", trainer.task.rule)
            memory.remember(
                replace(trainer.task, family=selection.family, rule=rule), selection.hparams,
                value=selection.value, params=selection.study.best_params, schedule=schedule,
                name=_identity_of(opened),
            )  # fmt: skip
        except (OSError, TypeError, ValueError) as error:  # choices may be no numbers or strings
            log.warning("memory: this search could not be stored: %s", error)
    return selection


def _absolute(storage: Any) -> Any:
    """A path from the root, as builders may change the directory; others as they are."""
    a_path = isinstance(storage, Path) or (isinstance(storage, str) and "://" not in storage)
    return Path(storage).absolute() if a_path else storage


def _identity_of(study: optuna.Study) -> str:
    """A name that all workers and calls of a search agree on, and no other search has."""
    begun = min(t.datetime_start for t in study.get_trials(deepcopy=False) if t.datetime_start)
    return hashlib.sha256(f"{study.study_name} {begun}".encode()).hexdigest()[:32]


def _begin(trainer: Trainer, study: optuna.Study) -> int:
    """Enqueue trials of lost workers and the memory's parameters; return the number of trials."""
    reclaim(study)
    before = len(study.trials)
    if trainer.memory is not None and trainer.task is not None and not before:
        for params in trainer.memory.best(trainer.task):
            if _known(trainer, params):
                study.enqueue_trial(params, skip_if_exists=True)
    return before


def _known(trainer: Trainer, params: dict[str, Any]) -> bool:
    """Whether these parameters are a point of the search space."""
    trial = FixedTrial(params)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The value .* is out of the range", UserWarning)
        try:
            trainer.build(trial, trainer.family(trial))
        except (ValueError, UserWarning) as error:
            log.info("memory: an earlier search chose %s: %s", params, error)
            return False
        except Exception as error:  # not a matter of the space: the trial will tell
            log.info("memory: a builder failed for %s: %s", params, error)
    return True


def task_of(train: Any, epochs: int | None, steps: int | None, tuner: Mapping[str, Any]) -> Task:
    """The task of a search, inferred from the training batches."""
    if train is None:
        raise ValueError("memory= compares data sets: pass train=, or omit memory=")
    shape = Shape.of(train, "memory=")
    sizes = [len(batch[0]) for batch in some(train)]
    return Task.of(
        shape, sum(sizes), steps or len(sizes) * (epochs or 1), sizes[0],
        rule=rule_of(tuner),
    )  # fmt: skip
