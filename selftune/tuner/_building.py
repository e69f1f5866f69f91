"""The parts of a tuner's run, put together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from selftune.averaging import Average
from selftune.bilevel import Bilevel
from selftune.floor import Floor
from selftune.fused import Fused
from selftune.hparams import Hparam
from selftune.hypervector import HyperVector
from selftune.nn import Found
from selftune.probe import Probe, probe_steps
from selftune.rules import AbstractRule
from selftune.schedules import Schedule
from selftune.tuner._checks import check_first
from selftune.tuner._data import Stream
from selftune.tuner._division import Division
from selftune.tuner._good import Good
from selftune.tuner._objective import Objective, for_tuning
from selftune.tuner._population import SPREAD, Population
from selftune.tuner._scoring import Metric, Scorer
from selftune.tuner._training import Plan, Training
from selftune.tuner._watch import Watch
from selftune.update import Update

log = logging.getLogger("selftune")

JOINED = 2**22
"""Weights up to which eager runs keep them in one vector."""


@dataclass(kw_only=True)
class Settings:
    """What a tuner was given, whatever its data.

    Attributes:
        objective: The model with its training loss.
        rule: How weights step.
        update: The same with penalties and decay.
        found: Strengths in the model and the loss, by name.
        known: Scales and bounds of all hyperparameters, by name.
        values: Where they start.
        names: Those that are tuned.
        bounds: (lowest, highest) values by name.
        estimator: How it prints, for checkpoints.
        division: The estimators.
        tangents: The dtype responses are kept in.
        average: Where the outer loss is measured.
        every: Weight steps from one hyperparameter step to the next.
        hyper_rate: Size of one.
        schedule: Shape of the learning rate.
        warmup: Steps over which it climbs.
        probe: Whether it is probed, or over how many steps.
        guard: Whether a run is rolled back.
        metrics: By name.
        amp: Whether passes run in bfloat16.
        population: Runs trained at once, or None.
    """

    objective: Objective
    rule: AbstractRule
    update: Update
    found: Mapping[str, Found]
    known: Mapping[str, Hparam]
    values: dict[str, float]
    names: list[str]
    bounds: Mapping[str, tuple[float, float]] | None
    estimator: str
    division: Division
    tangents: torch.dtype | None
    average: Average
    every: int
    hyper_rate: float
    schedule: str
    warmup: int
    probe: bool | int
    guard: bool
    metrics: Mapping[str, Metric]
    amp: bool
    population: Population | None


def build(
    given: Settings,
    plan: Plan,
    streams: tuple[Stream, Stream],
    val: Any,
    device: torch.device,
    new: bool,
) -> Training:
    """Put a run together.

    Args:
        given: What the tuner was given.
        plan: Its length, and how often what happens.
        streams: Training and validation batches.
        val: The validation set.
        device: Where to train.
        new: Whether it begins, rather than goes on from a checkpoint.

    Raises:
        ValueError: Data, bounds or lengths that do not fit.
    """
    total, names, population = plan.total, given.names, given.population
    autocast: Callable[[], Any] = nullcontext
    if given.amp:
        autocast = partial(torch.autocast, device.type, torch.bfloat16)
    members = None if population is None else population.size
    schedule = Schedule(
        shape=given.schedule, total_steps=total, warmup_steps=min(given.warmup, total - 1)
    )
    hyper = HyperVector(
        given.known, names, given.bounds,
        horizon=total, floor=Floor.of(given.rule, schedule), rate=given.hyper_rate,
        strengths=given.found,
    )  # fmt: skip
    bilevel = _bilevel(given, schedule, plan, hyper, device, autocast)
    _strengthen(given)
    run = bilevel.init(given.values)
    for name, value in hyper.values(run.hyper.raw).items():
        if given.values[name] and not math.isclose(value, given.values[name], rel_tol=1e-6):
            log.warning(
                "%s starts at %.3g, since the given %.3g is outside its bounds",
                name, value, given.values[name],
            )  # fmt: skip
    start = check_first(bilevel, run, streams) if new else math.nan
    if population is not None:
        spread = {"lr", *given.update.regularizers}
        run = population.stack(run, hyper, dict.fromkeys(spread, SPREAD))
    good = Good(run, members is not None)
    fused = Fused(bilevel, run, members)
    if fused.followed is not None:
        good.rewound.append(fused.followed.follower.forget)
    scorer = Scorer(
        given.objective, given.metrics, val, bilevel, members is not None, device, autocast
    )
    compare = partial(scorer.compared, run, good, streams[1])
    guarded = given.guard and bool(names)
    watch = Watch(bilevel, run, good, members, guarded, plan.due, plan.rest, compare)
    for guard in watch.guards:
        guard.begin(start)
    probed = probe_steps(total) if given.probe is True else int(given.probe)
    if probed > total:
        raise ValueError(f"probe={probed} is longer than the run of {total} steps")
    probing = probed and members is None and "lr" in names and new
    return Training(
        bilevel=bilevel,
        fused=fused,
        plan=plan,
        train=streams[0],
        val=streams[1],
        scorer=scorer,
        good=good,
        watch=watch,
        probe=Probe(steps=probed) if probing else None,
        population=population,
        identity={
            "parameters": {n: list(p.shape) for n, p in given.objective.model.named_parameters()},
            "rule": type(given.rule).__name__,
            "trained parameters": bilevel.params,
            "estimator": given.estimator,
            "tuned hyperparameters": names,
            "number of steps": total,
            "every": given.every,
            "population": members or 1,
        },
    )


def _bilevel(
    given: Settings,
    schedule: Schedule,
    plan: Plan,
    hyper: HyperVector,
    device: torch.device,
    autocast: Callable[[], Any],
) -> Bilevel:
    """The steps of weights and hyperparameters."""
    total, names = plan.total, given.names
    fixed = {k: v for k, v in given.values.items() if k not in (*names, *given.found)}
    rates = torch.tensor([schedule(t) for t in range(total)], dtype=torch.float64, device=device)
    return Bilevel(
        given.objective, for_tuning(given.objective, given.every), given.update, fixed, hyper,
        given.division.rows, given.tangents, given.average, rates, autocast,
        given.division.whole, given.division.followed,
        {n: f.buffers for n, f in given.found.items() if n in names},
        joined=plan.compile is not True and given.population is None and _small(given.objective),
        limited=given.guard,
    )  # fmt: skip


def _small(objective: Objective) -> bool:
    """Whether eager steps of the model take as long as their operations are many."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    dtypes = {p.dtype for p in trained}
    return (
        sum(p.numel() for p in trained) <= JOINED
        and len(dtypes) == 1
        and dtypes <= {torch.float32, torch.float64}
    )


def _strengthen(given: Settings) -> None:
    """Write the given strengths into the layers that have them."""
    buffers = dict(given.objective.named_buffers())
    for name, found in given.found.items():
        for buffer in found.buffers:
            buffers[buffer].fill_(given.values[name])
