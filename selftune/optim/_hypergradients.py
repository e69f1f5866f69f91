"""What gradients tell hyperparameters, over all blocks and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selftune.optim._block import Block
from selftune.optim._ranks import Ranks
from selftune.optim._stepper import Grads
from selftune.settled import Changes, Settled
from selftune.tuning import Tuning
from selftune.update import Transition

SHORTEST = 1e-18  # a gradient that counts as 0: squares of less vanish in float32


@dataclass(kw_only=True)
class Hypergradients:
    """Hypergradients from the responses that blocks keep.

    Args:
        tuning: Says which hyperparameters share a shift.
        ranks: Join inner products.
        settled: Directions that penalties are not told of.
    """

    tuning: Tuning
    ranks: Ranks
    settled: Settled = field(default_factory=Settled)

    def note(
        self, blocks: Sequence[Block], grads: Grads, steps: Sequence[Transition], count: int
    ) -> None:
        """Take in how the training gradient has changed since the last observed step."""
        changes = self._changes(blocks)
        if changes:
            masks, names = [mask for _, mask in grads], blocks[0].smooth
            self.settled.note(changes, steps, masks, names, count, self.ranks.total)

    def along(self, blocks: Sequence[Block], grads: Sequence[Tensor]) -> Tensor:
        """Along gradients that do not judge penalties; of a length that may be summed.

        Returns:
            Shape (hyperparameters, 1) where shifts are shared, else (hyperparameters, tensors).
        """
        return self._joined([b.signal(g) for b, g in zip(blocks, grads, strict=True)])

    def outer(self, blocks: Sequence[Block], grads: Sequence[Tensor], gone: int) -> Tensor:
        """Along outer gradients; see ``along``.

        Args:
            blocks: What keeps the responses.
            grads: Of every block.
            gone: Steps since the last time.
        """
        changes = self._changes(blocks)
        if not changes:
            return self.along(blocks, grads)
        penalties = [b.penalties() for b in blocks]
        memories = gone * (1 - blocks[0].discount)
        left = self.settled.beside(grads, changes, penalties, memories, self.ranks.total)
        return self._joined([b.signal(*told) for b, *told in zip(blocks, grads, left, strict=True)])

    def _changes(self, blocks: Sequence[Block]) -> list[Changes]:
        """Of the training gradient of every block; none where no penalty asks for them."""
        kept = [b.changes for b in blocks if b.changes is not None]
        return kept if self.settled.slots else []

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum(0) if self.tuning.shared else torch.cat(parts, dim=1)

    @staticmethod
    def scaled(
        signal: Tensor, grads: Sequence[Tensor], joined: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Hypergradients of an outer gradient of length 1: its direction alone counts.

        The length shrinks by orders of magnitude as a run converges, and steps whose size follows
        the mean square of past hypergradients would all but end long before the run does.

        Args:
            signal: Along the gradient as it is.
            grads: The gradient.
            joined: Joins inner products over processes.
        """
        squares = [torch.linalg.vector_norm(g).double().square() for g in grads]
        length = joined(torch.stack(squares).sum()).sqrt()
        return joined(signal) / length.clamp_min(SHORTEST)
