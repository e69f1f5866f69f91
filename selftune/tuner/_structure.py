"""Copies masks and scores of choices that callbacks changed into the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selftune._modes import modes_kept
from selftune.structure import gated
from selftune.structure.choice import choices
from selftune.tuner._scoring import Scorer
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps


@dataclass
class Changes:
    """Buffers that callbacks changed.

    Attributes:
        masks: Names of masks.
        scores: Names of scores of choices.
        made: Whether a choice was made: one of its weights became 1.
    """

    masks: list[str] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)
    made: bool = False


@contextmanager
def structure_followed(
    steps: Steps, scorer: Scorer, snapshots: Snapshots, member: int
) -> Iterator[Changes]:
    """Put the averaged weights into the model; copy changed masks and scores to the run at the end.

    Args:
        steps: The steps, with the names of the buffers.
        scorer: Puts the weights into the model.
        snapshots: The snapshots of the run, whose masks and scores change too.
        member: The member of a population.

    Yields:
        The changes, complete after the block.

    Raises:
        ValueError: Masks or scores of a population changed.
    """
    changes = Changes()
    masks = {_joined(n, "mask"): m.mask for n, m in gated(steps.inner)}
    scores = {_joined(n, "scores"): c.scores for n, c in choices(steps.inner)}
    tensors = masks | scores
    with scorer.shown(snapshots.run, member), modes_kept(scorer.model):
        before = _copies(tensors)
        yield changes
        copies = steps.group.from_first(lambda: _copies(tensors)) if tensors else {}
    changed = [n for n, t in copies.items() if not torch.equal(t, before[n])]
    changes.masks = [n for n in changed if n in masks]
    changes.scores = [n for n in changed if n in scores]
    changes.made = any(float(copies[n].softmax(0).max()) == 1 for n in changes.scores)
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
        for name in changed:
            for buffers in tensor_lists:
                buffers[steps.buffers.index(name)].copy_(copies[name])


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().clone() for n, t in tensors.items()}
