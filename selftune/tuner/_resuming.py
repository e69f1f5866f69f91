"""Going on with a saved run: as it was, or longer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from selftune.tuner._snapshots import Snapshots
from selftune.tuner._watch import Watch

log = logging.getLogger("selftune")

WEIGHTS, HYPER, SCORES = "weights", "hyperparameters", "scores"
"""The parts of a step, one of which a run goes on with: tensors are written at its end alone."""
LENGTH = "number of steps"
"""Of the whole run, in what a run must have in common with one that continues it."""
FOLLOWS = (LENGTH, "every")
"""What differs between a run and the same one made longer."""


def extends(state: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a finished run is to go on for more steps.

    Args:
        state: A checkpoint.
        identity: Of the run that is to go on.
    """
    length = state["identity"].get(LENGTH, 0)
    over = state["ended"] == "finished" and state["numbers"][0] >= length
    over = over and state["due"] == WEIGHTS
    return bool(over and identity[LENGTH] > length)


def announce(state: Mapping[str, Any], total: int, *, longer: bool) -> None:
    """Log where a run goes on.

    Args:
        state: Its checkpoint.
        total: Steps in the whole run.
        longer: Whether it had finished, and is made longer.
    """
    step, length = state["numbers"][0], state["identity"][LENGTH]
    if longer:
        log.warning(
            "resume: a finished run of %d steps goes on from its average to step %d; the learning "
            "rate anneals anew, as in a run of that length", length, total,
        )  # fmt: skip
    else:
        log.warning("resumed at step %d of %d", step, total)


def name_changes(
    state: Mapping[str, Any], starts: Mapping[str, float], present: Mapping[str, float]
) -> None:
    """Log starting values that differ from those of the saved run, which goes on from its own.

    Args:
        state: Its checkpoint.
        starts: Starting values by name.
        present: Values now, by name.
    """
    for name, before in state["starts"].items():
        if name in starts and starts[name] != before:
            log.warning(
                "resume: %s=%.4g is not taken: the run, which began at %.4g, goes on from %.4g. "
                "For another start begin anew, in another log_dir",
                name, starts[name], before, present.get(name, before),
            )  # fmt: skip


def extend(watch: Watch, snapshots: Snapshots, step: int) -> None:
    """Go on from the average of a run that has finished."""
    for member, controller in enumerate(watch.controllers):
        snapshots.take("average", member)
        snapshots.rewind({}, member)
        controller.final.forget()
    watch.begin(step)
