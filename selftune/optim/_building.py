"""The options of a self-tuned optimizer, and the engine put together from them."""

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
from selftune._arguments import FLAG, NONE, TEXT, Instance, Kind, That, check
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
from selftune.optim._stepper import AbstractStepper, Opaque
from selftune.optim._store import Store
from selftune.schedules import Schedule
from selftune.update import Update

ARGUMENTS: dict[str, Kind] = {
    **method.ARGUMENTS,
    **control.ARGUMENTS,
    "schedule": TEXT | NONE,
    "per": TEXT | Instance((Mapping,), "a scope by name"),
    "total_steps": That(lambda n: n is None or isinstance(n, numbers.Real), "steps, or None"),
    "hyper_optimizer": That(
        lambda f: f is None or callable(f), "None or a function that makes a torch optimizer"
    ),
    "model": Instance((nn.Module, type(None)), "a module, or None"),
    "distributed": FLAG | NONE,
    "name": TEXT | NONE,
}


@dataclass(kw_only=True)
class TuningOptions:
    """How an optimizer tunes itself: keyword arguments of all of them.

    Args:
        tune: Names of the tuned hyperparameters; by default the rule's own choice, less the
            learning rate's decay where the horizon is known.
        per: ``"run"`` (one factor for all), ``"group"`` or ``"tensor"``, for all or by name.
        bounds: (lowest, highest) values by name.
        schedule: ``"constant"``, ``"linear"``, ``"cosine"``, ``"wsd"`` or ``"exponential"``; by
            default linear to 0 if ``total_steps`` is given, else constant.
        total_steps: Steps in the whole run, if known.
        warmup_steps: Steps over which the learning rate climbs.
        estimator: How the sensitivities of weights to hyperparameters are estimated, by default
            by Trace, which tracks every fourth step or, with a shorter average, more. Trace or
            OneStep; with any other one, ``step`` takes a closure that keeps its own batch, there is
            one parameter group, and copies and loaded states begin to observe anew.
        average: Where the outer loss is measured.
        hyper_optimizer: Makes a torch optimizer of the raw hyperparameters; by default Adam at
            0.01 times ``every``, from 0.05 to 0.2, and more in runs of less than 1000 steps.
        every: Training steps from one hyperparameter step to the next, at least; by default a
            thirtieth of ``total_steps``, from 5 to 20.
        probe: Whether the learning rate is swept at the start, or over how many steps, or
            :class:`~selftune.control.SweepSettings`; a tuned β₁ goes on with a memory of a
            three-hundredth of the run at most.
        guard: Whether a run that blows up or worsens goes back to its last good weights, or a
            policy, such as :class:`~selftune.control.GuardPolicy`.
        model: The model, if it has BatchNorm and ``params`` is not itself a module.
        name: Of this optimizer in messages, and in the log where several share one: a folder of
            that name in ``log_dir``, or tags that begin with it. By default messages say the rule.
        log_dir: Folder for TensorBoard; or a recorder of :mod:`selftune.monitor`, a
            ``SummaryWriter``, a ``function(values, step)``, or a list of these.
        distributed: Whether processes train one model together (DDP, FSDP2) and take the same
            hyperparameter steps; by default, if torch.distributed is initialised.
        settings: The numbers of the method (:class:`~selftune.method.MethodSettings`).
        tangents: The share of the weights whose sensitivities are kept, in (0, 1], rounded up to
            one of n, and 4,096 of them at least; or a dtype in which those of all are kept.
        snapshots: Where the last good weights are kept: ``"device"``, exactly, beside the weights;
            ``"host"``, in the memory of the CPU; ``"bf16"``, the default from 65,536 weights on.
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
        """Check each; None is the default of an object, too."""
        check(ARGUMENTS, vars(self))
        self.average = Average() if self.average is None else self.average
        self.settings = MethodSettings() if self.settings is None else self.settings

    @cached_property
    def learning_rate(self) -> Schedule:
        """The factors of the learning rate."""
        return Schedule(
            shape=self.schedule, total_steps=self.total_steps, warmup_steps=self.warmup_steps
        )

    def identity(self, estimator: str) -> dict[str, Any]:
        """Settings that a run must have in common with one that continues it."""
        found: dict[str, Any] = {
            "estimator": estimator, "schedule": self.learning_rate.shape,
            "bounds": str(dict(self.bounds or {})), "tangents": str(self.tangents),
            "snapshots": self.snapshots,
        }  # fmt: skip
        for name in ("average", "settings", "guard"):
            found |= flatten(name, getattr(self, name))
        return found

    def cadence(self) -> int:
        """Training steps from one hyperparameter step to the next."""
        if self.every is None:
            return self.settings.hyper.every(self.total_steps)
        return self.every


def check_names(optimizer: type, given: Mapping[str, Any]) -> None:
    """Refuse options that there are not, and say which one may be meant.

    Raises:
        TypeError: There is one.
    """
    known = [f.name for f in fields(TuningOptions)]
    wrong = next((name for name in given if name not in known), None)
    if wrong is None:
        return
    own = [n for n in inspect.signature(optimizer).parameters if n not in ("params", "tuning")]
    near = difflib.get_close_matches(wrong, [*known, *own], 1)
    hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join([*own, *known])}"
    raise TypeError(f"{optimizer.__name__} has no argument {wrong}={given[wrong]!r}: {hint}")


def build(options: TuningOptions, update: Update, stepper: AbstractStepper) -> Engine:
    """The parts of a run.

    Args:
        options: How it tunes itself.
        update: The weight step.
        stepper: Takes it.

    Raises:
        ValueError: Options that do not fit one another or the update.
    """
    settings, total, label = options.settings, options.total_steps, options.name or stepper.name
    every, tune = options.cadence(), options.tune
    if tune is None:  # the rate's own decay only where nothing else anneals
        tune = [n for n in update.tuned if total is None or n != "decay"]
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
        label=label,
        stepper=stepper,
        regularizers=update.regularizers,
        share=share,
        snapshots=options.snapshots,
        whole=None if whole is None else ClosureSteps(whole, update, shifts),
        identity=options.identity(describe(assigned)),
    )  # fmt: skip
