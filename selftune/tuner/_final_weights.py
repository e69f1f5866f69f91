"""The weights that a run leaves in the model."""

from __future__ import annotations

import logging
import math
from typing import Any

from selftune.tuner import _checkpoints
from selftune.tuner._parts import Parts
from selftune.tuner._scoring import POSITIONS
from selftune.tuner._shards import from_first

log = logging.getLogger("selftune")


def place(training: Parts) -> dict[str, float]:
    """Put the best weights into the model; return their scores over the validation set.

    Without a validation set they are the averaged ones, with the scores at the join. If the run
    overfitted before the join, they are the last good ones from before it, with their loss.
    """
    scorer, leader = training.scorer, training.watch.leader
    if training.joining is not None and training.joined:
        scorer.place(-1 if training.joining.back else 0, leader)
        return {**training.joining.scores, "loss": training.joining.loss}
    saved = from_first(training.group, lambda: _saved(training))
    guarded = training.watch.controllers[0].guard is not None
    tried = POSITIONS if training.steps.method.settings.final_weights else (0.0,)
    return scorer.best(training.val, leader, saved, [p for p in tried if p >= 0 or guarded])


def _saved(training: Parts) -> dict[str, Any] | None:
    """The saved best weights, from memory or from disk."""
    if training.saved_best is not None or training.folder is None or training.best == math.inf:
        return training.saved_best
    return _checkpoints.read_best(training.folder)


def save_best(training: Parts, scores: dict[str, float]) -> None:
    """Save the best weights to disk, or keep them in memory.

    They are kept in memory without a folder, if the disk is full, and if the model's state has
    objects that a checkpoint cannot contain.
    """
    if not (training.group.first or training.group.sharded):
        return
    with training.scorer.shown(training.watch.leader):
        state = shown_state(training, scores)
    folder = training.writes
    written = None
    if folder and training.storable is not False:
        written = _checkpoints.write(folder / _checkpoints.BEST, state)
    if folder and written and training.storable is None:
        try:
            _checkpoints.read_best(folder)
            training.storable = True
        except ValueError as error:
            (folder / _checkpoints.BEST).unlink()
            training.storable = written = False
            log.warning("the best weights are kept in memory, not in %s: %s", folder, error)
    training.saved_best = state if training.group.first and not written else None


def write_best(training: Parts, scores: dict[str, float], *, resumable: bool) -> None:
    """Write the weights of the model, whose scores are known, to ``best.pt``.

    An interrupted run, once resumed, must find the weights that an undisturbed one has, so the file
    keeps them beside those that it ends with.
    """
    if training.writes is not None or training.group.sharded:
        state = shown_state(training, scores)
        if resumable:
            state[_checkpoints.RESUMED] = _saved(training)
        if training.writes is not None and training.storable is not False:
            _checkpoints.write(training.writes / _checkpoints.BEST, state)


def shown_state(training: Parts, scores: dict[str, float]) -> dict[str, Any]:
    """The current weights of the model, whose scores are known."""
    known: dict[str, Any] = {"step": training.step, "loss": scores["loss"], "scores": scores}
    known["hparams"] = training.watch.hparams()
    return {**training.scorer.state(), **known}
