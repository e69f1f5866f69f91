"""Which weights a run of known length ends with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class Ending:
    """Where a run ends: on the way from its averaged weights to the last, or at its good ones.

    The average lags behind the weights, which costs where these still descend and helps where
    they have gone on to fit noise. The losses of the two differ by less than those of batches
    do, but slopes along the way from one to the other do not, and a parabola through the slopes at
    its ends shows where it is lowest.

    Attributes:
        onward: The share of the way, 0 (the average) to 1 (the last weights).
        good: Whether the run ends at the good weights instead.
        judged: Steps taken when that was found; 0: not yet.
        gain: By how much the loss is lower on the way than at the average.
    """

    onward: float = 0.0
    gain: float = 0.0
    good: bool = False
    judged: int = 0

    def __str__(self) -> str:
        """Where, in words.

        Examples:
            >>> str(Ending()), str(Ending(onward=0.5))
            ('at its averaged weights', '50 % of the way to its last weights')
        """
        if self.good:
            return "at its good weights"
        if self.onward == 0:
            return "at its averaged weights"
        return f"{100 * self.onward:.0f} % of the way to its last weights"

    def due(self, steps: int, period: int, total: int | None, every: int) -> bool:
        """Whether there may be no other chance to judge.

        Args:
            steps: Taken so far.
            period: Since the last call, and so probably to the next.
            total: Steps in the run; None: not known.
            every: Steps after which a judgement is worth renewing.
        """
        near = total is not None and steps <= total <= steps + period
        return near and (self.judged == 0 or steps - self.judged >= every)

    def judge(self, steps: int, start: float, end: float) -> None:
        """Find where on the way the loss is lowest.

        Args:
            steps: Taken so far.
            start: Slope of the validation loss at the average, on the way to the last weights.
            end: At the last weights.
        """
        self.judged, self.onward, self.good = steps, lowest(start, end), False
        self.gain = -rise(start, end, self.onward)

    def weigh(self, now: float, then: float, error: float) -> None:
        """Take the good weights if they are better still.

        Args:
            now: Loss at the average.
            then: At the good weights.
            error: By how much it must be lower to be believed.
        """
        if math.isfinite(now) and math.isfinite(then):
            self.good = then < now - self.gain - error
        else:
            self.good = math.isfinite(then)

    def forget(self) -> None:
        """The run goes on, and shows its average."""
        self.judged, self.onward, self.gain, self.good = 0, 0.0, 0.0, False

    def state_dict(self) -> dict[str, Any]:
        """The numbers to save."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name, value in state.items():
            setattr(self, name, value)


def lowest(start: float, end: float) -> float:
    """Where between 0 and 1 a parabola with these slopes at 0 and 1 is lowest, going downhill.

    Examples:
        >>> lowest(-1.0, 1.0), lowest(-1.0, -0.5), lowest(0.1, -1.0)
        (0.5, 1.0, 0.0)
    """
    if not (start < 0 and math.isfinite(start + end)):
        return 0.0
    return min(1.0, start / (start - end)) if end > start else 1.0


def rise(start: float, end: float, share: float) -> float:
    """By how much such a parabola has risen at a share of the way.

    Examples:
        >>> rise(-1.0, 1.0, 0.5)
        -0.25
    """
    return start * share + (end - start) * share**2 / 2
