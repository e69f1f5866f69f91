"""The gradient noise scale of a tuner's run, which the size of its batches follows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from selftune.structure import Batches
from selftune.structure.noise_scale import squared_norm
from selftune.tuner._group import Group, RankLost
from selftune.tuner._passes import Passed
from selftune.tuner._rank_batches import cut
from selftune.tuner._run_state import RunState

EVERY = 8
"""Steps between two whose batch is divided."""
FEWEST = 4
"""Examples on a rank in the smallest batch that is divided."""
REMEDY = (
    "into the halves from which structure.Batches estimate the noise scale: pass a DataLoader "
    "with a batch_size instead of batch_sampler=Batches(…)"
)


@dataclass(kw_only=True)
class HalvedBatches:
    """Takes every eighth step on both halves of its batch, as with accumulated gradients.

    The step needs no further pass, and the halves' gradients determine the noise scale.

    Attributes:
        due: Whether the next step is taken on halves.
        examples: Examples in its batch, over all ranks.
    """

    batches: Batches
    group: Group
    due: bool = False
    examples: int = 0

    def __post_init__(self) -> None:
        """Check that the smallest batches can be divided."""
        fewest = FEWEST * self.group.size
        if self.batches.least < fewest:
            where = f" on {self.group.size} ranks" if self.group.size > 1 else ""
            raise ValueError(
                f"train: batches of structure.Batches may have least={self.batches.least} "
                f"examples, but halves of at least two{where} need {fewest}: pass "
                f"start={fewest}, and least={fewest} or none"
            )

    def prepare(self, step: int, examples: int) -> bool:
        """Decide whether a step is taken on halves."""
        self.examples = examples
        self.due = step % EVERY == 0 and examples >= FEWEST * self.group.size
        return self.due

    def gradient(
        self, passing: Callable[[RunState, Any], Passed], run: RunState, batch: Any
    ) -> Passed:
        """The pass over a batch in two halves; updates the noise scale."""
        self.due, before = False, self.group.state_dict()
        first, second = halves(batch)
        try:
            one = passing(run, first)
            two = passing(run._replace(buffers=one[2]), second)
        except RankLost:  # the whole step is repeated, with the same random numbers
            self.group.load_state_dict(before)
            raise
        ends = [self.examples * rank // self.group.size for rank in range(self.group.size + 1)]
        odd = sum((end - start) // 2 for start, end in itertools.pairwise(ends))
        even, share = self.examples - odd, odd / self.examples
        grads = torch._foreach_lerp(one[1], two[1], share)
        squares = [self.group.total(squared_norm(g)) for g in (one[1], two[1], grads)]
        part = 2 * even * odd / self.examples  # harmonic mean, as variances are inverse to sizes
        self.batches.scale.observe((squares[0] + squares[1]) / 2, squares[2], part, self.examples)
        return torch.lerp(one[0], two[0], share), list(grads), two[2]


def halves(batch: Any) -> list[Any]:
    """The examples of a batch at even and at odd positions.

    Together, those of all ranks are the halves of the whole batch, if its parts have even lengths.
    """
    return [
        cut(batch, lambda _: slice(0, None, 2), "train", REMEDY),
        cut(batch, lambda _: slice(1, None, 2), "train", REMEDY),
    ]
