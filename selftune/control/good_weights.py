"""Good weights: the averaged weights with the lowest validation loss so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class GoodWeights:
    """Judges averaged weights by windows of consecutive validation losses.

    The loss of the candidate, the averaged weights at the middle of a window, is estimated by a
    mean with triangular weights, since losses decrease or increase within a window. A driver
    without memory for a candidate stores the latest weights instead.

    Args:
        window: Number of losses in a window.
        candidates: Whether the driver stores candidates.

    Attributes:
        losses: The losses of the current window.
        lowest: The lowest mean so far.

    Examples:
        >>> good = GoodWeights(window=3)
        >>> [good.observe(loss) for loss in (3.0, 2.0, 1.0, 2.0, 3.0, 4.0)]
        ['ok', 'candidate', 'promote', 'ok', 'candidate', 'ok']
        >>> good.lowest
        2.0
    """

    window: int = 5
    candidates: bool = True
    losses: list[float] = field(default_factory=list)
    lowest: float = math.inf

    def hold(self, candidates: bool) -> None:
        """Set whether candidates are stored; a change restarts the window."""
        if candidates != self.candidates:
            self.candidates = candidates
            self.restart()

    def restart(self) -> None:
        """Discard the losses of the current window."""
        self.losses = []

    def observe(self, loss: float, bar: float = math.inf, *, rejected: bool = False) -> str:
        """Record a loss at the averaged weights.

        Args:
            loss: The validation loss.
            bar: Weights with a higher loss are never good.
            rejected: Whether the weights are not good even if the loss is low.

        Returns:
            ``"candidate"`` or ``"average"`` to store the averaged weights as the candidate or as
            the good weights, ``"promote"`` if the candidate is good, else ``"ok"``.
        """
        self.losses.append(loss)
        count, size = len(self.losses), self.window
        if count < size:
            return "candidate" if self.candidates and count == (size + 1) // 2 else "ok"
        losses = self.losses
        self.restart()
        shares = [min(i + 1, size - i) if self.candidates else 1 for i in range(size)]
        mean = sum(s * loss for s, loss in zip(shares, losses, strict=True)) / sum(shares)
        # Where losses rise, the latest weights are the worst of the window.
        rising = not self.candidates and losses[-1] == max(losses) > min(losses)
        if mean >= min(self.lowest, bar) or rejected or rising:
            return "ok"
        self.lowest = mean
        return "promote" if self.candidates else "average"
