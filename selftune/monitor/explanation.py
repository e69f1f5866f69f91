"""How a hyperparameter came to its value, from recorded facts: a line for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from selftune.monitor.verdicts import Verdict


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a run records of its hyperparameters beside their values.

    Attributes:
        given: Values at the start by name.
        swept: Values right after the learning-rate sweep, of those that it set.
        rewinds: For each rewind its step, the factor of the learning rate and the reason.
        annealed: The shape of the learning rate's schedule; ``"constant"``: there is none.
    """

    given: Mapping[str, float]
    swept: Mapping[str, float] = field(default_factory=dict)
    rewinds: Sequence[tuple[int, float, str]] = ()
    annealed: str = "constant"

    def explain(self, values: Mapping[str, float], verdicts: Mapping[str, Verdict]) -> str:
        """A line for each tuned hyperparameter.

        Args:
            values: Present values of the tuned ones, by name.
            verdicts: Judgements of those that have taken a step.

        Examples:
            >>> course = Course(given={"lr": 1e-3}, swept={"lr": 0.0057}, annealed="cosine")
            >>> print(course.explain({"lr": 0.02}, {}))
            lr: given 0.001 → sweep 0.0057 → 0.02 by hypergradients → annealed by a cosine schedule
        """
        return "\n".join(self._line(n, v, verdicts.get(n)) for n, v in values.items())

    def _line(self, name: str, value: float, verdict: Verdict | None) -> str:
        parts = [f"{name}: given {self.given[name]:.3g}"]
        last = self.given[name]
        if name in self.swept and not _same(self.swept[name], last):
            last = self.swept[name]
            parts.append(f"sweep {last:.3g}")
        for step, factor, reason in self.rewinds if name == "lr" else ():
            change = "as it was" if factor == 1 else f"divided by {1 / factor:.3g}"
            parts.append(f"{change} at step {step:,} ({reason})")
        if verdict is not None and verdict.floored:
            parts.append(f"{value:.3g}, its floor")
        elif not _same(value, last):
            snr = math.nan if verdict is None else verdict.snr
            known = f" (signal-to-noise {snr:.1f})" if math.isfinite(snr) else ""
            parts.append(f"{value:.3g} by hypergradients{known}")
        elif len(parts) == 1:
            parts.append("unchanged")
        if name == "lr" and self.annealed != "constant":
            parts.append(f"annealed by a {self.annealed} schedule")
        return " → ".join(parts)


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-3)
