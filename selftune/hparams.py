"""Named, bounded hyperparameters and the raw values that gradient steps move.

A tuned hyperparameter has a *base* for every parameter tensor, taken from its parameter
group, and a shared *shift* in raw space that is what is tuned::

    value[segment] = bijection(raw(base[segment]) + shift[slot(segment)])

With the default scope, ``"run"``, there is one slot, so groups keep the ratio of their
learning rates (``Log``) while one factor moves them all. ``"group"`` and ``"tensor"`` give
every parameter group, or every tensor, a shift of its own. A segment is one parameter tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selftune.bijections import AbstractBijection, Identity, Log, Memory

SCOPES = ("run", "group", "tensor")
MOMENTA = ("momentum", "beta1")


@dataclass(frozen=True, kw_only=True)
class Hparam:
    """What is known of a hyperparameter before a run.

    Args:
        name: Its name in ``tune``, in logs and in saved states.
        bijection: Its scale.
        lower: Smallest value tuning may reach.
        upper: Largest value tuning may reach.
        from_zero: Where tuning starts if every group holds exactly 0, where its scale has no
            gradient.
        option: The parameter group's key, where that is not ``name``.
        index: The position within that option, where it is a tuple (``betas``).
    """

    name: str
    bijection: AbstractBijection
    lower: float
    upper: float
    from_zero: float
    option: str = ""
    index: int | None = None

    def read(self, group: dict[str, Any]) -> float:
        """The value in a parameter group."""
        value = group[self.option or self.name]
        return float(value if self.index is None else value[self.index])

    def write(self, group: dict[str, Any], value: float) -> None:
        """Set the value in a parameter group, keeping a tensor a tensor."""
        key = self.option or self.name
        if self.index is not None:
            group[key] = tuple(value if i == self.index else v for i, v in enumerate(group[key]))
        elif isinstance(group[key], Tensor):
            group[key].fill_(value)
        else:
            group[key] = value

    def bounded(self, lower: float, upper: float) -> Hparam:
        """The same hyperparameter within other bounds."""
        if not lower < upper:
            raise ValueError(f"bounds[{self.name!r}]=({lower}, {upper}): lower must be below upper")
        ends = self.bijection.inverse(torch.tensor([lower, upper], dtype=torch.float64))
        negative = lower < 0 and not isinstance(self.bijection, Identity)
        if negative or not bool(torch.isfinite(ends).all()):
            raise ValueError(
                f"bounds[{self.name!r}]=({lower}, {upper}) do not fit its scale, "
                f"{type(self.bijection).__name__}: both must be {self.bijection.domain}"
            )
        return replace(self, lower=lower, upper=upper)


LR = Hparam(name="lr", bijection=Log(), lower=1e-8, upper=1e2, from_zero=1e-3)
DECAY = Hparam(name="decay", bijection=Log(), lower=1e-8, upper=1.0, from_zero=1e-5)
WEIGHT_DECAY = Hparam(name="weight_decay", bijection=Log(), lower=1e-9, upper=1e2, from_zero=1e-5)
MOMENTUM = Hparam(name="momentum", bijection=Memory(), lower=1e-3, upper=1 - 1e-4, from_zero=0.1)


def penalty_hparam(name: str) -> Hparam:
    """The strength λ of the penalty of that name."""
    return Hparam(name=name, bijection=Log(), lower=1e-10, upper=1e2, from_zero=1e-6)


class Tuned:
    """One tuned hyperparameter across all parameter tensors.

    Attributes:
        hparam: Name, scale and bounds.
        base: Raw values shifted from, one a segment; NaN where the hyperparameter is off.
        slots: Which shift belongs to each segment.
        from_zero: Whether every segment started at 0.
        start: The values last taken, one a segment.
    """

    def __init__(self, hparam: Hparam, scope: str) -> None:
        """Start with no segments; ``layout`` sets them."""
        self.hparam = hparam
        self.scope = scope
        self.base = torch.empty(0, dtype=torch.float64)
        self.slots = torch.empty(0, dtype=torch.long)
        self.shift = torch.zeros(0, dtype=torch.float64)
        self.from_zero = False
        self.start: list[float] = []
        self._find_ends()

    def lay_out(
        self,
        values: Sequence[float],
        groups: Sequence[int],
        known: Sequence[int | None] | None = None,
    ) -> None:
        """Take each segment's value and group; shifts already tuned are kept.

        A value of exactly 0 stays 0 beside others that are not; if all are 0, tuning starts
        from ``hparam.from_zero``.

        Args:
            values: The present value of each segment.
            groups: The parameter group of each segment.
            known: Where each segment stood before, None for a new one; by default all are new.
        """
        start = torch.tensor(values, dtype=torch.float64)
        if len(self.base) == 0:
            self.from_zero = not bool(start.any())
        slots = {"run": [0] * len(groups), "group": groups, "tensor": range(len(groups))}
        self.slots = torch.tensor(list(slots[self.scope]), dtype=torch.long)
        count = int(self.slots.max()) + 1
        if count > len(self.shift):
            grown = torch.zeros(count, dtype=torch.float64)
            grown[: len(self.shift)] = self.shift
            self.shift = grown
        if self.scope == "tensor" and known is not None:
            shift = torch.zeros(count, dtype=torch.float64)
            for at, before in enumerate(known):
                if before is not None:
                    shift[at] = self.shift[before]
            self.shift = shift
        base = self._raw(start) - self.shift[self.slots]
        if self.from_zero:
            small = self._raw(torch.full_like(start, self.hparam.from_zero))
            base = torch.where(start == 0, small, base)
        for at, before in enumerate(known or []):
            if before is not None:
                base[at] = self.base[before]
        self.base, self.start = base, start.tolist()
        self._measure()
        self.clamp()

    def _raw(self, values: Tensor) -> Tensor:
        off = torch.full_like(values, math.nan)
        return torch.where(values == 0, off, self.hparam.bijection.inverse(values))

    def rebase(self, segments: Sequence[int], value: float, shown: float) -> None:
        """Move segments that showed one value to another, which was set from outside."""
        index = torch.tensor(segments)
        new, old = self._raw(torch.tensor([value, shown], dtype=torch.float64))
        moved = self.base[index] + (new - old)
        self.base[index] = torch.where(moved.isnan(), new - self.shift[self.slots[index]], moved)
        self._measure()

    def resume(self, base: Tensor, lower: float, shift: Tensor) -> None:
        """Continue from saved values."""
        self.base, self.shift = base.clone(), shift.clone()
        self.limit(lower)
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
        """Constrained values, one a segment; 0 where it is off."""
        if self._values is None:
            raw = self.base + self.shift[self.slots]
            self._values = self.hparam.bijection.forward(raw).nan_to_num(0.0)
        return self._values

    def slopes(self) -> Tensor:
        """The derivative of each value in its raw shift; 0 where it is off."""
        values = self.values()
        return torch.where(self.base.isnan(), 0.0, self.hparam.bijection.slope(values))

    def gather(self, signal: Tensor) -> Tensor:
        """Sum per-segment derivatives into the shifts they share."""
        return torch.zeros_like(self.shift).index_add_(0, self.slots, signal)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """How far each shift may go before one of its segments leaves the bounds."""
        return self._raw_ends[0] - self._lowest, self._raw_ends[1] - self._highest

    def limit(self, lower: float) -> None:
        """Set another lower bound."""
        self.hparam = replace(self.hparam, lower=lower)
        self._find_ends()

    def _find_ends(self) -> None:
        ends = torch.tensor([self.hparam.lower, self.hparam.upper], dtype=torch.float64)
        low, high = self.hparam.bijection.inverse(ends).tolist()
        self._raw_ends = (low, high)

    def _measure(self) -> None:
        """Find the outermost bases of each slot, where those that are off do not count."""
        self._values = None
        lowest, highest = (
            torch.full_like(self.shift, math.inf),
            torch.full_like(self.shift, -math.inf),
        )
        on = ~self.base.isnan()
        self._lowest = lowest.scatter_reduce(0, self.slots[on], self.base[on], "amin")
        self._highest = highest.scatter_reduce(0, self.slots[on], self.base[on], "amax")

    def clamp(self) -> None:
        """Bring the shifts back within the bounds."""
        low, high = self.bounds()
        self.shift = self.shift.maximum(low).minimum(high.maximum(low))
