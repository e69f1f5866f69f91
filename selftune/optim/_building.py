"""The options of a self-tuned optimizer, and the engine built from them."""

from __future__ import annotations

import difflib
import inspect
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selftune import control, method
from selftune._arguments import FLAG, FUNCTION, MAPPING, MODULE, NONE, TEXT, Kind, That, check
from selftune._identity import describe, flatten
from selftune.control import Controller, SweepSettings, make_guard, make_sweep
from selftune.estimators import AbstractEstimator, assign
from selftune.method import (
    Average,
    Method,
    MethodSettings,
    Sensitivities,
    WeightDecayFloor,
)
from selftune.method.slices import SHARE, wanted
from selftune.monitor import Monitor
from selftune.optim._buffers import Buffers
from selftune.optim._closures import ClosureSteps
from selftune.optim._engine import Engine
from selftune.optim._reducer import Reducer
from selftune.optim._shifts import MakeOptimizer, Shifts
from selftune.optim._stepper import Opaque, Stepper
from selftune.optim._store import Store
from selftune.schedules import Schedule
from selftune.update import Update

ARGUMENTS: dict[str, Kind] = {
    **method.ARGUMENTS,
    **control.ARGUMENTS,
    "schedule": TEXT | NONE,
    "per": TEXT | MAPPING,
    "total_steps": That(
        lambda n: n is None or (isinstance(n, numbers.Real) and not isinstance(n, bool)),
        "steps, or None",
    ),
    "hyper_optimizer": FUNCTION | NONE,
    "model": MODULE | NONE,
    "distributed": FLAG | NONE,
    "name": TEXT | NONE,
}


@dataclass(kw_only=True)
class TuningOptions:
    """Options of the tuning: keyword arguments of all self-tuned optimizers.

    Args:
        tune: Names of the tuned hyperparameters; by default those of the rule and all penalties
            (with Lion only ``ProximalL1``), without ``decay`` if the length of the run is known.
        per: Scope of a tuned value: ``"run"`` (one factor for all groups), ``"group"`` or
            ``"tensor"``; one for all hyperparameters, or a dictionary by name.
        bounds: (lowest, highest) values by name.
        schedule: ``"constant"``, ``"linear"``, ``"cosine"``, ``"wsd"`` or ``"exponential"``; by
            default linear to 0 if ``total_steps`` is given, else constant.
        total_steps: Steps in the whole run, if known.
        warmup_steps: Steps of the linear warm-up of the learning rate.
        estimator: Estimates the sensitivities of the weights to the hyperparameters. By default
            ``Trace``, which tracks one step in four (more if the average is short); ``Trace`` and
            ``OneStep`` need no closure. The others need ``step(closure)`` with a closure that keeps
            its own batch, and a single parameter group; copying and loading restart them.
        average: The running average at which the validation loss is measured.
        hyper_optimizer: Function from a list of raw hyperparameters to a torch optimizer; by
            default Adam with a rate of 0.01 times ``every``, between 0.05 and 0.2, and higher in
            runs of fewer than 1000 steps.
        every: Minimum number of training steps between two hyperparameter steps; by default a
            thirtieth of ``total_steps``, between 5 and 20.
        probe: True for a learning-rate sweep at the start, False for none, the number of its
            steps, or :class:`~selftune.control.SweepSettings`. After the sweep, the memory
            1/(1 − β₁) of a tuned β₁ is at most 1/300 of the run, or 3 steps if that is more.
        guard: True to rewind to the last good weights when the run diverges or its loss worsens,
            False for no guard, or a policy, such as :class:`~selftune.control.GuardPolicy`.
        model: The model, if it has BatchNorm and ``params`` is not a module.
        name: Name of this optimizer in messages (by default that of the rule) and in the log: a
            subfolder of ``log_dir``, or a prefix of the tags.
        log_dir: Folder for TensorBoard; or a recorder of :mod:`selftune.monitor`, a
            ``SummaryWriter``, a ``function(values, step)``, or a list of these.
        distributed: Whether all processes train one model (DDP, FSDP2) and take the same
            hyperparameter steps; by default True if torch.distributed is initialised.
        settings: Constants of the method (:class:`~selftune.method.MethodSettings`).
        tangents: Fraction of the weights whose sensitivities are kept, in (0, 1], rounded up to
            1/n; at least 4,096 weights and, by default, at most 2²⁰. Pass a dtype to keep all
            of them in that dtype.
        snapshots: Storage of the last good weights: ``"device"`` (exact), ``"host"`` (exact, in the
            CPU's memory) or ``"bf16"``, the default for 65,536 weights or more.
    """

    tune: Sequence[str] | None = None
    per: str | Mapping[str, str] = "run"
    bounds: Mapping[str, tuple[float, float]] | None = None
    schedule: str | None = None
    total_steps: int | None = None
    warmup_steps: int = 0
    estimator: AbstractEstimator | None = None
    average: Average = field(default_factory=Average)
    hyper_optimizer: MakeOptimizer | None = None
    every: int | None = None
    probe: bool | int | SweepSettings = True
    guard: Any = True
    model: nn.Module | None = None
    log_dir: str | Path | Any | None = None
    distributed: bool | None = None
    settings: MethodSettings = field(default_factory=MethodSettings)
    tangents: float | torch.dtype | None = SHARE
    snapshots: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        check(ARGUMENTS, vars(self))
        self.average = Average() if self.average is None else self.average
        self.settings = MethodSettings() if self.settings is None else self.settings

    @cached_property
    def learning_rate(self) -> Schedule:
        """The schedule of the learning rate."""
        return Schedule(
            shape=self.schedule, total_steps=self.total_steps, warmup_steps=self.warmup_steps
        )

    def identity(self, estimator: str) -> dict[str, Any]:
        """Settings that must be equal in a run and in its continuation."""
        entries: dict[str, Any] = {
            "estimator": estimator, "schedule": self.learning_rate.shape,
            "bounds": str(dict(self.bounds or {})), "tangents": str(self.tangents),
            "snapshots": self.snapshots,
        }  # fmt: skip
        for name in ("average", "settings", "guard"):
            entries |= flatten(name, getattr(self, name))
        return entries


