"""Callbacks after an evaluation: early stopping, and changed masks and scores of choices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from selftune._modes import modes_kept
from selftune.structure import gated
from selftune.structure.choice import choices
from selftune.tuner._parts import Parts
from selftune.tuner._plan import Progress


def stop(training: Parts, scores: dict[str, float]) -> str:
    """Call the callbacks; ``"stopped"`` if one requests it or patience is exhausted."""
    plan, watch = training.plan, training.watch
    # After the join, whose evaluation may be the last without improvement, there are no scores.
    ends = plan.patience is not None and training.waited >= plan.patience and not training.joined
    watch.digest(training.step)  # after the join, no evaluation has read the last losses
    if training.callbacks:
        joined = (training.joining and training.joining.joined) or 0
        before = (training.step - 1) // plan.score * plan.score
        since = training.step - max(before, joined if joined < training.step else 0)
        progress = Progress(
            step=training.step, total=plan.total, epoch=training.train.epoch,
            train_loss=watch.history.mean_loss(since), scores=scores, hparams=watch.hparams(),
            joined=training.joined,
        )  # fmt: skip
        with _structure_followed(training) as changed:
            ends |= any([bool(call(progress)) for call in training.callbacks])
        _check_trained(training)
        masks = [mask for name, mask in changed.items() if name.endswith("mask")]
        scores_of = [scores for name, scores in changed.items() if name.endswith("scores")]
        if scores_of and training.joining is not None:
            raise ValueError(
                "val=None: a callback tunes choices until late in the run, but the held-out "
                f"examples join after step {training.joining.step}: pass validation batches, or "
                "val=0.1"
            )
        if changed:  # losses under others are not comparable
            training.best, training.saved_best, training.waited = math.inf, None, 0
        made = any(float(each.softmax(0).max()) == 1 for each in scores_of)
        if masks or made:  # closed units have no gradient, and are not dead
            watch.controllers[0].units_closed()
        training.group.share_streams()  # callbacks may have drawn random numbers
    return "stopped" if training.group.any(ends) else "finished"


def _check_trained(training: Parts) -> None:
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


@contextmanager
def _structure_followed(training: Parts) -> Iterator[dict[str, Tensor]]:
    """Put the averaged weights into the model; copy changed masks and scores to the run at the end.

    Yields:
        Changed masks and scores of choices by name, complete after the block.
    """
    steps, scorer, snapshots = training.steps, training.scorer, training.snapshots
    changed: dict[str, Tensor] = {}
    tensors = {f"{n}.mask".lstrip("."): m.mask for n, m in gated(steps.inner)}
    tensors |= {f"{n}.scores".lstrip("."): c.scores for n, c in choices(steps.inner)}
    with scorer.shown(training.watch.leader), modes_kept(scorer.model):
        before = _copies(tensors)
        yield changed
        copies = steps.group.from_first(lambda: _copies(tensors)) if tensors else {}
    changed |= {n: t for n, t in copies.items() if not torch.equal(t, before[n])}
    members = snapshots.run.step.numel()
    if changed and members > 1:
        raise ValueError(
            f"population={members}: a callback closed units or changed scores of choices of one "
            "member, but all members share them; omit population="
        )
    run = snapshots.run
    tensor_lists: list[Sequence[Tensor]] = [run.buffers, run.average_buffers, snapshots.buffers]
    if snapshots.candidate:
        tensor_lists.append(snapshots.candidate[len(snapshots.weights) :])
    with torch.no_grad():
        for name, tensor in changed.items():
            for buffers in tensor_lists:
                buffers[steps.buffers.index(name)].copy_(tensor)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().clone() for n, t in tensors.items()}
