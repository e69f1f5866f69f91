"""One tuned hyperparameter of an optimizer: values of all tensors, and their shifts.

A tuned hyperparameter has a *base* for every parameter tensor, taken from its parameter
group, and a shared *shift* in raw space that is tuned::

    value[segment] = bijection(raw(base[segment]) + shift[slot(segment)])

With the default scope, ``"run"``, there is one slot, so groups keep the ratio of their
learning rates (``Log``) while one factor moves them all. ``"group"`` and ``"tensor"`` give
every parameter group, or every tensor, a shift of its own. A segment is one parameter tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from selftune.hparams import Hparam
from selftune.monitor.axes import middle

SCOPES = ("run", "group", "tensor")


class Scoped:
    """One tuned hyperparameter across all parameter tensors.

    Attributes:
        hparam: Name, scale and bounds.
        base: Raw values at a shift of 0, one for each segment; NaN if the hyperparameter is off.
        slots: Index of the shift of each segment.
        from_zero: Whether every segment started at 0.
        asleep: Which segments stay at 0, as given, until ``wake``; one bool each.
        waiting: Whether ``wake`` has not been called yet.
        start: The last values set, one for each segment.
        given: The median of the initial values.
        bounds: Bounds of each shift, within which all of its segments are in bounds.
        origin: The extreme base of each slot: the lowest of a regularizer, otherwise the highest.
    """

    bounds: tuple[Tensor, Tensor]
    origin: Tensor

    def __init__(self, hparam: Hparam, scope: str) -> None:
        self.hparam = hparam
        self.scope = scope
        self.base = torch.empty(0, dtype=torch.float64, device="cpu")
        self.slots = torch.empty(0, dtype=torch.long, device="cpu")
        self.shift = torch.zeros(0, dtype=torch.float64, device="cpu")
        self.from_zero = False
        self.asleep = torch.empty(0, dtype=torch.bool, device="cpu")
        self.waiting = hparam.role not in ("rate", "decay")  # tuned without validation losses
        self.start: list[float] = []
        self.given = 0.0

    def lay_out(
        self,
        values: Sequence[float],
        groups: Sequence[int],
        known: Sequence[int | None] | None = None,
        siblings: Sequence[int | None] | None = None,
    ) -> None:
        """Set each segment's value and group; bases and shifts of known segments are kept.

        A value of exactly 0 stays 0 if others are not 0; if all are 0, tuning starts from
        ``hparam.from_zero`` after the first validation loss (``wake``).

        The values of the first layout are the start of the run. A segment added later keeps its
        ratio to them: its value is multiplied by the factor of its slot, or the geometric
        mean of all factors if the slot is new.

        Args:
            values: Given value of each segment; for one added to an existing group, the value of
                the group.
            groups: The parameter group of each segment.
            known: Previous index of each segment, None for a new one; by default all are new.
            siblings: Previous index of a segment of the same group, None for a new group.
        """
        start = torch.tensor(values, dtype=torch.float64, device="cpu")
        before = [None] * len(values) if known is None else known
        first = len(self.base) == 0
        if first:
            self.from_zero = not bool(start.any())
            self.given = middle(start.tolist())
        scopes = {"run": [0] * len(groups), "group": groups, "tensor": range(len(groups))}
        slots = list(scopes[self.scope])
        mean = 0.0 if first else float(self.shift[self.slots].mean())
        shift = torch.full((max(slots) + 1,), mean, dtype=torch.float64, device="cpu")
        for at, place in enumerate(before):
            if place is not None:
                shift[slots[at]] = self.shift[self.slots[place]]
        base = self._raw(start)
        if self.from_zero:
            small = self._raw(torch.full_like(start, self.hparam.from_zero))
            base = torch.where(start == 0, small, base)
        low, high = self.hparam.raw_ends
        for at, place in enumerate(before):
            sibling = None if siblings is None else siblings[at]
            if place is not None:
                base[at] = self.base[place]
            elif sibling is not None:
                if self.scope == "tensor":  # the present value, at a shift of its own
                    shift[at] = (base[at] - self.base[sibling]).nan_to_num(0.0)
                base[at] = self.base[sibling]
            elif not first:  # clamp the segment, not its shared shift
                slot = shift[slots[at]]
                base[at] = base[at].clamp(low - slot, high - slot)
        self.slots = torch.tensor(slots, dtype=torch.long, device="cpu")
        self.shift, self.base, self.start = shift, base, start.tolist()
        self.asleep = (start == 0) & base.isfinite() & self.waiting
        self._measure()
        if first:  # later values may lie outside the bounds, if they were written there
            self.clamp()

    def _raw(self, values: Tensor) -> Tensor:
        off = torch.full_like(values, math.nan)
        return torch.where(values == 0, off, self.hparam.bijection.inverse(values))

    def wake(self) -> bool:
        """Start tuning values given as 0; return whether values change."""
        if not self.waiting:
            return False
        changed, self.waiting = bool(self.asleep.any()), False
        self.asleep = torch.zeros_like(self.asleep)
        self._measure()
        return changed

    def rebase(self, segments: Sequence[int], value: float, shown: float) -> None:
        """Move segments from one value to another, set from outside."""
        index = torch.tensor(segments, device="cpu")
        new, old = self._raw(torch.tensor([value, shown], dtype=torch.float64, device="cpu"))
        moved = self.base[index] + (new - old)
        self.base[index] = torch.where(moved.isnan(), new - self.shift[self.slots[index]], moved)
        self.asleep[index] = False
        self._measure()

    def displace(self, change: float) -> None:
        """Change all raw values by changing their bases; the shifts do not change."""
        self.base = self.base + change
        self._measure()

    def resume(self, base: Tensor, shift: Tensor, asleep: Tensor, waiting: bool) -> None:
        self.base, self.shift = base.clone(), shift.clone()
        self.asleep, self.waiting = asleep.clone(), waiting
        self._measure()

    @property
    def shift(self) -> Tensor:
        """The tuned raw shifts, shape (number of slots,), float64; replaced, never modified."""
        return self._shift

    @shift.setter
    def shift(self, value: Tensor) -> None:
        self._shift = value
        self._values: Tensor | None = None

    def values(self) -> Tensor:
        """Constrained values, one for each segment; 0 if off."""
        if self._values is None:
            values = self.hparam.bijection.forward(self.base + self.shift[self.slots])
            self._values = values if self._off is None else torch.where(self._off, 0.0, values)
        return self._values

    def slopes(self) -> Tensor:
        """The derivative of each value w.r.t. its raw shift; 0 if off."""
        slopes = self.hparam.bijection.slope(self.values())
        return slopes if self._off is None else torch.where(self._off, 0.0, slopes)

    def gather(self, signal: Tensor) -> Tensor:
        """Sum per-segment derivatives into the shifts they share."""
        return torch.zeros_like(self.shift).index_add_(0, self.slots, signal)

    def _measure(self) -> None:
        """Find bounds and origins by extreme bases; hyperparameters that are off are ignored."""
        self._values = None
        on = ~self.base.isnan()
        off = ~on | self.asleep
        self._off = off if bool(off.any()) else None
        slots, base = self.slots[on], self.base[on]
        lowest = torch.full_like(self.shift, math.inf).scatter_reduce(0, slots, base, "amin")
        highest = torch.full_like(self.shift, -math.inf).scatter_reduce(0, slots, base, "amax")
        low, high = self.hparam.raw_ends
        self.bounds = low - lowest, high - highest
        extreme = lowest if self.hparam.role == "regularizer" else highest
        self.origin = extreme.nan_to_num(posinf=0.0, neginf=0.0)

    def clamp(self) -> None:
        low, high = self.bounds
        self.shift = self.shift.maximum(low).minimum(high.maximum(low))
