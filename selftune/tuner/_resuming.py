"""Resuming a saved run, with the same settings and the same or a greater length."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from selftune._identity import describe, flatten
from selftune._modes import draw_once
from selftune.penalties import described
from selftune.rules import Mixture
from selftune.tuner._data import Stream
from selftune.tuner._given import Given
from selftune.tuner._plan import Plan
from selftune.tuner._scoring import Scorer
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps
from selftune.tuner._watch import Watch

log = logging.getLogger("selftune")

WEIGHTS, HYPER, SCORES = "weights", "hyperparameters", "scores"
"""The parts of a step at which a run can resume; tensors are written at the end of a part."""
LENGTH = "number of steps"
"""Key of the length of the run in its identity."""
UNTIL = "mix_until"
"""Key of the step at which a mixture of rules chooses."""
JOINS = "step of the join"
"""Key of the step after which held-out examples join."""
FOLLOWS = (LENGTH, "every", UNTIL, JOINS)
"""Settings that differ between a run and its extension."""
SAME = 1e-3
"""Relative tolerance of a validation loss that is computed again."""


def identity(given: Given, plan: Plan, steps: Steps) -> dict[str, Any]:
    """Settings that must be equal in a run and in its continuation."""
    model = given.objective.model
    # Of those that the user passed: the others may follow the length, which an extension changes.
    chosen = {*given.chosen - {UNTIL}, *(p.name for p in given.update.penalties)}
    fixed = {n: v for n, v in steps.options.items() if n in chosen}
    entries: dict[str, Any] = {
        "parameters": str({n: list(p.shape) for n, p in model.named_parameters()}),
        "trained parameters": str(steps.params),
        "model": _modules(given),
        "rule": describe(given.update.rule),
        "penalties": described(given.update.penalties),
        "estimator": describe(given.assignment(plan.total)),
        "tangents": str(given.tangents),
        "snapshots": given.snapshots,
        "tuned hyperparameters": str(given.names),
        LENGTH: plan.total,
        "every": plan.every,
        "fixed hyperparameters": str(dict(sorted(fixed.items()))),
        "size of a hyperparameter step": str(given.hyper_rate),
        "schedule": given.schedule,
        "warmup_steps": given.warmup,
        "amp": given.amp,
        "population": 1 if given.population is None else given.population.size,
        "bounds": str(dict(given.bounds or {})),
    }
    if isinstance(given.update.rule, Mixture):
        entries["members of the rule"] = ", ".join(given.update.rule.members)
        entries[UNTIL] = steps.options[UNTIL]
    if plan.join is not None:
        entries[JOINS] = plan.join
    if plan.share is not None:
        entries["share of the training data for validation"] = plan.share
    if plan.share is not None or given.population is not None:
        entries["seed"] = plan.seed
    parts = {"average": given.average, "settings": given.settings, "guard": given.guard}
    for name, part in parts.items():
        entries |= flatten(name, part)
    return entries


def _modules(given: Given) -> str:
    """The modules, without values of tuned strengths: a run changes those of its model."""
    # fully_shard names the class of a module FSDP…
    text = re.sub(r"\bFSDP(?=\w+\()", "", describe(given.objective))
    for name in (n for n in given.strengths if n in given.names):
        text = re.sub(rf"[-+.\w]+(?=, name={re.escape(repr(name))})", "tuned", text)
    return text


def extends(state: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a finished run is to be extended."""
    length = state["identity"].get(LENGTH, 0)
    over = state["ended"] == "finished" and state["numbers"][0] >= length
    over = over and state["due"] == WEIGHTS
    if state["ended"] == "stopped" and identity[LENGTH] != length:
        raise ValueError(
            f"resume: the run was ended by patience or a callback at step {state['numbers'][0]}, "
            "so it has no other length: use another log_dir for a new run"
        )
    return bool(over and identity[LENGTH] > length)


def announce(state: Mapping[str, Any], total: int, *, longer: bool) -> None:
    """Log the step from which a run continues."""
    step, length = state["numbers"][0], state["identity"][LENGTH]
    if longer:
        log.warning(
            "resume: a finished run of %d steps continues from its average to step %d; the "
            "learning rate is annealed again, as in a run of that length", length, total,
        )  # fmt: skip
    else:
        log.warning("resumed at step %d of %d", step, total)


def name_changes(
    state: Mapping[str, Any], starts: Mapping[str, float], present: Mapping[str, float]
) -> None:
    """Log starting values that differ from those of the saved run and are ignored."""
    for name, before in state["starts"].items():
        if name in starts and starts[name] != before:
            log.warning(
                "resume: %s=%.4g is ignored: the run started at %.4g and continues from %.4g. "
                "For another starting value use another log_dir",
                name, starts[name], before, present.get(name, before),
            )  # fmt: skip


def check_data(scorer: Scorer, stream: Stream, best: Mapping[str, Any]) -> None:
    """Warn if the saved best weights have another loss on this validation set."""
    loss = scorer.loss_of(best, stream)
    if math.isclose(loss, best["loss"], rel_tol=SAME):
        return
    # Augmented examples, and shuffled batches with a random loss, differ from pass to pass.
    draw_once()
    if math.isclose(loss, scorer.loss_of(best, stream), rel_tol=SAME):
        log.warning(
            "resume: the best weights had a validation loss of %.4g, and have %.4g on the data of "
            "this call. If the data are others, use another log_dir: the weights may have been "
            "trained on examples of this validation set", best["loss"], loss,
        )  # fmt: skip


def extend(watch: Watch, snapshots: Snapshots, step: int) -> None:
    """Extend a finished run from its averaged weights."""
    for member, controller in enumerate(watch.controllers):
        snapshots.take("average", member)
        snapshots.rewind({}, member)
        controller.final.forget()
    watch.begin(step, extended=True)
