"""How far a run has come: whether a higher learning rate would lead further.

Moves that point at random lead away like a random walk, whose squared distance is the sum of the
moves' squares. Weights that have come further were led by the gradient, and longer steps would
lead them further still; weights that have come less far go to and fro, and longer steps would only
make more noise. The hypergradient of the learning rate does not see this: it is what the weights
moved, against the slope of the validation loss, and calls for higher rates as long as the average
descends at all, though it might descend faster at a lower one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selftune.hparams import MOMENTA
from selftune.update import Transition

LOST = 0.9
"""The ratio to a walk of single steps up to which a run is lost; from 1 on it is led."""
LED_ON = 1.4
"""The same of stretches, which are led each: √2, where the way on is as long as the way astray."""
STRETCH = 20
"""Steps in a stretch, at least: longer than what a momentum remembers."""


def _momentum(values: Mapping[str, Any]) -> Any:
    """Of a step, also one of another optimizer whose betas are not tuned."""
    found = [values[n] for n in MOMENTA if n in values]
    return found[0] if found else values.get("betas", (0.0,))[0]


class Travel:
    """How far weights are from the start, ‖w − w₀‖, against two random walks.

    One is that of the steps, ``√(Σ ‖Δw‖² (1 + μ)/(1 − μ))``, where the momentum μ counts because
    steps that remember gradients go further than their squares tell. The other is that of
    stretches of some twenty steps. Where few batches make an epoch, their noise cancels within it,
    which looks like going to and fro from step to step, but not from stretch to stretch.

    Attributes:
        steps: The sum under the root, from the steps that were observed.
        stretches: That of the squares of stretches.
        since: Steps taken at the end of the last stretch.

    Source: the distance over gradients of Ivgi et al. 2023 (DoG), under whose learning rate the
    first ratio is 1; as a limit, with momentum and with stretches, this library.
    """

    def __init__(self, since: int = 0) -> None:
        """Nothing yet."""
        self.steps: Any = 0.0
        self.stretches = 0.0
        self.since = since

    @staticmethod
    def squares(transitions: Sequence[Transition]) -> Tensor:
        """What a step of all blocks adds to the walk of steps."""
        found = []
        for transition in transitions:
            momentum = _momentum(transition.values)
            step = transition.moved - transition.params
            step *= ((1 + momentum) / (1 - momentum)) ** 0.5
            found.append(torch.linalg.vector_norm(step).double().square())
        return torch.stack(found).sum()

    def ratios(self, distance: float) -> tuple[float, float]:
        """To the walks of steps and of stretches; NaN before the first of them."""
        walks = float(self.steps), self.stretches
        steps, stretches = (distance / math.sqrt(w) if w > 0 else math.nan for w in walks)
        return steps, stretches

    def led(self, distance: float) -> float:
        """How far the gradient has led the weights to where they are: 0 (not at all) to 1.

        Examples:
            >>> travel = Travel()
            >>> travel.steps = travel.stretches = 4.0
            >>> travel.led(1.0), round(travel.led(1.9), 3), travel.led(2.0)
            (0.0, 0.5, 1.0)
        """
        steps, stretches = self.ratios(distance)
        if math.isnan(steps) or stretches >= LED_ON:
            return 1.0
        return min(1.0, max(0.0, (steps - LOST) / (1 - LOST)))

    def state_dict(self) -> dict[str, Any]:
        """The numbers to save."""
        return {"steps": float(self.steps), "stretches": self.stretches, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.steps, self.stretches = state["steps"], state["stretches"]
        self.since = state["since"]
