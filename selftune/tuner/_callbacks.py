"""Early stopping, by patience or a callback."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from selftune.tuner._masks import masks_followed
from selftune.tuner._plan import Progress

if TYPE_CHECKING:
    from selftune.tuner._training import Training


def stop(training: Training, scores: dict[str, float]) -> str:
    """Call the callbacks; ``"stopped"`` if one requests it or patience is exhausted.

    Args:
        training: The run.
        scores: Scores of the last evaluation.
    """
    plan, watch = training.plan, training.watch
    ends = plan.patience is not None and training.waited >= plan.patience
    if training.callbacks:
        progress = Progress(
            step=training.step, total=plan.total, epoch=training.train.epoch,
            train_loss=watch.history.mean_loss(plan.score), scores=scores, hparams=watch.hparams(),
            joined=training.joined,
        )  # fmt: skip
        parts = training.steps, training.scorer, training.snapshots, watch.leader
        with masks_followed(*parts) as closed:
            ends |= any([bool(call(progress)) for call in training.callbacks])
        if closed:  # losses under other masks are not comparable
            training.best, training.saved_best, training.waited = math.inf, None, 0
            watch.controllers[0].restart()
        training.group.share_streams()  # callbacks may have drawn random numbers
    return "stopped" if training.group.any(ends) else "finished"
