"""How far a run gets: whether a higher learning rate would lead further.

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
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOST, LED = 1.0, 1.5
"""The squared ratio to a walk up to which weights go to and fro, and from which they are led."""
STRETCH = 20
"""Steps in a stretch, at least: longer than what a momentum remembers."""
BEGINNING = 10
"""Parts of a run, in the first of which too little is known, and the rate may climb anywhere."""


@dataclass(kw_only=True)
class Travel:
    """How far weights are from their past, against a random walk.

    The ratio is ``S = ‖w − c‖ / √(Σ aⱼ² ‖Δⱼ‖²)`` with ``aⱼ = j (j + 1) / (k (k + 1))``. The moves
    Δ₁ … Δₖ are stretches of some twenty steps, and c is the mean of where they began, the j-th in
    proportion to j, so that ``w − c = Σ aⱼ Δⱼ``. The distance from the start would tell of how a
    run began long after that is over; here a move counts the less the longer ago it was. Where few
    batches make an epoch, their noise cancels within it, which looks like going to and fro from
    step to step, but not from stretch to stretch.

    Args:
        squares: The sum under the root.
        since: Steps taken at the end of the last stretch.
        stretches: k.

    Source: the distance over gradients of Ivgi et al. 2023 (DoG), by whose rule such a ratio, of
    steps and from the start, is 1; as a limit, and of stretches, this library.
    """

    squares: float = 0.0
    since: int = 0
    stretches: int = 0

    def ended(self, step: int) -> bool:
        """Whether a stretch has come to its end."""
        return step - self.since >= STRETCH

    def add(self, square: float, step: int) -> float:
        """A stretch that ends at a step, by the square of its length.

        Returns:
            The weight 2/(k + 1) of where it began in the mean c.
        """
        self.stretches += 1
        share = _share(self.stretches)
        self.squares = self.squares * (1 - share) ** 2 + square
        self.since = step
        return share

    def ratio(self, distance: float) -> float:
        """S at a distance from c; NaN before the end of the first stretch."""
        return distance / math.sqrt(self.squares) if self.squares > 0 else math.nan

    def led(self, distance: float) -> float:
        """How far the gradient has led the weights to where they are: 0 (not at all) to 1.

        Examples:
            >>> travel = Travel(squares=1.0)
            >>> travel.led(1.0), round(travel.led(1.25**0.5), 3), travel.led(2.0)
            (0.0, 0.5, 1.0)
        """
        ratio = self.ratio(distance)
        if math.isnan(ratio):
            return 1.0
        return min(1.0, max(0.0, _between(ratio**2)))

    def state_dict(self) -> dict[str, Any]:
        """The numbers to save."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name, value in state.items():
            setattr(self, name, value)


class Way(NamedTuple):
    """What :class:`Travel` knows of a run, as tensors that the steps of a graph take along.

    Attributes:
        centre: The mean of where stretches began, later ones more.
        mark: Weights at the end of the last stretch.
        squares: The weighted sum of the squares of stretches, shape (1,), float64.
        since: Steps taken at the end of the last stretch, shape (1,).
        stretches: How many there were, shape (1,).
    """

    centre: list[Tensor]
    mark: list[Tensor]
    squares: Tensor
    since: Tensor
    stretches: Tensor

    @classmethod
    def begun(cls, weights: Sequence[Tensor], step: Tensor) -> Way:
        """Nothing yet."""
        centre, mark = ([w.clone() for w in weights] for _ in range(2))
        squares, stretches = torch.zeros_like(step, dtype=torch.float64), torch.zeros_like(step)
        return cls(centre, mark, squares, step.clone(), stretches)

    def square(self, weights: Sequence[Tensor]) -> Tensor:
        """S² at weights, shape (1,); not a number before the end of the first stretch."""
        return _square_distance(weights, self.centre) / self.squares

    def onward(self, weights: Sequence[Tensor], step: Tensor) -> tuple[Way, Tensor]:
        """The way up to weights, and how far the gradient has led them (0 to 1, shape (1,))."""
        ended = step - self.since >= STRETCH
        stretches = self.stretches + ended
        share = torch.where(ended, _share(stretches), 0.0)
        more = torch.where(ended, _square_distance(weights, self.mark), 0.0)
        past, marks = (zip(p, self.mark, strict=True) for p in (self.centre, weights))
        way = self._replace(
            centre=[torch.lerp(c, then, share.squeeze(0).to(c.dtype)) for c, then in past],
            mark=[torch.where(ended.squeeze(0), now, then) for now, then in marks],
            squares=self.squares * (1 - share) ** 2 + more,
            since=torch.where(ended, step, self.since),
            stretches=stretches,
        )
        led = _between(way.square(weights))
        return way, led.nan_to_num(nan=1.0).clamp(0.0, 1.0)


def _share(stretches: Any) -> Any:
    """The weight of where the last one began, in the mean where each counts by its number."""
    return 2 / (stretches + 1)


def _between(square: Any) -> Any:
    """Where S² is: 0 at ``LOST``, 1 at ``LED``."""
    return (square - LOST) / (LED - LOST)


def _square_distance(here: Sequence[Tensor], there: Sequence[Tensor]) -> Tensor:
    wide = [torch.promote_types(a.dtype, torch.float32) for a in here]
    parts = zip(here, there, wide, strict=True)
    norms = [torch.linalg.vector_norm(a - b, dtype=dtype) for a, b, dtype in parts]
    return torch.stack([n.double().square() for n in norms]).sum()
