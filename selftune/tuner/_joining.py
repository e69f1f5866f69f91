"""A run without a validation set, whose held-out examples join the training data."""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selftune.tuner._parts import Parts
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps

log = logging.getLogger("selftune")


def join(training: Parts, scores: dict[str, float]) -> None:
    """Let the held-out examples join the training data."""
    joining, leader = training.joining, training.watch.leader
    assert joining is not None
    guard = training.watch.controllers[leader].guard
    joining.scores, joining.loss = dict(scores), scores["loss"]
    joining.back = guard is not None and guard.worsened > 0
    if joining.back:
        joining.loss = training.scorer.compared(training.val, sys.maxsize, leader)[1]
        log.warning(
            "val=None: the run overfitted before the held-out examples joined at step %d; it "
            "ends with its last good weights from before the join (validation loss %.4g). Train "
            "for fewer steps, with more regularization, or keep a split: val=0.1",
            training.step, joining.loss,
        )  # fmt: skip
    joining.joined = training.step
    joining.batches.epoch = training.train.epoch + 1
    training.train.close()
    training.train = joining.batches
    log.info(
        "step %d: the held-out examples join the training data, at a validation loss of %.4g; "
        "hyperparameters keep their values, and no validation loss is measured from here on",
        training.step, scores["loss"],
    )  # fmt: skip


def follow(training: Parts, batch: Any) -> None:
    """Update BatchNorm's averages and the log, as hyperparameter steps did before the join."""
    steps, fused, step = training.steps, training.fused, training.step
    if steps.buffers:
        fused.eagerly(partial(_refresh, steps), batch)
    if training.plan.due(step) or not fused.run.step.is_cuda:
        training.watch.digest(step)
        training.watch.log.trained(step, training.watch.history.train_loss[-1])


def _refresh(steps: Steps, run: RunState, batch: Any) -> tuple[RunState, Tensor]:
    """The run after a pass at the average, for its BatchNorm statistics, and that pass's loss."""
    loss, _, buffers = steps.outer_gradient(run, batch)
    fine = torch.isfinite(loss)
    pairs = zip(buffers, run.average_buffers, strict=True)
    kept = [torch.where(fine, new, old) for new, old in pairs]
    return run._replace(average_buffers=kept), loss
