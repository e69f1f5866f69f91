"""The last good weights of a run, and the way back to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selftune._trees import leaves
from selftune.bilevel import Run


class Good:
    """Copies of the averaged weights and buffers that are worth returning to.

    Args:
        run: The run, whose tensors may have a leading dimension of members.
        members: Whether they have.

    Attributes:
        rewound: Called after a return to the good weights.
    """

    def __init__(self, run: Run, members: bool) -> None:
        self.run = run
        self._members = members
        self.rewound: list[Callable[[], None]] = []
        self.weights = [w.average.clone() for w in run.weights]
        self.buffers = [b.clone() for b in run.average_buffers]
        self._held = [t.clone() for t in self._present()]

    def part(self, tensor: Tensor, member: int) -> Tensor:
        """A member's part of a tensor of the run."""
        return tensor[member] if self._members else tensor

    def _present(self) -> list[Tensor]:
        return [*(w.average for w in self.run.weights), *self.run.average_buffers]

    @torch.no_grad()
    def _copy(self, target: list[Tensor], source: list[Tensor], member: int) -> None:
        parts = [[self.part(t, member) for t in tensors] for tensors in (target, source)]
        torch._foreach_copy_(parts[0], parts[1])

    def hold(self, member: int = 0) -> None:
        """Remember the present average until it is known whether it is good."""
        self._copy(self._held, self._present(), member)

    def keep(self, member: int = 0, *, held: bool = False) -> None:
        """Remember the present average as good, or the one that is held."""
        source = self._held if held else self._present()
        self._copy([*self.weights, *self.buffers], source, member)

    @torch.no_grad()
    def rewind(self, member: int = 0) -> None:
        """Return to it, with tangents, rule state and Adam's moments as at a fresh start."""
        run = self.run
        for weight, good in zip(run.weights, self.weights, strict=True):
            for target in (weight.value, weight.average):
                self.part(target, member).copy_(self.part(good, member))
        for held in (run.buffers, run.average_buffers):
            for tensor, good in zip(held, self.buffers, strict=True):
                self.part(tensor, member).copy_(self.part(good, member))
        stale = [(w.rule, w.tangents, w.response, w.ahead) for w in [*run.weights, *run.shrinking]]
        for leaf in [*leaves(stale), *run.hyper[1:], run.age]:
            self.part(leaf, member).zero_()
        for way in run.way:
            for place in (way.centre, way.mark):
                for tensor, good in zip(place, self.weights, strict=True):
                    self.part(tensor, member).copy_(self.part(good, member))
            for leaf in (way.squares, way.stretches):
                self.part(leaf, member).zero_()
            self.part(way.since, member).copy_(self.part(run.step, member))
        for call in self.rewound:
            call()

    @torch.no_grad()
    def copy(self, source: int, target: int) -> None:
        """Let one member take over everything from another."""
        for leaf in [*leaves(self.run), *self.weights, *self.buffers, *self._held]:
            leaf[target].copy_(leaf[source])

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Continue from ``state_dict``."""
        for name, tensors in self.state_dict().items():
            for tensor, value in zip(tensors, state[name], strict=True):
                tensor.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """What is good, and what is held."""
        return {"weights": self.weights, "buffers": self.buffers, "held": self._held}
