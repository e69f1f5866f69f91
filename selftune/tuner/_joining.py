"""A run without a validation set, whose held-out examples join the training data."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selftune.holdout import HoldOut, split
from selftune.tuner._data import Stream
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps

if TYPE_CHECKING:
    from selftune.tuner._training import Training

log = logging.getLogger("selftune")


@dataclass(kw_only=True)
class Joining:
    """The join of a run: its step, the batches after it, and its state.

    Args:
        step: The step after which the held-out examples join.
        batches: Training batches with the held-out examples.

    Attributes:
        joined: The step at which they joined, or None.
        scores: Scores on the held-out examples at the join.
        back: Whether the run had overfitted, so that it returns to its last good weights.
        loss: Loss on the held-out examples: at the join, or at the last good weights if ``back``.
    """

    step: int
    batches: Stream
    joined: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    back: bool = False
    loss: float = math.nan

    def state_dict(self) -> dict[str, Any]:
        """The state for ``load_state_dict``."""
        return {n: getattr(self, n) for n in ("joined", "scores", "back", "loss")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        vars(self).update(state)


def parts(train: Any, val: Any, seed: int) -> tuple[Any, Any, HoldOut | None, float | None]:
    """Training and validation batches; the settings of the join and the share of a split, if any.

    Args:
        train: Training batches.
        val: Validation batches; a share of the training data; a :class:`HoldOut`; or None.
        seed: Seed of the split.

    Raises:
        ValueError: The training data cannot be divided.
    """
    if val is None or isinstance(val, HoldOut):
        holding = HoldOut() if val is None else val
        given = f"val=None (a held-out share of {holding.share})" if val is None else f"val={val}"
        return *split(train, holding.share, seed, given), holding, float(holding.share)
    if isinstance(val, Real):
        share = float(val)
        if not 0 < share < 1:
            raise ValueError(
                f"val={val} must be between 0 and 1, or a loader of validation batches"
            )
        return *split(train, share, seed, f"val={val}"), None, share
    if val is train:
        log.warning("val is train: regularization cannot be tuned on the training data")
    return train, val, None, None


def join(training: Training, scores: dict[str, float]) -> None:
    """Let the held-out examples join the training data.

    Args:
        training: The run, after its last evaluation on the held-out examples.
        scores: Scores of that evaluation.
    """
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


def follow(training: Training, batch: Any) -> None:
    """Update BatchNorm's averages and the log, as hyperparameter steps did before the join.

    Args:
        training: The run, at a step at which a hyperparameter step would be due.
        batch: Its training batch.
    """
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
