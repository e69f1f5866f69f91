"""Several runs in one graph, of which the worst start again from the best."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping

import torch
from torch.utils._pytree import tree_map

from selftune.bilevel import Run
from selftune.guard import Guard
from selftune.hypervector import HyperVector
from selftune.tuner._good import Good

log = logging.getLogger("selftune")

SPREAD = math.log(10.0)
"""Starting learning rates lie within a factor of 10 of the given one, λ too."""
KICK = math.log(1.5)
"""How far a copy's learning rate is moved away from its model's."""
SHARE = 0.25
"""Which share of the members is replaced at a time."""


class Population:
    """Members, their starting values and their exchange.

    Source: Jaderberg et al. 2017 (population-based training), truncation selection.

    Args:
        size: M.
        seed: Of starting values and kicks, a stream of its own.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"population={size} must be at least 1")
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)

    def stack(self, run: Run, hyper: HyperVector, spread: Mapping[str, float]) -> Run:
        """M copies of a run with different starting hyperparameters; the first keeps the given."""
        stacked = tree_map(lambda t: torch.stack([t] * self.size), run)
        for name, reach in spread.items():
            if name in hyper.names:
                offsets = torch.linspace(-reach, reach, self.size, dtype=torch.float64)
                order = torch.randperm(self.size, generator=self._generator)
                offsets = offsets[order]
                offsets[0] = 0.0
                moved = [
                    hyper.move(run.hyper, name, float(o)).raw[hyper.names.index(name)]
                    for o in offsets
                ]
                stacked.hyper.raw[:, hyper.names.index(name)] = torch.stack(moved)
        return stacked

    @torch.no_grad()
    def exploit(self, good: Good, guards: list[Guard], hyper: HyperVector) -> None:
        """Replace the worst members by copies of the best: weights, tangents, hyperparameters."""
        means = [g.mean if math.isfinite(g.mean) else math.inf for g in guards]
        order = sorted(range(self.size), key=means.__getitem__)
        best, worst = order[0], order[self.size - max(1, round(SHARE * self.size)) :]
        for member in worst:
            if member == best or not means[member] > means[best]:
                continue
            good.copy(best, member)
            guards[member] = copy.deepcopy(guards[best])
            kick = KICK if torch.rand((), generator=self._generator) < 0.5 else -KICK
            raw = good.run.hyper.raw[member]
            raw.copy_(hyper.move(good.run.hyper._replace(raw=raw), "lr", kick).raw)
            log.info("member %d goes on from member %d", member, best)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The stream of random numbers."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from ``state_dict``."""
        self._generator.set_state(state["generator"])
