"""One-line explanations of hyperparameter values, from the recorded run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from selftune.hparams import Hparam
from selftune.monitor.verdicts import Verdict


@dataclass(frozen=True, kw_only=True)
class Course:
    """The recorded events of a run that changed its hyperparameters.

    Attributes:
        given: Starting values by name.
        swept: Values set by the learning-rate sweep.
        rewinds: Step, factor of the learning rate and reason of each rewind.
        annealed: Shape of the learning rate's schedule; ``"constant"`` if there is none.
        hparams: The tuned hyperparameters, for values that start elsewhere than given: those given
            as 0 or outside their bounds.
    """

    given: Mapping[str, float]
    swept: Mapping[str, float] = field(default_factory=dict)
    rewinds: Sequence[tuple[int, float, str]] = ()
    annealed: str = "constant"
    hparams: Mapping[str, Hparam] = field(default_factory=dict)

    def explain(self, values: Mapping[str, float], verdicts: Mapping[str, Verdict]) -> str:
        """A line for each tuned hyperparameter.

        Args:
            values: Current values of tuned hyperparameters by name.
            verdicts: Verdicts on hyperparameters with at least one step.

        Examples:
            >>> course = Course(given={"lr": 1e-3}, swept={"lr": 0.0057}, annealed="cosine")
            >>> print(course.explain({"lr": 0.02}, {}))
            lr: given 0.001 → sweep 0.0057 → 0.02 by hypergradients → annealed by a cosine schedule
        """
        return "\n".join(self._line(n, v, verdicts.get(n)) for n, v in values.items())

    def _line(self, name: str, value: float, verdict: Verdict | None) -> str:
        parts = [f"{name}: given {self.given[name]:.3g}"]
        last = self.given[name]
        start = self.hparams[name].start(last) if name in self.hparams else last
        if not _same(start, last) and value != last and name not in self.swept:
            last = start
            parts.append(f"starts at {start:.3g}")
        if name in self.swept and not _same(self.swept[name], last):
            last = self.swept[name]
            parts.append(f"sweep {last:.3g}")
        for step, factor, reason in self.rewinds if name == "lr" else ():
            change = "unchanged" if factor == 1 else f"divided by {1 / factor:.3g}"
            parts.append(f"{change} at step {step:,} ({reason})")
        floored = verdict is not None and verdict.floored
        if verdict is not None and verdict.raised > last and not _same(verdict.raised, value):
            last = verdict.raised
            parts.append(f"{last:.3g}, its floor")
        if floored:
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
