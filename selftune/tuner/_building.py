"""Building a tuner's run from its parts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from selftune._modes import random_kept
from selftune.control import Controller, GuardPolicy, make_guard, make_sweep
from selftune.hparams import choose
from selftune.method import (
    HyperOptimizer,
    Method,
    Sensitivities,
    WeightDecayFloor,
)
from selftune.method.slices import choose as choose_slices
from selftune.method.slices import wanted
from selftune.method.snapshots import kinds, resolve
from selftune.nn import Strength
from selftune.schedules import Schedule
from selftune.tuner import _choice
from selftune.tuner._checks import check_ranks
from selftune.tuner._compiled import Fused
from selftune.tuner._data import Stream
from selftune.tuner._first_pass import check_first
from selftune.tuner._given import Given
from selftune.tuner._noise_scale import HalvedBatches
from selftune.tuner._objective import InMode, copy_batches, for_tuning
from selftune.tuner._parts import Joining
from selftune.tuner._plan import Plan
from selftune.tuner._population import SPREAD
from selftune.tuner._rank_batches import RankBatches
from selftune.tuner._references import check_references
from selftune.tuner._resuming import UNTIL, identity
from selftune.tuner._run_state import RunState
from selftune.tuner._scoring import Scorer
from selftune.tuner._shards import Shards, shard_model
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps
from selftune.tuner._training import Training
from selftune.tuner._watch import Watch
from selftune.update import Update

log = logging.getLogger("selftune")

JOINED = 2**22
"""Largest number of weights that eager runs keep in one vector."""


def tuned_names(
    tune: Sequence[str] | None, update: Update, strengths: Mapping[str, Strength], schedule: str
) -> list[str]:
    """Names of the tuned hyperparameters; ``decay`` only without an annealing schedule."""
    if tune is not None:
        return list(tune)
    return [*(n for n in update.tuned if n != "decay" or schedule == "constant"), *strengths]


@contextmanager
def open_streams(
    train: Any, val: Any, whole: Any, device: torch.device, given: Given
) -> Iterator[tuple[Stream, Stream, Stream]]:
    """Batches of this rank; closes their workers at the end. Moves the model to the device."""
    group = given.group
    if not group.sharded:  # shards are moved after the model is divided
        given.objective.to(device)

    def stream(loader: Any, name: str) -> Stream:
        own = RankBatches(name, group.rank, group.size) if group.size > 1 else None
        return Stream(loader, name, device, skips=name == "val", shard=own)

    streams = stream(train, "train"), stream(val, "val"), stream(whole, "train")
    try:
        check_ranks(group, given.objective, streams[:2])
        group.seed()
        yield streams
    finally:
        for each in streams:
            each.close()


def build(
    given: Given,
    plan: Plan,
    streams: tuple[Stream, Stream, Stream],
    val: Any,
    device: torch.device,
    saved: Mapping[str, Any] | None,
) -> Training:
    total, names, population = plan.total, given.names, given.population
    if given.group.sharded:
        shard_model(given.objective, device, given.group.size)
    else:
        check_references(given.objective, given.metrics)
    autocast: Callable[[], Any] = nullcontext
    if given.amp:
        autocast = partial(torch.autocast, device.type, torch.bfloat16)
    members = None if population is None else population.size
    fitting = given.update.rule.fitting(total)
    fits = fitting if "lr" in names else {UNTIL} & fitting.keys()
    given.values |= {n: fitting[n] for n in fits if n not in given.chosen}
    steps = _steps(given, plan, device, autocast)
    batches = streams[0].following
    if batches is not None:
        if members is not None:
            raise ValueError(
                f"population={members}: structure.Batches follow the noise scale of one run: pass "
                "population=1, or a DataLoader with a batch_size"
            )
        steps.halved = HalvedBatches(batches=batches, group=given.group)
    if given.every is None:
        _choice.pace(steps)
    _set_layers(given)
    run = steps.begin(given.values)
    for name, value in steps.hyper.values(run.hyper.raw).items():
        if given.values[name] and not math.isclose(value, given.values[name], rel_tol=1e-6):
            log.warning(
                "%s starts at %.3g, because the given %.3g is outside its bounds",
                name, value, given.values[name],
            )  # fmt: skip
    mapped = members is not None
    start = math.nan
    if saved is None:
        start = check_first(steps, run, streams[:2], given.metrics, mapped=mapped)
        steps.carried = _carried(steps, run, streams[1], mapped=mapped)
    else:  # the streams are not at their start
        steps.carried = set(saved["carried"])
        if saved["changes"]:
            copy_batches(steps.inner, steps.outer)
    if population is not None:
        spread = dict.fromkeys(("lr", *given.update.regularizers), SPREAD)
        run = population.stack(run, steps.hyper, spread)
    weights = sum(p.numel() for p in given.objective.parameters() if p.requires_grad)
    where, second = resolve(given.snapshots, weights), "candidate" in kinds(weights)
    snapshots = Snapshots(run, steps.method, mapped, where, candidate=second)
    fused = Fused(steps, run, members)
    if fused.whole is not None:
        snapshots.rewound.append(fused.whole.estimates.forget)
    if steps.halved is not None:
        snapshots.rewound.append(steps.halved.batches.scale.forget)
    scorer = Scorer(given.objective, given.metrics, val, steps, snapshots, device)
    tuned = steps.hyper.hparams
    controllers = [
        Controller(
            hparams=tuned, total_steps=total, label="Tuner",
            sweep=None if mapped else make_sweep(given.probe, total, tuned, given.warmup),
            guard=make_guard(given.guard) if names else None,
        )
        for _ in range(members or 1)
    ]  # fmt: skip
    policy = GuardPolicy() if controllers[0].guard is None else controllers[0].guard.policy
    compare = partial(scorer.compared, streams[1], policy.most_batches)
    watch = Watch(steps, snapshots, controllers, plan.due, plan.rest, compare)
    for controller in controllers:
        if controller.guard is not None:
            controller.guard.good.hold(second)
            controller.guard.begin(start)
    return Training(
        steps=steps,
        fused=fused,
        plan=plan,
        train=streams[0],
        val=streams[1],
        scorer=scorer,
        snapshots=snapshots,
        watch=watch,
        population=population,
        identity=identity(given, plan, steps),
        joining=None if plan.join is None else Joining(step=plan.join, batches=streams[2]),
    )


def _steps(given: Given, plan: Plan, device: torch.device, autocast: Callable[[], Any]) -> Steps:
    total, names, settings = plan.total, given.names, given.settings
    schedule = Schedule(shape=given.schedule, total_steps=total, warmup_steps=given.warmup)
    rates = torch.tensor([schedule(t) for t in range(total)], dtype=torch.float64, device=device)
    floor = WeightDecayFloor.of(given.update.rule, schedule, settings.floor, given.bounds)
    size = given.hyper_rate
    hyper = HyperOptimizer(
        choose(given.known, names, given.bounds, total),
        size=settings.hyper.size(plan.every, total) if size is None else size,
        settings=settings.hyper, floor=floor,
    )  # fmt: skip
    assigned = given.assignment(total)
    rows = [n for n in hyper.names if n not in assigned.names]
    share, storage = wanted(given.tangents, given.update, assigned.whole)
    trained = [p for p in given.objective.parameters() if p.requires_grad]
    # A population's products would read members' weights at a distance: a quarter slower, compiled.
    joined = given.population is None and given.update.rule.elementwise and _small(trained)
    parts = [trained] if joined else [[p] for p in trained]
    cuts = choose_slices([[p.shape for p in part] for part in parts], share, settings.slices)
    group, shards = given.group, Shards(given.group, parts, cuts, joined)
    return Steps(
        inner=given.objective,
        outer=(InMode if group.sharded else for_tuning)(given.objective, plan.every),
        method=Method(
            sensitivities=Sensitivities(
                rows, given.update, assigned.rows, given.average, storage
            ),
            hyper=hyper, settings=settings, horizon=total,
            slices=shards.slices,
            guarded=make_guard(given.guard) is not None,
            total=group.total, outer_total=group.total,
        ),
        options={k: v for k, v in given.values.items() if k not in (*names, *given.strengths)},
        rates=rates,
        every=plan.every,
        autocast=autocast,
        whole=assigned.whole,
        whole_step_names=[n for n in hyper.names if n in assigned.names],
        layers={n: f.buffers for n, f in given.strengths.items() if n in names},
        strengths={n: given.values[n] for n in given.strengths if n not in names},
        joined=joined,
        own=given.update.rule.by_parameter(given.objective.model, trained),
        group=group,
        shards=shards,
    )  # fmt: skip


def _small(trained: Sequence[torch.Tensor]) -> bool:
    """Whether the number of operations determines the time of eager steps, and of compiling."""
    dtypes = {p.dtype for p in trained}
    return (
        sum(p.numel() for p in trained) <= JOINED
        and len(dtypes) == 1
        and dtypes <= {torch.float32, torch.float64}
    )


def _set_layers(given: Given) -> None:
    buffers = dict(given.objective.named_buffers())
    for name, strength in given.strengths.items():
        for buffer in strength.buffers:
            buffers[buffer].fill_(given.values[name])


def _carried(steps: Steps, run: RunState, stream: Stream, *, mapped: bool) -> set[int]:
    """The positions of the buffers that a pass on the first validation batch leaves unchanged.

    Their values in training, such as a running codebook's, fit the averaged weights as well. A
    hidden state, which validation passes change too, stays that of the validation batches.
    """
    apart = _statistics(steps.inner) | {n for names in steps.layers.values() for n in names}
    named = enumerate(zip(steps.buffers, run.buffers, strict=True))
    maybe = {i for i, (n, _) in named if n not in apart}
    if not maybe:
        return set()
    with random_kept(run.step.device), torch.set_grad_enabled(mapped or steps.whole is not None):
        after = steps.val_pass(run, stream.peek())[2]
    return {i for i in maybe if torch.equal(after[i], run.buffers[i])}


def _statistics(module: nn.Module) -> set[str]:
    """Names of the running statistics, which validation passes collect for the average."""
    norms = [(n, m) for n, m in module.named_modules() if isinstance(m, _NormBase)]
    return {f"{n}.{name}" for n, m in norms for name, _ in m.named_buffers(recurse=False)}
