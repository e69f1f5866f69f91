"""Other weights in place of the training weights, until these are restored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selftune._flat import local
from selftune._gathered import reshard
from selftune.optim._block import Block
from selftune.optim._buffers import Buffers
from selftune.optim._shards import whole


class _Watched:
    """Detects changes of parameters by torch's version counters, which copies do not have."""

    _params: list[Tensor]
    _versions: list[int] | None

    def _watch(self) -> None:
        self._versions = [p._version for p in self._params]

    @property
    def changed(self) -> bool:
        """Whether the parameters were changed from outside; in a copy, after the first look."""
        if self._versions is None:
            self._watch()
        return self._versions != [p._version for p in self._params]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_versions": [] if self.changed else None}


class Shown(_Watched):
    """Puts other weights, with their statistics of normalisation layers, into the model.

    Args:
        place: -1 for the last good weights, 0 for the average, 1 for the current weights, or a
            position between two of these.
        live: Whether the statistics are those of the average, updated by passes.
        exchanged: Whether average and weights are exchanged in place, without a copy; ``kept`` is
            then empty.

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
        torch.clear_autocast_cache()  # else an enclosing autocast would use casts of other weights
        self._blocks, self._buffers = blocks, buffers
        self.kept: Sequence[Sequence[Tensor]] = []
        if exchanged:
            for block in self._blocks:
                block.exchange()
        else:
            self.kept = [b.copies() for b in self._blocks]
            for block, weights in zip(self._blocks, self.kept, strict=True):
                block.show(place, weights)
        reshard()
        self._statistics: list[Tensor] | None = None
        if not self._buffers.shown:
            self._statistics = self._buffers.average if live else self._buffers.at(place)
            self._buffers.exchange(self._statistics)
        # Changes are detected for copies only: hyperparameter steps exchange weights in place.
        self._params = [local(p) for b in self._blocks for p in b.params] if self.kept else []
        self._watch()

    def saved(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self._blocks, self.kept, strict=True)
        both = [b for block, kept in pairs for b in zip(block.params, kept, strict=True)]
        return [(param, whole(param, value)) for param, value in both]

    @torch.no_grad()
    def back(self, *, keep: bool = False) -> None:
        """Restore the training weights, or keep the current ones."""
        torch.clear_autocast_cache()
        present = [t.clone() for t in self._buffers.tensors() if keep]
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
        reshard()


class Restored(_Watched):
    """Training weights of a loaded state, restored at once and again when training continues.

    The model's state, with averaged weights, may be loaded before or after the optimizer's.
    """

    def __init__(
        self, params: Sequence[Tensor], weights: Sequence[Tensor], buffers: Buffers
    ) -> None:
        self._pairs = list(zip(params, weights, strict=True))
        self._params, self._weights = [local(p) for p in params], [local(w) for w in weights]
        self._buffers, self.statistics = buffers, [t.clone() for t in buffers.tensors()]
        self.put()

    def saved(self) -> list[tuple[Tensor, Tensor]]:
        return self._pairs

    @torch.no_grad()
    def put(self) -> None:
        torch._foreach_copy_(self._params, self._weights)
        reshard()
        for tensor, value in zip(self._buffers.tensors(), self.statistics, strict=False):
            tensor.copy_(value)
        self._watch()
