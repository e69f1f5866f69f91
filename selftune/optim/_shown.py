"""Other weights in place of the training weights, until these come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from selftune._flat import local
from selftune.optim._block import Block
from selftune.optim._buffers import Buffers
from selftune.optim._shards import whole


class Shown:
    """Puts other weights, and their statistics of normalisation layers, into the model.

    Args:
        blocks: Hold the weights.
        buffers: The statistics.
        place: -1 the last good weights, 0 the average, 1 those in place, or between two of them.
        live: Whether the statistics are the average's, in which passes leave their trace.
        exchanged: Whether the average is exchanged for the weights, so that nothing of their size
            is made; ``kept`` is empty then.

    Attributes:
        kept: The training weights, a tensor for each parameter of every block.
    """

    @torch.no_grad()
    def __init__(
        self,
        blocks: Sequence[Block],
        buffers: Buffers,
        place: float,
        *,
        live: bool = False,
        exchanged: bool = False,
    ) -> None:
        self._blocks, self._buffers = blocks, buffers
        self.kept: Sequence[Sequence[Tensor]] = []
        if exchanged:
            for block in self._blocks:
                block.exchange()
        else:
            self.kept = [b.copies() for b in self._blocks]
            for block, weights in zip(self._blocks, self.kept, strict=True):
                block.show(place, weights)
        self._statistics: list[Tensor] | None = None
        if not self._buffers.shown:
            self._statistics = self._buffers.average if live else self._buffers.at(place)
            self._buffers.exchange(self._statistics)
        self._versions = self._count()

    def _count(self) -> list[int]:
        return [local(p)._version for b in self._blocks for p in b.params]

    def saved(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter, and its training weights as they are saved."""
        for block, weights in zip(self._blocks, self.kept, strict=True):
            for param, value in zip(block.params, weights, strict=True):
                yield param, whole(param, value)

    @property
    def changed(self) -> bool:
        """Whether the weights in place were changed from outside."""
        return self._versions != self._count()

    @torch.no_grad()
    def back(self, *, keep: bool = False) -> None:
        """Put the training weights back, or keep what is in place now."""
        present = self._buffers.tensors() if keep else []
        present = [t.clone() for t in present]
        if self._statistics is not None:
            self._buffers.exchange(self._statistics)
        for tensor, value in zip(self._buffers.tensors(), present, strict=False):
            tensor.copy_(value)
        if keep:
            return
        if not self.kept:
            for block in self._blocks:
                block.exchange()
        for block, weights in zip(self._blocks, self.kept, strict=False):
            block.put(weights)
