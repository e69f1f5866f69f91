"""Whether units died after the learning rate had risen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class LiveUnits:
    """Compares the live units of each layer with those before; its state is plain numbers.

    Attributes:
        alive: Live units of each layer at the last count.
        most: Those of the largest count since the good weights, or the last count at a rate that
            has not risen. It includes the initial weights until later ones are good.
        spared: Live units of the good weights.
        initial: Whether the initial weights are the good ones, after a sweep.
        faded: Whether units are dead at a raised rate, or may still die.
        fading: Number of consecutive counts with dead units at a raised rate.
    """

    alive: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)
    spared: list[float] = field(default_factory=list)
    initial: bool = False
    faded: bool = False
    fading: int = 0

    def observe(
        self,
        alive: Sequence[float],
        *,
        raised: bool,
        capacity: float,
        bottleneck: float,
        early: bool,
    ) -> None:
        """Record a count.

        Args:
            alive: Number of live units of each layer; NaN if it is frozen or unused.
            raised: Whether the learning rate has risen.
            capacity: Share of all units below which too many are dead.
            bottleneck: The same for the harmonic mean over layers (:func:`left`).
            early: Whether units may still die after a sweep.
        """
        before = self.alive if len(self.alive) == len(alive) else alive
        # A layer that becomes frozen keeps its count: without it, the share of the others counts,
        # of which some may have died long before.
        alive = [a if math.isnan(n) else n for n, a in zip(alive, before, strict=True)]
        self.alive = alive
        # Units dead at the given rate, such as closed ones, were not killed by a raised one.
        same = raised and len(self.most) == len(alive)
        self.most = max(self.most, self.alive, key=total) if same else self.alive
        narrow = left(alive, self.most) < bottleneck
        known = [(a, b) for a, b in zip(alive, self.most, strict=True) if not math.isnan(a + b)]
        few = sum(a for a, _ in known) < capacity * sum(b for _, b in known)
        low = raised and (narrow or few)
        self.faded = low or (raised and self.initial and early)
        self.fading = self.fading + 1 if low else 0

    def begin(self, alive: Sequence[float]) -> None:
        """Use the live units of the initial weights as the reference."""
        self.most = self.spared = list(alive)
        self.initial = self.faded = True

    def spare(self) -> None:
        """Use the live units of the current weights, which become the good ones.

        The first time they are the reference as well: the best rate may need fewer live units than
        the initial weights have.
        """
        self.spared = self.alive
        if self.initial:
            self.most, self.initial = self.alive, False

    def rewind(self) -> None:
        """Return to the live units of the good weights."""
        self.most, self.faded, self.fading = self.spared, False, 0


def total(alive: Sequence[float]) -> float:
    """Live units of all layers that are used."""
    return sum(n for n in alive if not math.isnan(n))


def left(alive: Sequence[float], most: Sequence[float]) -> float:
    """Harmonic mean over layers of the share of live units.

    A network is as narrow as its narrowest layer, which a wide layer without dead units, such as
    the output, hides in the sum. Layers without any live unit do not count: they are closed, or
    unused like the head of another task.

    Args:
        alive: Number of live units of each layer.
        most: The same before.

    Examples:
        >>> left([50, 100], [100, 100]), left([50, 784], [100, 784]), left([0, 784], [100, 784])
        (0.6666666666666666, 0.6666666666666666, 1.0)
    """
    both = [(a, b) for a, b in zip(alive, most, strict=True) if a > 0 and b > 0]
    return len(both) / sum(max(b / a, 1.0) for a, b in both) if both else 1.0
