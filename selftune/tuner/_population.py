"""Several runs in one graph; the worst members copy the best."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch.utils._pytree import tree_map

from selftune.method import HyperOptimizer
from selftune.tuner._run_state import RunState
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._watch import Watch

log = logging.getLogger("selftune")

SPREAD = math.log(10.0)
"""Log of the range of starting learning rates and penalties, relative to the given ones."""
KICK = math.log(1.5)
"""Log of the factor on a copy's learning rate."""
SHARE = 0.25
"""Share of the members replaced in an exchange."""


class Population:
    """Members, their starting values and their exchange.

    Source: Jaderberg et al. 2017 (population-based training), truncation selection.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)

    def stack(self, run: RunState, hyper: HyperOptimizer, spread: Mapping[str, float]) -> RunState:
        """M copies of a run with different starting hyperparameters; the first is unchanged."""
        stacked = tree_map(lambda t: torch.stack([t] * self.size), run)
        for name, reach in spread.items():
            if name in hyper.names:
                offsets = torch.linspace(
                    -reach, reach, self.size, dtype=torch.float64, device="cpu"
                )
                order = torch.randperm(self.size, generator=self._generator, device="cpu")
                offsets = offsets[order]
                middle = int(offsets.abs().argmin())
                offsets[middle], offsets[0] = offsets[0].clone(), 0.0
                frame, raw = hyper.frame(run.step.device), run.hyper.raw
                moved = [hyper.move(raw, name, float(o), frame)[hyper.slots[name]] for o in offsets]
                stacked.hyper.raw[:, hyper.slots[name]] = torch.stack(moved)
        return stacked

    @torch.no_grad()
    def exploit(self, snapshots: Snapshots, watch: Watch, hyper: HyperOptimizer) -> None:
        """Replace the worst members by copies of the best, with perturbed learning rates."""
        means = [c.standing for c in watch.controllers]
        order = sorted(range(self.size), key=means.__getitem__)
        best, worst = order[0], order[self.size - max(1, round(SHARE * self.size)) :]
        for member in worst:
            if member == best or not means[member] > means[best]:
                continue
            snapshots.copy_member(best, member)
            watch.copied(best, member)
            kick = KICK if torch.rand((), generator=self._generator, device="cpu") < 0.5 else -KICK
            raw = snapshots.run.hyper.raw[member]
            raw.copy_(hyper.move(raw, "lr", kick, hyper.frame(raw.device)))
            log.info("member %d copies member %d", member, best)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._generator.set_state(state["generator"])
