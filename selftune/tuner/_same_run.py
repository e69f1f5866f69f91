"""Settings that identify a run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from selftune._identity import describe, flatten
from selftune.rules import Mixture
from selftune.tuner._plan import Plan
from selftune.tuner._resuming import JOINS, LENGTH, UNTIL
from selftune.tuner._steps import Steps

if TYPE_CHECKING:
    from selftune.tuner._building import Given


def identity(given: Given, plan: Plan, steps: Steps) -> dict[str, Any]:
    """Settings that must be equal in a run and in its continuation."""
    model = given.objective.model
    # Of those that the user passed: the others may follow the length, which an extension changes.
    fixed = {n: v for n, v in steps.options.items() if n in given.chosen - {UNTIL}}
    entries = {
        "parameters": str({n: list(p.shape) for n, p in model.named_parameters()}),
        "trained parameters": str(steps.params),
        # fully_shard names the class of a module FSDP…
        "model": re.sub(r"\bFSDP(?=\w+\()", "", describe(given.objective)),
        "rule": type(given.rule).__name__,
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
    if isinstance(given.rule, Mixture):
        entries["members of the rule"] = ", ".join(given.rule.members)
        entries[UNTIL] = steps.options[UNTIL]
    if plan.join is not None:
        entries[JOINS] = plan.join
    parts = {"average": given.average, "settings": given.settings, "guard": given.guard}
    for name, part in parts.items():
        entries |= flatten(name, part)
    return entries
