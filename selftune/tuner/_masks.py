"""Copies masks that callbacks changed into the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from selftune.structure import gated
from selftune.tuner._objective import modes_kept
from selftune.tuner._scoring import Scorer
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps


@contextmanager
def masks_followed(
    steps: Steps, scorer: Scorer, snapshots: Snapshots, member: int
) -> Iterator[list[str]]:
    """Put the averaged weights into the model; copy changed masks to the run at the end.

    Args:
        steps: The steps, with the names of the buffers.
        scorer: Puts the weights into the model.
        snapshots: The snapshots of the run, whose masks change too.
        member: The member of a population.

    Yields:
        A list that afterwards contains the names of changed masks.

    Raises:
        ValueError: Masks of a population changed.
    """
    changed: list[str] = []
    masks = {f"{n}.mask" if n else "mask": m.mask for n, m in gated(steps.inner)}
    with scorer.shown(snapshots.run, member), modes_kept(scorer.model):
        before = _copies(masks)
        yield changed
        found = steps.group.from_first(lambda: _copies(masks)) if masks else {}
    changed += [n for n, t in found.items() if not torch.equal(t, before[n])]
    members = snapshots.run.step.numel()
    if changed and members > 1:
        raise ValueError(
            f"population={members}: a callback closed units of one member, but all "
            "members share masks; omit population="
        )
    run = snapshots.run
    held: list[Sequence[Tensor]] = [run.buffers, run.average_buffers, snapshots.buffers]
    with torch.no_grad():
        for name in changed:
            for buffers in held:
                buffers[steps.buffers.index(name)].copy_(found[name])


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().clone() for n, t in tensors.items()}
