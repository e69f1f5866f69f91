"""The final weights of a run of known length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BACK = (-1.0, -0.75, -0.5, -0.25, 0.0)
"""Positions from the last good weights to the average at which slopes are taken."""
_REST = torch.tensor(
    [[4, 16, 8, 16, 4], [-1, 8, 9, 16, 4], [0, 0, 4, 16, 4], [0, 0, -1, 8, 5]],
    dtype=torch.float64,
).div(48)
# Simpson's rule: the integral of slopes from each of the first four positions to the last.


@dataclass(kw_only=True)
class FinalWeights:
    """The position of the final weights between the last good ones, the average and the last.

    The average lags behind the weights, which costs where these still descend and helps where
    they have gone on to fit noise; where they have done so for long, the good weights are
    better. The losses of these positions differ by less than those of batches do; the slopes from
    one position to the next do not, and their integral shows where the loss is lowest.

    Attributes:
        position: −1 the last good weights, 0 the average, 1 the last weights.
        judged: Steps taken when it was found; 0: not yet.

    Source: Simpson's rule; for the end of a run, this library.
    """

    position: float = 0.0
    judged: int = 0

    def __str__(self) -> str:
        """The position in words.

        Examples:
            >>> print(FinalWeights()); print(FinalWeights(position=-0.25))
            the running average
            25 % of the way from the running average to the last good weights
        """
        if self.position == 0:
            return "the running average"
        end = "the last good weights" if self.position < 0 else "the last iterate"
        return f"{100 * abs(self.position):.0f} % of the way from the running average to {end}"

    def due(self, steps: int, period: int, total: int | None, every: int) -> bool:
        """Whether this may be the last call before the run is over.

        Args:
            steps: Taken so far.
            period: Since the last call, and so probably to the next.
            total: Steps in the run; None: not known.
            every: Steps after which a judgement is worth renewing.
        """
        near = total is not None and steps <= total <= steps + period
        return near and (self.judged == 0 or steps - self.judged >= every)

    def over(self, steps: int, total: int | None, every: int) -> bool:
        """Whether it is judged and the run is over before another hyperparameter step matters.

        That step might also promote other weights, which the position counts from.
        """
        return self.judged > 0 and total is not None and 0 <= total - steps < every

    def judge(self, steps: int, forth: Tensor, back: Tensor | None = None) -> None:
        """Find the position.

        Args:
            steps: Taken so far.
            forth: Slopes of the validation loss on the way from the average to the last weights,
                at both, shape (2, batches).
            back: Slopes on the way from the good weights to the average, at ``BACK``, shape
                (5, batches); None: there are no good weights.
        """
        start, end = forth.mean(1).tolist()
        self.judged, self.position = steps, parabola_minimum(start, end)
        if back is None:
            return
        fine = back.isfinite().all(1)
        if not bool(fine.all()):
            self.position = -1.0 if fine[0] and not fine[-1] else self.position
            return
        # How far the loss rises from each position to where the run would end otherwise.
        rises = _REST @ back.mean(1) + rise(start, end, self.position)
        error = (back.var(1).mean() / back.shape[1]).sqrt() * _REST.square().sum(1).sqrt()
        best = int(rises.argmax())
        if rises[best] > error[best]:
            self.position = BACK[best]

    def forget(self) -> None:
        """The run goes on, and ends at its average."""
        self.judged, self.position = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The numbers to save."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name, value in state.items():
            setattr(self, name, value)


def between(start: Tensor, end: Tensor, share: float) -> Tensor:
    """A copy between two tensors; exact at both ends, also where the other holds NaN.

    Examples:
        >>> between(torch.zeros(1), torch.ones(1), 0.25)
        tensor([0.2500])
    """
    end = end.to(start.dtype)
    if share in (0, 1) or not start.is_floating_point():
        return (end if share else start).clone()
    return start.lerp(end, share)


def parabola_minimum(start: float, end: float) -> float:
    """Where between 0 and 1 a parabola with these slopes at 0 and 1 is lowest, going downhill.

    0 if it ends as high as it began or higher: a loss that turns so soon is no parabola, and there
    is little to gain.

    Examples:
        >>> parabola_minimum(-1.0, 0.5), parabola_minimum(-1.0, 1.0)
        (0.6666666666666666, 0.0)
    """
    if not (start < 0 and start + end < 0 and math.isfinite(start + end)):
        return 0.0
    return min(1.0, start / (start - end)) if end > start else 1.0


def rise(start: float, end: float, share: float) -> float:
    """By how much such a parabola has risen at a share of the way.

    Examples:
        >>> rise(-1.0, 1.0, 0.5)
        -0.25
    """
    return start * share + (end - start) * share**2 / 2 if share else 0.0
