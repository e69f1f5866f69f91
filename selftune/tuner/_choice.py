"""The choice of one rule of a mixture in a tuner's run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from selftune._trees import copy_into
from selftune.method import HyperState, State, choice
from selftune.rules import Mixture, PlainOptimizer
from selftune.tuner._compiled import Fused
from selftune.tuner._parts import Parts
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps

log = logging.getLogger("selftune")

BEGUN = ("parts", "displacement", "secants", "stiffness")
"""Fields of the method's state that are reset at the choice."""


@torch.no_grad()
def choose(training: Parts, batch: Any) -> None:
    """Choose a rule if the choice is due, by the gradient on the batch of the next step.

    If that gradient is not finite, the choice is postponed by a step.
    """
    steps, run = training.steps, training.fused.run
    rule = choice.undecided(steps.update)
    if rule is None or training.step < steps.options["mix_until"]:
        return
    training.watch.digest(training.step)
    grads = steps.gradient(run, batch)[1]
    parts = run.method.parts
    updates = [steps.update] * len(parts)
    squared = choice.squares(updates, parts, grads, steps.moments(run), steps.method.total)
    present = {n: float(v) for n, v in steps.hyper.values(run.hyper.raw).items()}
    values = {**steps.options, **present}
    decided = choice.decide(rule, values, squared)
    if decided is None:
        return
    (name, moves), watch, controller = decided, training.watch, training.watch.controllers[0]
    moves |= controller.calmed(values, rule.own(name))
    chosen = choice.Chosen(name, moves, training.step, training.plan.every)
    become(steps, training.fused, chosen)
    watch.note(training.step)
    plain = optimizer_of(steps, watch.hparams())
    sentence = choice.announcement(rule, values, plain, training.step)
    log.info("%s, %s", controller.label, sentence)
    watch.metrics.monitor.text("rule", sentence, training.step)


def pace(steps: Steps) -> None:
    """Use the shortest interval of hyperparameter steps until a rule is chosen."""
    settings = steps.method.settings.hyper
    if choice.undecided(steps.update) is not None and steps.every > settings.often:
        steps.hyper.size *= settings.size(settings.often) / settings.size(steps.every)
        steps.every = settings.often


def become(steps: Steps, fused: Fused, chosen: choice.Chosen) -> None:
    """Continue with one member: reset sensitivities, keep weights, average and rule state."""
    run, method, rule = fused.run, steps.method, steps.update.rule
    assert isinstance(rule, Mixture)
    rule.choose(chosen.name)
    hyper, state = method.hyper, run.method
    if hyper.floor is not None:
        hyper.floor = hyper.floor.under(rule)
    method.sensitivities.assign()
    settings = method.settings.hyper
    hyper.size *= settings.size(chosen.every) / settings.size(steps.every)
    steps.every = chosen.every
    raw = run.hyper.raw
    for name, change in chosen.moves.items():
        raw = hyper.move(raw, name, change, hyper.frame(raw.device))
        if name not in hyper.hparams:
            steps.options[name] *= math.exp(change)
    copy_into(run.hyper, HyperState.begin(raw))
    fresh = _begun(steps, run)
    for name in BEGUN:
        getattr(state, name)[:] = getattr(fresh, name)  # in place, because the run is shared
    steps.chosen = chosen
    if fused.whole is not None:
        fused.whole.estimates.forget()
    compiled, fused.compiled = fused.compiled, False
    if compiled:  # the graphs use the previous tensors
        fused.compile()


def _begun(steps: Steps, run: RunState) -> State:
    rows, method, rule = steps.method.sensitivities, steps.method, steps.update.rule
    assert isinstance(rule, Mixture)
    values = {**steps.start, **steps.numbers(run)[0]}
    parts = [
        choice.taken_over(rule, part, rows.begin(part.params, values, cut))
        for cut, part in method.cuts(run.method.parts)
    ]
    return method.begin(parts, run.hyper, run.step)


def expected(steps: Steps, run: RunState, chosen: Sequence[Any] | None) -> RunState:
    """A run with the tensors of a saved run that chose this member; changes nothing."""
    rule = choice.undecided(steps.update)
    if chosen is None or rule is None:
        return run
    try:
        rule.choose(choice.Chosen(*chosen).name)
        steps.method.sensitivities.assign()
        fresh = _begun(steps, run)
    finally:
        rule.choose(None)
        steps.method.sensitivities.assign()
    return run._replace(method=run.method._replace(**{n: getattr(fresh, n) for n in BEGUN}))


def restore(steps: Steps, fused: Fused, chosen: Sequence[Any] | None) -> None:
    """Apply the choice of a saved run to a newly built one."""
    if chosen is not None and choice.undecided(steps.update) is not None:
        become(steps, fused, choice.Chosen(*chosen))


def optimizer_of(steps: Steps, values: Mapping[str, Any]) -> PlainOptimizer | None:
    """The rule with its current settings as a plain torch optimizer; None before the choice."""
    rule, values = steps.update.rule, {**steps.options, **values}
    return rule.plain(values) if isinstance(rule, Mixture) else PlainOptimizer.of(rule, values)
