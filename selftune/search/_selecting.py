"""The search: Optuna asks, self-tuned runs answer."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from tqdm import tqdm

from selftune._arguments import FLAG, NONE, TEXT, Instance, Kind, Number, That, Whole, check
from selftune.rules import AdamW
from selftune.search._candidates import Candidates, builders_of, points_of
from selftune.search._result import Selection, selected
from selftune.search._shape import Shape
from selftune.search._storage import check_sampler, persist, writable
from selftune.search._trial import Trainer
from selftune.search._workers import JOIN, Payload, crowd, reclaim, work
from selftune.search.families import AbstractFamily
from selftune.search.memory import Memory, Task

log = logging.getLogger("selftune")

STUDY = "selftune"
"""The name of a study where nobody says."""


SOME = Whole(least=1) | NONE
ARGUMENTS: dict[str, Kind] = {
    "trials": Whole(least=1),
    "epochs": SOME,
    "steps": SOME,
    "loss_fn": That(lambda f: f is None or callable(f), "a function, or None"),
    "metric": TEXT,
    "maximize": FLAG,
    "timeout": Number(above=0) | NONE,
    "trust_storage": FLAG,
    "study": TEXT,
    "workers": Whole(least=1),
    "warm_start": FLAG,
    "memory": Instance((Memory,), "a selftune.search.Memory") | NONE,
    "patience": SOME,
    "tuner": Instance((Mapping,), "arguments of st.Tuner by name") | NONE,
    "fit": Instance((Mapping,), "arguments of Tuner.fit by name") | NONE,
    "log_dir": TEXT | Instance((Path,), "a path") | NONE,
    "seed": Whole(),
    "force": FLAG,
    "progress": FLAG,
}
"""What arguments of ``select`` may be."""


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
    tuner: Mapping[str, Any] | None = None,
    fit: Mapping[str, Any] | None = None,
    log_dir: str | Path | None = None,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Selection:
    """Search for a model, each trial being one self-tuned run.

    What is continuous (learning rate, weight decay, momentum, dropout, …) is tuned within a run;
    only what is discrete is searched.

    Args:
        candidates: ``"auto"`` (families that suit the data); a function of a
            :class:`~selftune.search.Space` that returns a model, a
            :class:`~selftune.search.Candidate` or, as an objective, the trial's value; or several
            of these by name, or families in a list.
        train: A DataLoader, or any iterable of batches that can be gone through anew.
        val: Validation batches, or the share of the training data to set aside for it.
        trials: How many there are in all, those of earlier calls and other workers included; a
            grid has as many as points.
        epochs: Length of a run in passes over ``train``; or
        steps: in weight steps.
        loss_fn: As for :class:`~selftune.Tuner`; by default the usual one of the data's task.
        metric: ``"loss"``, or the name of one of ``tuner["metrics"]``.
        maximize: Whether more of the metric is better.
        sampler: ``"grid"``, ``"random"``, ``"tpe"``, ``"gp"``, ``"cmaes"``, or one of Optuna's.
        pruner: ``"asha"``, ``"hyperband"``, ``"median"``, ``"none"``, or one of Optuna's.
        timeout: Seconds after which no further trial begins.
        storage: A path (a journal), an address (``sqlite:///…``, ``grpc://host:port``), or one of
            Optuna's storages: the search goes on there, and others may join. By default memory.
        trust_storage: Whether ``sampler="cmaes"`` may unpickle its state from the storage. Whoever
            can write to the storage can then run code in this process.
        study: Its name in the storage.
        workers: Processes on this machine.
        warm_start: Whether a run starts from where the best ones of its family ended.
        memory: What other searches left: first runs start from what similar tasks converged to,
            and what was chosen for those is tried first; the best of this search is added.
        patience: Evaluations without a better loss before a run ends.
        tuner: Further arguments of :class:`~selftune.Tuner`; by default a hyper step comes every
            thirtieth of a run, from 5 to 20 steps.
        fit: Further arguments of ``Tuner.fit``.
        log_dir: Folder for TensorBoard, one run a trial, and the best weights; by default beside
            the journal.
        seed: Of the sampler, the weights and the order of the data.
        force: Whether a grid of more than 1,000 points is searched.
        progress: Whether to show a progress bar.

    Returns:
        The trained best model and all trials.

    Raises:
        ValueError: An unsuitable argument, or a storage of something else.
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
    builders = builders_of(candidates, train)
    joined = os.environ.get(JOIN)
    storage = joined or storage
    check_sampler(sampler, storage, trust_storage=trust_storage)
    folder = None if log_dir is None else Path(log_dir)
    if storage is None and workers > 1:
        storage = (folder or Path(tempfile.mkdtemp(prefix="selftune-"))) / "study.journal"
    if folder is None and isinstance(storage, (str, Path)) and "://" not in str(storage):
        folder = Path(f"{storage}.runs")
    if workers > 1 and not isinstance(storage, (str, Path)):
        raise ValueError(
            f"workers={workers} need a storage that they can all open: pass a path or an address"
        )
    if sampler == "grid":
        trials = points_of(builders, force)
    if loss_fn is None and any(isinstance(b, AbstractFamily) for b in builders.values()):
        loss_fn = Shape.of(train).loss()
    trainer = Trainer(
        candidates=builders, train=train, val=val, loss_fn=loss_fn, metric=metric,
        sign=-1 if maximize else 1,
        length={k: v for k, v in (("epochs", epochs), ("steps", steps)) if v is not None},
        fit={"patience": patience, **(fit or {})}, tuner=dict(tuner or {}), warm=warm_start,
        folder=folder, seed=seed, memory=memory,
        task=None if memory is None else task_of(train, epochs, steps, dict(tuner or {})),
    )  # fmt: skip
    about = {
        "direction": "maximize" if maximize else "minimize", "metric": metric,
        "candidates": sorted(builders), "length": dict(trainer.length),
    }  # fmt: skip
    payload = Payload(
        trainer=trainer, about=about, storage=storage, study=study, trials=trials,
        sampler=sampler, pruner=pruner, timeout=timeout,
    )  # fmt: skip
    worker = os.getpid() if joined else 0
    with writable(storage, lambda: payload.open(worker)):
        opened = payload.open(worker)
        before = persist(lambda: _begin(trainer, opened), opened)
    mark = partial(opened.set_user_attr, "selftune", about)
    with writable(storage, mark), tqdm(total=trials, disable=not progress, unit="trial") as bar:
        run = partial(crowd, workers=workers) if workers > 1 else work
        ended = run(payload, opened, bar=bar)
        if ended and persist(lambda: reclaim(opened), opened):  # killed before it began
            run(payload, opened, bar=bar)
    found = persist(lambda: selected(trainer, opened), opened)
    if memory is not None and trainer.task is not None and len(opened.trials) > before:
        schedule = None if found.schedule is None else asdict(found.schedule)
        try:
            memory.remember(
                replace(trainer.task, family=found.family), found.hparams, value=found.value,
                params=found.params, schedule=schedule,
            )  # fmt: skip
        except OSError as error:
            log.warning("memory: this search is not remembered: %s", error)
    return found


def _begin(trainer: Trainer, study: optuna.Study) -> int:
    """Ask for what lost workers had, and what a memory knows; returns how many trials there are."""
    reclaim(study)
    before = len(study.trials)
    if trainer.memory is not None and trainer.task is not None and not before:
        for params in trainer.memory.best(trainer.task):
            study.enqueue_trial(params, skip_if_exists=True)
    return before


def task_of(train: Any, epochs: int | None, steps: int | None, tuner: Mapping[str, Any]) -> Task:
    """What a search is about, read off the training batches."""
    sizes = [len(batch[0]) for batch in train]
    return Task.of(
        Shape.of(train), sum(sizes), steps or len(sizes) * (epochs or 1), sizes[0],
        rule=type(tuner.get("rule", AdamW())).__name__,
    )  # fmt: skip
