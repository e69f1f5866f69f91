"""Per-parameter options, for rules that do not treat all parameters alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selftune.method import Moment, Part, Sensitivities
from selftune.method.slices import Slice
from selftune.rules._base import ParameterOptions


@dataclass(frozen=True)
class PerParameter:
    """The options of all trained parameters, in their order.

    Attributes:
        all: One entry for each parameter; empty if all have the same options.
    """

    all: Sequence[ParameterOptions] = ()

    def begin(
        self, rows: Sensitivities, weights: Iterable[tuple[Slice, Tensor]], start: Mapping[str, Any]
    ) -> list[Part]:
        """The parts of a run at its start."""
        cuts = list(weights)
        own = self.all or [ParameterOptions({})] * len(cuts)
        pairs = zip(cuts, own, strict=True)
        return [rows.begin(w, {**start, **o.options}, cut) for (cut, w), o in pairs]

    def moments(self, moments: list[Moment]) -> list[Moment]:
        """The moments of all parts, with per-parameter values and rates."""
        if not self.all:
            return moments
        return [
            m._replace(
                values={**m.values, **o.options}, clock=m.clock._replace(rate=m.clock.rate * o.rate)
            )
            for m, o in zip(moments, self.all, strict=True)
        ]
