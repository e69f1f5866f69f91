"""The gradient noise scale of a tuner's run, which the size of its batches follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selftune.structure import Batches
from selftune.structure.noise_scale import squared_norm
from selftune.tuner._data import size
from selftune.tuner._group import Group
from selftune.tuner._passes import Passed
from selftune.tuner._run_state import RunState
from selftune.tuner._sharding import cut

EVERY = 8
"""Steps between two whose batch is divided."""
REMEDY = (
    "into the halves from which structure.Batches estimate the noise scale: pass a DataLoader "
    "with a batch_size instead of batch_sampler=Batches(…)"
)


@dataclass(kw_only=True)
class HalvedBatches:
    """Takes every eighth step on both halves of its batch, as with accumulated gradients.

    The step needs no further pass, and the halves' gradients determine the noise scale.

    Args:
        batches: The sampler to update.
        group: The ranks.
        total: Sums products over sharded weights.

    Attributes:
        due: Whether the next step is taken on halves.
    """

    batches: Batches
    group: Group
    total: Callable[[Tensor], Tensor]
    due: bool = False

    def prepare(self, step: int, batch: Any) -> bool:
        """Decide whether a step is taken on halves, which need two examples on every rank."""
        self.due = step % EVERY == 0 and min(self.group.gather(size(batch))) >= 4
        return self.due

    def gradient(
        self, passing: Callable[[RunState, Any], Passed], run: RunState, batch: Any
    ) -> Passed:
        """The pass over a batch in two halves; updates the noise scale.

        Args:
            passing: The pass over all ranks.
            run: The run.
            batch: This rank's part of the batch.
        """
        self.due = False
        first, second = halves(batch)
        one = passing(run, first)
        two = passing(run._replace(buffers=one[2]), second)
        mine = torch.tensor([size(first), size(second)])
        few, more = torch.stack(self.group.gather(mine)).sum(0).tolist()
        share = more / (few + more)
        grads = torch._foreach_lerp(one[1], two[1], share)
        squares = [self.total(squared_norm(g)) for g in (one[1], two[1], grads)]
        part = 2 * few * more / (few + more)  # harmonic mean, as the variance is inverse to sizes
        self.batches.scale.observe((squares[0] + squares[1]) / 2, squares[2], part, few + more)
        return torch.lerp(one[0], two[0], share), list(grads), two[2]


def halves(batch: Any) -> list[Any]:
    """The examples of a batch at even and at odd positions.

    Together, those of all ranks are the halves of the whole batch, if its parts have even lengths.

    Raises:
        ValueError: It cannot be divided.
    """
    parts = (slice(0, None, 2), slice(1, None, 2))
    return [cut(batch, lambda _: part, "train", REMEDY) for part in parts]  # noqa: B023 - at once
