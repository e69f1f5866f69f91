"""The log of an optimizer's run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from selftune.monitor import Ends, Metrics, Monitor, Verdict, plain_rows, verdict_rows
from selftune.monitor._monitor import DISTINCT, named
from selftune.optim._shifts import Shifts

SPARSE = 20
"""Hyperparameter steps between two histograms of layers, and between two verdicts."""


def rate_rows(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """The applied rate of each parameter group, or their range if there are many groups."""
    rates = [(str(g.get("name", i)), g["applied_lr"]) for i, g in enumerate(groups)
             if "applied_lr" in g]  # fmt: skip
    if len(groups) == 1:
        return [("lr/applied", rate) for _, rate in rates]
    if len(rates) > DISTINCT or len(dict(rates)) < len(rates):  # or names are not unique
        return named("lr", [rate for _, rate in rates])
    return [(f"lr/{name}", float(rate)) for name, rate in rates]


class OptimizerLog:
    """The metrics of an optimizer."""

    def __init__(self, monitor: Monitor, shifts: Shifts) -> None:
        self.metrics = Metrics(monitor, shifts.tuned)
        self._shifts = shifts
        self._noted: float | None = None
        self._steps = 0

    def begin(self, values: Mapping[str, Any]) -> None:
        """Log the hyperparameters the run started with: the tuned ones as given."""
        self.metrics.monitor.begin(self._given(values), self._shifts.names)
        self._noted = time.monotonic()

    def resume(self, values: Mapping[str, Any], step: int, *, begun: bool) -> None:
        """Drop later entries; in another target, log the start of a run that has begun."""
        self.metrics.monitor.resume(step)
        if begun:
            self.metrics.monitor.begin_anew(self._given(values), self._shifts.names)

    def _given(self, values: Mapping[str, Any]) -> dict[str, float]:
        given = {
            n: r.given for n, r in self._shifts.rows.items() if not isinstance(values[n], list)
        }
        return dict(plain_rows({**values, **given}))

    def note(self, step: int) -> None:
        """Record a hyperparameter step for verdicts; without a recorder, only the first floors."""
        if self.metrics.floors is None:
            self.metrics.note_floors(self._shifts.middles(), self._raw(), self._ends(step))
        if self.metrics.monitor.on:
            self.metrics.note(self._places())

    def hyper_step(
        self,
        loss: Tensor,
        values: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
        step: int,
        begun: float,
    ) -> None:
        """Log a hyperparameter step with its start time, and the rates of the last weight step."""
        raw, monitor = self._raw(), self.metrics.monitor
        monitor.scalars(rate_rows(groups), step)
        tuned = {n: values[n] for n in self._shifts.rows}
        self.metrics.hyper_step(step, loss, tuned, raw, self._signals())
        monitor.scalar("Loss/final", self.metrics.recent_loss, step)
        self._steps += 1
        if self.due:
            monitor.histograms(values, step)
            monitor.scalars(verdict_rows(self.verdicts(values, step)), step)
        now, before = time.monotonic(), self._noted
        self._noted = now
        if before is not None and now > before:  # the share of the time since the last entry
            monitor.scalar("time/overhead", min((now - begun) / (now - before), 1.0), step)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "metrics": self.metrics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]
        self.metrics.load_state_dict(state["metrics"])

    @property
    def due(self) -> bool:
        """Whether infrequent entries are due at this step."""
        return self.metrics.monitor.on and self._steps % SPARSE == 0

    def finish(self, values: Mapping[str, Any], step: int, why: str) -> None:
        verdicts = self.verdicts(values, step)
        self.metrics.monitor.last(verdict_rows(verdicts), step)
        self.metrics.finish(values, verdicts, step, why)
        self.metrics.monitor.histograms(values, step)
        self.metrics.monitor.end("finished")

    def verdicts(self, values: Mapping[str, Any], step: int) -> dict[str, Verdict]:
        """A verdict on each tuned hyperparameter; empty before the first hyperparameter step."""
        if self.metrics.floors is None:
            return {}
        if not self.metrics.monitor.on:
            self.metrics.note(self._places(), last=True)
        return self.metrics.verdicts(values, self._signals(), self._ends(step))

    def _raw(self) -> dict[str, Tensor]:
        return self._shifts.hyper.split(self._shifts.state.raw)

    def _places(self) -> dict[str, float]:
        return {name: float(shifts.mean()) for name, shifts in self._raw().items()}

    def _ends(self, step: int) -> dict[str, Ends]:
        """Bounds of the shifts, because the log records shifts."""
        shifts = self._shifts
        ends = shifts.hyper.ends(shifts.state.raw, shifts.frame(), shifts.memory, step)
        return {n: Ends(*each) for n, each in ends.items()}

    def _signals(self) -> dict[str, tuple[Tensor, Tensor]]:
        state = self._shifts.state
        return self._shifts.hyper.signals(state.mean, state.square)
