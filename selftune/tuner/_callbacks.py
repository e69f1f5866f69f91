"""Early stopping, by patience or a callback."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from selftune.tuner._plan import Progress
from selftune.tuner._structure import structure_followed

if TYPE_CHECKING:
    from selftune.tuner._training import Training


def stop(training: Training, scores: dict[str, float]) -> str:
    """Call the callbacks; ``"stopped"`` if one requests it or patience is exhausted.

    Args:
        training: The run.
        scores: Scores of the last evaluation.

    Raises:
        ValueError: Scores of choices changed in a run whose held-out examples join, or a callback
            froze or unfroze parameters.
    """
    plan, watch = training.plan, training.watch
    # After the join, whose evaluation may be the last without improvement, there are no scores.
    ends = plan.patience is not None and training.waited >= plan.patience and not training.joined
    if training.callbacks:
        progress = Progress(
            step=training.step, total=plan.total, epoch=training.train.epoch,
            train_loss=watch.history.mean_loss(plan.score), scores=scores, hparams=watch.hparams(),
            joined=training.joined,
        )  # fmt: skip
        parts = training.steps, training.scorer, training.snapshots, watch.leader
        with structure_followed(*parts) as changes:
            ends |= any([bool(call(progress)) for call in training.callbacks])
        _check_trained(training)
        if changes.scores and training.joining is not None:
            raise ValueError(
                "val=None: a callback tunes choices until late in the run, but the held-out "
                f"examples join after step {training.joining.step}: pass validation batches, or "
                "val=0.1"
            )
        if changes.masks or changes.scores:  # losses under others are not comparable
            training.best, training.saved_best, training.waited = math.inf, None, 0
        if changes.masks or changes.made:  # closed units have no gradient, and are not dead
            watch.controllers[0].restart()
        training.group.share_streams()  # callbacks may have drawn random numbers
    return "stopped" if training.group.any(ends) else "finished"


def _check_trained(training: Training) -> None:
    """Raise an error if a callback froze or unfroze parameters."""
    steps = training.steps
    now = {n for n, p in steps.inner.named_parameters() if p.requires_grad}
    changed = sorted(now ^ set(steps.params))
    if changed:
        names = [n.removeprefix("model.") for n in changed]
        raise ValueError(
            f"a callback changed requires_grad of {', '.join(names)}: st.Tuner trains the "
            "parameters that were trainable when fit began; unfreeze after fit and call fit of a "
            "new Tuner, or use st.AdamW in your own loop"
        )