def check_names(optimizer: type, given: Mapping[str, Any]) -> None:
    """Raise an error for an unknown option, and name the closest known one."""
    known = [f.name for f in fields(TuningOptions)]
    wrong = next((name for name in given if name not in known), None)
    if wrong is None:
        return
    own = [n for n in inspect.signature(optimizer).parameters if n not in ("params", "tuning")]
    initials = "".join(part[:1] for part in wrong.split("_"))  # learning_rate: lr
    near = [n for n in [*known, *own] if n == initials or wrong in n.split("_")]  # total_steps
    near = near[:1] or difflib.get_close_matches(wrong, [*known, *own], 1)
    hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join([*own, *known])}"
    raise TypeError(f"{optimizer.__name__} has no argument {wrong}={given[wrong]!r}: {hint}")


def build(options: TuningOptions, update: Update, stepper: Stepper) -> Engine:
    """Build the engine of a run."""
    settings, total, label = options.settings, options.total_steps, options.name or stepper.name
    every, tune = settings.hyper.every(total, options.every), options.tune
    if tune is None:  # ``decay`` only if no schedule anneals
        tune = [n for n in update.tuned if total is None or n != "decay"]
    if not isinstance(tune, str):  # a string is refused by the shifts
        tune = update.with_gradient(tune, given=options.tune is not None)
    shifts = Shifts(
        update.hparams, tune=tune, size=settings.hyper.size(every, total), per=options.per,
        bounds=options.bounds, total_steps=total,
        floor=WeightDecayFloor.of(update.rule, options.learning_rate, settings.floor),
        settings=settings.hyper, make=options.hyper_optimizer, label=label,
    )  # fmt: skip
    assigned = assign(
        options.estimator, update, shifts.names, stride=min(options.average.stride, every),
        answers_all=True,
    )  # fmt: skip
    whole = assigned.whole
    if whole is not None and isinstance(update.rule, Opaque):
        raise ValueError(
            f"estimator={whole} needs a rule of the library (SGD, Adam, …): another "
            "optimizer's steps cannot be differentiated; use Trace or OneStep"
        )
    rows = shifts.names if whole is None else []
    share, storage = wanted(options.tangents, update, whole)
    reducer, guard = Reducer(options.distributed), make_guard(options.guard)
    return Engine(
        store=Store(
            method=Method(
                sensitivities=Sensitivities(
                    rows, update, assigned.rows, options.average, storage
                ),
                hyper=shifts.hyper, settings=settings, horizon=shifts.horizon,
                guarded=guard is not None, total=reducer.total, outer_total=reducer.outer,
            ),
            shifts=shifts,
            reducer=reducer,
        ),
        controller=Controller(
            hparams=shifts.tuned, total_steps=total, guard=guard,
            sweep=make_sweep(options.probe, total, shifts.tuned), label=label,
        ),
        every=every,
        buffers=Buffers(options.model, every),
        monitor=Monitor(options.log_dir, options.name),
        stepper=stepper,
        share=share,
        snapshots=options.snapshots,
        whole=None if whole is None else ClosureSteps(whole, update, shifts),
        identity=options.identity(describe(assigned)),
    )  # fmt: skip
