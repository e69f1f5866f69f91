"""The log of a tuner's run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selftune.hparams import DECAY, LR
from selftune.monitor import Ends, Metrics, Monitor, Verdict
from selftune.schedules import inverse_time
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps


def monitor_of(targets: Sequence[Any], writes: bool) -> Monitor:
    """The monitor of a rank; entries are computed on all ranks and written by the first."""
    discard = [lambda values, step: None]
    return Monitor((list(targets) if writes else discard) if targets else None)


class TunerLog:
    """The metrics of a tuner; without a recorder it writes nothing."""

    def __init__(self, steps: Steps, snapshots: Snapshots, rest: float) -> None:
        self.metrics = Metrics(Monitor(None), steps.hyper.hparams)
        self._steps, self._snapshots = steps, snapshots
        self._rest, self._noted = rest, -math.inf
        self._plain, self._tuning = [0.0, 0], [0.0, 0]  # (seconds, steps) without and with tuning

    def note(self, raw: Sequence[float]) -> None:
        self.metrics.note(dict(zip(self._steps.hyper.names, raw, strict=True)))

    def trained(self, step: int, loss: float) -> None:
        """Log a training loss without a hyperparameter step, if the last entry is old enough."""
        now = time.monotonic()
        if self.metrics.monitor.on and now - self._noted >= self._rest:
            self._noted = now
            self.metrics.monitor.scalar("Loss/train", loss, step)

    def note_floors(self, values: Mapping[str, float], member: int) -> None:
        """Record the floors at the first hyperparameter step, for the explanations."""
        if self.metrics.floors is None:
            raw, ends = self._raw(member), self._ends(values, member)
            self.metrics.note_floors(values, raw, ends)

    def hyper_step(
        self, step: int, loss: float, outer: float, values: Mapping[str, float], member: int
    ) -> None:
        """Log a hyperparameter step, unless the last entry is too recent."""
        now, monitor = time.monotonic(), self.metrics.monitor
        if not monitor.on or now - self._noted < self._rest:
            return
        self._noted = now
        monitor.scalar("Loss/train", loss, step)
        self.metrics.trained = loss
        self.metrics.hyper_step(step, outer, values, self._raw(member), self._signals(member))
        monitor.scalar("lr/applied", self._applied(step), step)
        monitor.scalars(self._displacement(member), step)
        monitor.scalars(self._overhead(), step)

    def _applied(self, step: int) -> float:
        """The rate of a weight step, before the hyperparameter step that follows it."""
        rate, decay = (
            hparam.bijection.forward(
                torch.tensor(course[-2:][0], dtype=torch.float64, device="cpu")
            )
            if (course := self.metrics.course.get(hparam.name))
            else self._steps.options[hparam.name]
            for hparam in (LR, DECAY)
        )
        return float(rate * self._steps.factor(step - 1) * inverse_time(decay, step - 1))

    def verdicts(self, values: Mapping[str, float], member: int) -> dict[str, Verdict]:
        return self.metrics.verdicts(values, self._signals(member), self._ends(values, member))

    def _ends(self, values: Mapping[str, float], member: int) -> dict[str, Ends]:
        hyper, run = self._steps.hyper, self._snapshots.mine(member)
        memory = self._steps.memory({**self._steps.options, **values})
        ends = hyper.ends(run.hyper.raw.cpu(), hyper.frame(), memory, int(run.step))
        return {n: Ends(*each) for n, each in ends.items()}

    def _raw(self, member: int) -> dict[str, Tensor]:
        return self._steps.hyper.split(self._snapshots.mine(member).hyper.raw.cpu())

    def _signals(self, member: int) -> dict[str, tuple[Tensor, Tensor]]:
        state = self._snapshots.mine(member).hyper
        return self._steps.hyper.signals(state.mean.cpu(), state.square.cpu())

    def clocked(self, seconds: float, tuned: bool) -> None:
        kind = self._tuning if tuned else self._plain
        kind[0] += seconds
        kind[1] += 1

    def _overhead(self) -> list[tuple[str, float | Tensor]]:
        """The share of the steps' time spent on tuning."""
        (plain, count), (tuning, more) = self._plain, self._tuning
        self._plain, self._tuning = [0.0, 0], [0.0, 0]
        if not count or not more:
            return []
        return [("time/overhead", 1 - plain / count * (count + more) / (plain + tuning))]

    def _displacement(self, member: int) -> list[tuple[str, float | Tensor]]:
        run = self._snapshots.mine(member)
        ratio = self._steps.method.ratio(run.method, run.weights)
        return [] if math.isnan(ratio) else [("weights/displacement", ratio)]
