"""The final weights of a run of known length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selftune.control.records import Saved

BACK = (-1.0, -0.75, -0.5, -0.25, 0.0)
"""Positions from the last good weights to the average at which slopes are taken."""
SURE = 1.5
"""A position there must be lower than the others by this multiple of the standard error."""
_REST = torch.tensor(
    [[4, 16, 8, 16, 4], [-1, 8, 9, 16, 4], [0, 0, 4, 16, 4], [0, 0, -1, 8, 5]],
    dtype=torch.float64,
    device="cpu",
).div(48)
# Simpson's rule: the integral of slopes from each of the first four positions to the last.


@dataclass(kw_only=True)
class FinalWeights(Saved):
    """The position of the final weights between last good weights, average and last iterate.

    The average lags behind the weights, which hurts while the loss still decreases and helps once
    they fit noise; if they have long fitted noise, the last good weights are best. The
    losses at these positions differ by less than the noise between batches, but the slopes
    between them are precise enough, and their integral gives the position of lowest loss.

    Attributes:
        position: −1 for the last good weights, 0 for the average, 1 for the last iterate.
        judged: Steps taken when the position was selected; 0 if it was not.

    Source: Simpson's rule; use for final weights: this library.
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
        """Whether this may be the last call before the end of the run.

        Args:
            steps: Steps taken.
            period: Steps since the last call, probably the same until the next.
            total: Steps in the run; None if unknown.
            every: Minimum number of steps between two selections.
        """
        near = total is not None and steps <= total <= steps + period
        return near and (self.judged == 0 or steps - self.judged >= every)

    def over(self, steps: int, total: int | None, every: int) -> bool:
        """Whether the position is selected and the run ends before the next hyperparameter step.

        That step could change the last good weights, to which the position refers.
        """
        return self.judged > 0 and total is not None and 0 <= total - steps < every

    def judge(self, steps: int, forth: Tensor, back: Tensor | None = None) -> None:
        """Select the position.

        Args:
            steps: Steps taken.
            forth: Slopes of the validation loss from the average to the last iterate, at both ends,
                shape (2, batches).
            back: Slopes from the last good weights to the average, at ``BACK``, shape (5, batches);
                None if there are no good weights.
        """
        start, end = forth.mean(1).tolist()
        self.judged, self.position = steps, parabola_minimum(start, end)
        if back is None:
            return
        fine = back.isfinite().all(1)
        if not bool(fine.all()):
            self.position = -1.0 if fine[0] and not fine[-1] else self.position
            return
        # Increase of the loss from each position to the one selected above.
        rises = _REST @ back.mean(1) + rise(start, end, self.position)
        error = (back.var(1).mean() / back.shape[1]).sqrt() * _REST.square().sum(1).sqrt()
        best = int(rises.argmax())
        if rises[best] > SURE * error[best]:
            self.position = BACK[best]

    def forget(self) -> None:
        """Reset the position to the average, when the run continues."""
        self.judged, self.position = 0, 0.0


def between(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Interpolate between two tensors; exact at both ends, even if the other contains NaN.

    Examples:
        >>> between(torch.zeros(1), torch.ones(1), 0.25)
        tensor([0.2500])
    """
    end = end.to(start)
    if share in (0, 1) or not start.is_floating_point():
        return (end if share else start).clone()
    return start.lerp(end, share)


def parabola_minimum(start: float, end: float) -> float:
    """Minimum in [0, 1] of a parabola with these slopes at 0 and 1, if it descends.

    0 if the parabola is not lower at 1 than at 0, because there is then little to gain.

    Examples:
        >>> parabola_minimum(-1.0, 0.5), parabola_minimum(-1.0, 1.0)
        (0.6666666666666666, 0.0)
    """
    if not (start < 0 and start + end < 0 and math.isfinite(start + end)):
        return 0.0
    return min(1.0, start / (start - end)) if end > start else 1.0


def rise(start: float, end: float, share: float) -> float:
    """Change of such a parabola from 0 to a position.

    Examples:
        >>> rise(-1.0, 1.0, 0.5)
        -0.25
    """
    return start * share + (end - start) * share**2 / 2 if share else 0.0
