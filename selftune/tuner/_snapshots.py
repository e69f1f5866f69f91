"""Snapshots of a run's averaged weights, and the return to the last good ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from selftune._trees import copy_into, leaves
from selftune.method import Method
from selftune.method.snapshots import copy
from selftune.tuner._run_state import RunState


class Snapshots:
    """The last good weights and buffers, and the candidate of a small model.

    Attributes:
        weights: The last good ones.
        buffers: Their buffers.
        candidate: Weights and buffers that later losses will judge; empty if there are none.
        rewound: Called after a return to the good weights.
    """

    def __init__(
        self,
        run: RunState,
        method: Method,
        members: bool,
        where: str = "device",
        *,
        candidate: bool = False,
    ) -> None:
        self.run = run
        self._method, self._members = method, members
        self.rewound: list[Callable[[], None]] = []
        self.weights = [copy(t, where) for t in run.averages]
        self.buffers = [t.clone() for t in run.average_buffers]
        self.candidate = [t.clone() for t in self._good] if candidate else []

    def part(self, tensor: Tensor, member: int) -> Tensor:
        return tensor[member] if self._members else tensor

    def mine(self, member: int) -> RunState:
        return tree_map(lambda t: self.part(t, member), self.run) if self._members else self.run

    @property
    def _good(self) -> list[Tensor]:
        return [*self.weights, *self.buffers]

    def _present(self) -> list[Tensor]:
        return [*self.run.averages, *self.run.average_buffers]

    @torch.no_grad()
    def take(self, kind: str, member: int = 0) -> None:
        """Take a snapshot requested by a controller (:class:`~selftune.control.Action`)."""
        targets = self.candidate if kind == "candidate" else self._good
        sources = self.candidate if kind == "promote" else self._present()
        if kind == "iterate":  # in the sweep, where the average is free, and exact
            targets = [*self.run.averages, *self.buffers]
            sources[: len(self.weights)] = self.run.weights
        for target, source in zip(targets, sources, strict=True):
            self.part(target, member).copy_(self.part(source, member))

    @torch.no_grad()
    def rewind(
        self,
        moves: Mapping[str, float],
        member: int = 0,
        raw_before: Sequence[float] | None = None,
        *,
        swept: bool = False,
        diverged: bool = False,
    ) -> None:
        """Return to the good weights, restart, and change raw hyperparameters.

        ``raw_before``: raw hyperparameters to restore before the changes. ``swept``: return to the
        iterate that the sweep stored in the average; the initial weights then remain the good ones.
        """
        mine = self.mine(member)
        kept = [self.part(t, member) for t in self.weights]
        for weights, average, then in zip(mine.weights, mine.averages, kept, strict=True):
            weights.copy_(average if swept else then)
            average.copy_(weights)
        good = [self.part(t, member) for t in self.buffers]
        for buffers in (mine.buffers, mine.average_buffers):
            copy_into(buffers, good)
        state = self._method.rewind(mine.method, mine.averages, mine.step)
        hyper, frame = self._method.hyper, self._method.hyper.frame(mine.step.device)
        present = state.hyper
        if raw_before is not None:
            present = present._replace(raw=present.raw.new_tensor(raw_before))
        present = present.diverged() if diverged else present
        for name, change in moves.items():
            present = present._replace(raw=hyper.move(present.raw, name, change, frame))
        state = state._replace(hyper=present)
        copy_into(mine.method, state)
        mine.since.copy_(mine.step)
        mine.age.zero_()
        for call in self.rewound:
            call()

    @torch.no_grad()
    def copy_member(self, source: int, target: int) -> None:
        for leaf in [*leaves(self.run), *self._good, *self.candidate]:
            leaf[target].copy_(leaf[source])

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for name, tensors in self.state_dict().items():
            copy_into(tensors, state[name])

    def state_dict(self) -> dict[str, Any]:
        return {"good": self.weights, "buffers": self.buffers, "candidate": self.candidate}
