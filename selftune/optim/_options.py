"""The options of a self-tuned optimizer."""

from __future__ import annotations

import difflib
import inspect
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from selftune import control, method
from selftune._arguments import FLAG, FUNCTION, MAPPING, MODULE, NONE, TEXT, Kind, That, check
from selftune._identity import flatten
from selftune.control import SweepSettings
from selftune.estimators import AbstractEstimator
from selftune.method import Average, MethodSettings
from selftune.method.slices import SHARE
from selftune.optim._shifts import MakeOptimizer
from selftune.schedules import Schedule

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


class Tuning(TypedDict, total=False):
    """Types of the keyword arguments ``**tuning``; :class:`TuningOptions` says what they mean."""

    tune: Sequence[str] | None
    per: str | Mapping[str, str]
    bounds: Mapping[str, tuple[float, float]] | None
    schedule: str | None
    total_steps: int | None
    warmup_steps: int
    estimator: AbstractEstimator | None
    average: Average | None
    hyper_optimizer: MakeOptimizer | None
    every: int | None
    probe: bool | int | SweepSettings
    guard: Any
    model: nn.Module | None
    log_dir: str | Path | Any | None
    distributed: bool | None
    settings: MethodSettings | None
    tangents: float | torch.dtype | None
    snapshots: str | None
    name: str | None


class RuleTuning(Tuning, total=False):
    """Those of an optimizer with a rule of the library, which also takes torch's kernel options."""

    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool


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
            its own batch, and a single parameter group; copying and loading restart ``Unrolled``.
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


def options_of(optimizer: type, given: Mapping[str, Any]) -> TuningOptions:
    """The options of an optimizer; an error for an unknown one names the closest known one."""
    known = [f.name for f in fields(TuningOptions)]
    wrong = next((name for name in given if name not in known), None)
    if wrong is None:
        return TuningOptions(**given)
    own = [n for n in inspect.signature(optimizer).parameters if n not in ("params", "tuning")]
    initials = "".join(part[:1] for part in wrong.split("_"))  # learning_rate: lr
    near = [n for n in [*known, *own] if n == initials or wrong in n.split("_")]  # total_steps
    near = near[:1] or difflib.get_close_matches(wrong, [*known, *own], 1)
    hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join([*own, *known])}"
    raise TypeError(f"{optimizer.__name__} has no argument {wrong}={given[wrong]!r}: {hint}")
