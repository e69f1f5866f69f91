"""What an optimizer tells its log: where hyperparameters are, how sure that is, what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selftune.monitor import Agreement, Monitor, Verdict, hyper_rows, judge, plain_rows
from selftune.tuning import Tuning

SPARSE = 20
"""Hyperparameter steps from one histogram of layers, and from one verdict, to the next."""
SCATTER = 20
"""Hyperparameter steps whose scatter is the margin of a value."""
RECENT = 0.9
"""Memory of the mean validation loss, as of the hypergradients that predict its changes."""


class Telling:
    """Turns what an optimizer knows into rows of the log; without a log it does nothing.

    Where tensors or groups differ, a verdict is about the mean of their shifts.

    Args:
        monitor: The log.
        tuning: The tuned hyperparameters.

    Attributes:
        monitor: The log.
        trained: The last training loss that was reported.
    """

    def __init__(self, monitor: Monitor, tuning: Tuning) -> None:
        self.monitor = monitor
        self._tuning = tuning
        self._course: dict[str, list[float]] = {n: [] for n in tuning.names}
        self._agreement = Agreement()
        self._standing: float | None = None
        self._noted: float | None = None
        self._steps = 0
        self.trained: Tensor | None = None

    def begin(self, values: Mapping[str, Any]) -> None:
        """Tell what the run starts with."""
        self.monitor.begin(dict(plain_rows(values)), self._tuning.names)
        self._noted = time.monotonic()

    def tuned(self, loss: Tensor, values: Mapping[str, Any], step: int, begun: float) -> None:
        """Tell of a hyperparameter step.

        Args:
            loss: The validation loss.
            values: All hyperparameters.
            step: Training steps taken.
            begun: When the hyperparameter step began.
        """
        if not self.monitor.on:
            return
        for name, shifts in self._raw().items():
            self._course[name].append(float(shifts.mean()))
        signals = self._tuning.signals()
        rows = hyper_rows(loss, values, signals)
        if self.trained is not None:
            rows.append(("gap/val-train", loss.detach() - self.trained))
        outer = float(loss)  # the guard has read it already
        before = outer if self._standing is None else self._standing
        self._standing = RECENT * before + (1 - RECENT) * outer
        grads = torch.cat([mean for mean, _ in signals.values()]).tolist() if signals else []
        raw = torch.cat(list(self._raw().values())).tolist() if signals else []
        rows += self._agreement.look(grads, raw, self._standing)
        rows += self._margins(values)
        self._steps += 1
        if self.due:
            self.monitor.histograms(values, step)
            rows += [(f"verdict/{v.name}", float(v.code)) for v in self.verdicts(values).values()]
        self.monitor.scalars([*rows, *self._overhead(begun)], step)

    @property
    def due(self) -> bool:
        """Whether what is told rarely is to be told of this step."""
        return self.monitor.on and self._steps % SPARSE == 0

    def compared(self, averaged: Tensor, last: Tensor, step: int) -> None:
        """Tell the validation losses of one batch at the averaged weights and at the last."""
        self.monitor.scalar("outer/averaged-vs-last", averaged - last, step)

    def finish(self, values: Mapping[str, Any], step: int) -> None:
        """Tell where it all ended."""
        found = self.verdicts(values)
        self.monitor.scalars([(f"verdict/{v.name}", float(v.code)) for v in found.values()], step)
        self.monitor.scalars([(f"end/{n}", v) for n, v in plain_rows(values)], step)
        self.monitor.histograms(values, step)
        if self.monitor.on and found:
            told = "\n".join(f"- {v.sentence}" for v in found.values())
            self.monitor.text("verdicts", told, step)
        self.monitor.end("finished")

    def verdicts(self, values: Mapping[str, Any]) -> dict[str, Verdict]:
        """What has become of each tuned hyperparameter since the run began or was loaded."""
        signals, found = self._tuning.signals(), {}
        low, high = self._tuning.bounds()
        for name, course in self._course.items():
            if not course:
                continue
            slots = self._tuning.slots(name)
            mean, snr = (float(t.mean()) for t in signals[name])
            ends = float(low[slots].mean()), float(high[slots].mean())
            some = values[name] if isinstance(values[name], list) else [values[name]]
            value = sorted(some)[len(some) // 2]
            found[name] = judge(name, course, snr if snr > 0 else math.nan, ends, value, mean)
        return found

    def _raw(self) -> dict[str, Tensor]:
        raw = self._tuning.hyper.raw.detach()
        return {n: raw[self._tuning.slots(n)] for n in self._tuning.names}

    def _margins(self, values: Mapping[str, Any]) -> list[tuple[str, float]]:
        """How far the last values of each hyperparameter scattered, where it has one value."""
        rows = []
        for name, course in self._course.items():
            if isinstance(values[name], list):
                continue
            scale = self._tuning.rows[name].hparam.bijection
            recent = torch.tensor(course[-SCATTER:], dtype=torch.float64)
            raw = scale.inverse(torch.tensor(values[name], dtype=torch.float64))
            spread = recent.std(correction=0)
            for end, sign in (("low", -1), ("high", 1)):
                rows.append((f"margin/{name}/{end}", float(scale.forward(raw + sign * spread))))
        return rows

    def _overhead(self, begun: float) -> list[tuple[str, float]]:
        """The share of the time since the last entry that this hyperparameter step took."""
        now, before = time.monotonic(), self._noted
        self._noted = now
        if before is None or now <= before:
            return []
        return [("cost/overhead", min((now - begun) / (now - before), 1.0))]
