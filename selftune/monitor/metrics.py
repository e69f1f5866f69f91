"""The metrics of a run: hyperparameters, their uncertainty, and the cost of tuning."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selftune.bijections import AbstractBijection
from selftune.hparams import Hparam
from selftune.monitor._monitor import Monitor, hyper_rows, named
from selftune.monitor.agreement import Agreement
from selftune.monitor.axes import LOG10, drawn, logarithmic, marks, middle
from selftune.monitor.verdicts import Ends, Verdict, judge

SCATTER = 20
"""Number of recent values whose standard deviation is the margin of a hyperparameter."""
RECENT = 0.9
"""Decay of the mean validation loss, and of the hypergradients that predict its changes."""
FINAL = 5
"""Number of validation batches whose mean loss estimates the final loss if the run ended now."""

Signals = Mapping[str, tuple[Tensor, Tensor]]
"""Mean hypergradient and signal-to-noise ratio of each tuned hyperparameter's shifts."""


class Metrics:
    """Converts the state of a run to rows of the log, for both drivers.

    If tensors or groups differ, margins and verdicts refer to the mean of their shifts.

    Args:
        monitor: The log.
        hparams: The tuned hyperparameters.

    Attributes:
        monitor: The log.
        course: Mean raw values of each tuned hyperparameter, one for each hyperparameter step.
        trained: The last training loss.
        floors: Floors at the first hyperparameter step, by name; None before it.
    """

    def __init__(self, monitor: Monitor, hparams: Mapping[str, Hparam]) -> None:
        self.monitor = monitor
        self.course: dict[str, list[float]] = {n: [] for n in hparams}
        self.trained: float | Tensor | None = None
        self._hparams = hparams
        self._agreement = Agreement()
        self._mean_loss: float | None = None
        self._recent: deque[float] = deque(maxlen=FINAL)
        self._logged = -1  # the last step with an entry of the hyperparameters
        self.floors: dict[str, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state of later entries, as plain containers."""
        return {
            "course": {name: list(values) for name, values in self.course.items()},
            "trained": None if self.trained is None else float(self.trained),
            "mean_loss": self._mean_loss,
            "recent": list(self._recent),
            "logged": self._logged,
            "floors": self.floors,
            "agreement": self._agreement.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.course.update({name: list(values) for name, values in state["course"].items()})
        self.trained, self._mean_loss = state["trained"], state["mean_loss"]
        self._agreement.load_state_dict(state["agreement"])
        self._recent = deque(state["recent"], maxlen=FINAL)
        self._logged = state["logged"]
        self.floors = state["floors"]

    def note(self, raw: Mapping[str, float], *, last: bool = False) -> None:
        """Append raw values to the course, or replace the ``last`` ones."""
        for name, value in raw.items():
            self.course[name][-1 if last else len(self.course[name]) :] = [value]

    def note_floors(
        self,
        values: Mapping[str, Any],
        raw: Mapping[str, Tensor],
        ends: Mapping[str, Ends],
    ) -> None:
        """Record the floors at the first hyperparameter step, which raise lower given values.

        Args:
            values: Hyperparameters by name; a list if tensors differ.
            raw: Raw values of the tuned ones.
            ends: Bounds of each, by name.
        """
        known = {n: (float(r.mean()), ends[n]) for n, r in raw.items()}
        self.floors = {
            n: _value(self._hparams[n].bijection, middle(values[n]), place, low)
            for n, (place, (low, _, floored)) in known.items() if floored
        }  # fmt: skip

    def hyper_step(
        self,
        step: int,
        loss: float | Tensor,
        values: Mapping[str, Any],
        raw: Mapping[str, Tensor],
        signals: Signals,
    ) -> None:
        """Log a hyperparameter step, after :meth:`note`.

        Args:
            step: Training steps taken.
            loss: The validation loss.
            values: Hyperparameters by name; a list if tensors differ.
            raw: Raw values of the tuned ones.
            signals: Their hypergradients.
        """
        rows = self.margins(values)  # before the values: charts want their steps to match
        rows += hyper_rows(loss, values, signals)
        if self.trained is not None:
            rows.append(("Loss/gap", loss - self.trained))
        outer = float(loss)
        self._recent.append(outer)
        self._logged = step
        if math.isfinite(outer):
            mean = outer if self._mean_loss is None else self._mean_loss
            self._mean_loss = RECENT * mean + (1 - RECENT) * outer
        if signals and self._mean_loss is not None:
            grads = torch.cat([mean.view(-1).cpu() for mean, _ in signals.values()]).tolist()
            places = torch.cat([r.view(-1).cpu() for r in raw.values()]).tolist()
            rows += self._agreement.look(grads, places, self._mean_loss)
        self.monitor.scalars(rows, step)

    @property
    def recent_loss(self) -> float:
        """The mean loss of the last validation batches; NaN before the first."""
        return statistics.fmean(self._recent) if self._recent else math.nan

    def margins(self, values: Mapping[str, Any]) -> list[tuple[str, float | Tensor]]:
        """Rows of the chart of each tuned hyperparameter: its band, and log10 of a rate.

        The band is the standard deviation of the last values. If groups or layers differ,
        ``hyper/<name>`` is their median and the band their range, so the chart has the same tags in
        every run. For rates, band and value are drawn as log10.
        """
        rows: list[tuple[str, float | Tensor]] = []
        for name, course in self.course.items():
            value, hparam = middle(values[name]), self._hparams[name]
            if isinstance(values[name], list):
                rows.append((f"hyper/{name}", value))
                some = [v for v in values[name] if v > 0 or not logarithmic(hparam)] or [0.0]
                value, ends = middle(some), (min(some), max(some))
            elif course:
                raw = hparam.bijection.inverse(
                    torch.tensor(value, dtype=torch.float64, device="cpu")
                )
                spread = torch.tensor(course[-SCATTER:], dtype=torch.float64, device="cpu").std(
                    correction=0
                )
                both = hparam.bijection.forward(raw + torch.stack([-spread, spread]))
                ends = both[0].item(), both[1].item()
            else:
                continue
            if logarithmic(hparam):
                if ends[0] <= 0:
                    continue  # log 0: it is given as 0 and not tuned yet
                rows.append((f"{LOG10}/{name}", drawn(hparam, value)))
            for end, reached in zip(("low", "high"), ends, strict=True):
                rows.append((f"margin/{name}/{end}", drawn(hparam, reached)))
        return rows

    def placed(self, values: Mapping[str, Any], step: int) -> None:
        """Log hyperparameters set by something other than a hyperparameter step."""
        self.monitor.scalars(self._present(values), step)
        self._logged = step

    def _present(self, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
        tuned = [row for name in self.course for row in named(f"hyper/{name}", values[name])]
        return [*self.margins(values), *tuned]

    def mark(self, values: Mapping[str, float | Sequence[float]], step: int) -> None:
        """Mark an event in the charts of the hyperparameters that it set.

        Args:
            values: Values after the event, of the hyperparameters that it set.
            step: Training steps taken.
        """
        self.monitor.scalars(marks(self._hparams, values), step)

    def compared(self, averaged: float | Tensor, last: float | Tensor, step: int) -> None:
        """Log the validation loss at the averaged weights minus that at the last iterate."""
        self.monitor.scalar("outer/averaged-vs-last", averaged - last, step)

    def verdicts(
        self,
        values: Mapping[str, Any],
        signals: Signals,
        ends: Mapping[str, Ends],
    ) -> dict[str, Verdict]:
        """A verdict on each tuned hyperparameter over the whole run.

        Args:
            values: Hyperparameters by name.
            signals: Hypergradients of the tuned ones.
            ends: Bounds of each, by name.
        """
        verdicts = {}
        for name, course in self.course.items():
            if not course:
                continue
            mean, snr = (float(t.mean()) for t in signals[name])
            value, ratio = middle(values[name]), snr if snr > 0 else math.nan
            hparam = self._hparams[name]
            forward = partial(_value, hparam.bijection, value, course[-1])
            judged = judge(name, course, ratio, ends[name], value, mean, hparam.role, forward)
            raised = (self.floors or {}).get(name, math.nan)
            verdicts[name] = replace(judged, snr=ratio, raised=raised)
        return verdicts

    def finish(
        self, values: Mapping[str, Any], verdicts: Mapping[str, Verdict], step: int, why: str
    ) -> None:
        """Log the final hyperparameters, with verdicts and explanations."""
        if step > self._logged:
            self.monitor.last(self._present(values), step)
        if self.monitor.on and verdicts:
            self.monitor.text("verdicts", sentences(list(verdicts.values())), step)
            self.monitor.text("why", "\n".join(f"- {line}" for line in why.splitlines()), step)


def _value(scale: AbstractBijection, now: float, last: float, raw: float) -> float:
    """The value at a point of the course, whose last point is the current value."""
    here = scale.inverse(torch.tensor(now, dtype=torch.float64, device="cpu"))
    return float(scale.forward(here + (raw - last)))


def verdict_rows(verdicts: Mapping[str, Verdict]) -> list[tuple[str, float]]:
    """Tags and codes of verdicts."""
    return [(f"verdict/{v.name}", float(v.code)) for v in verdicts.values()]


def sentences(verdicts: Sequence[Verdict]) -> str:
    """Verdicts as a list in Markdown."""
    return "\n".join(f"- {v.sentence}" for v in verdicts)
