"""The log of a tuner's run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from selftune.method.hyper_optimizer import signal_to_noise
from selftune.monitor import Ends, Metrics, Monitor, Verdict
from selftune.tuner._run_state import RunState
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps


def monitor_of(targets: Sequence[Any], writes: bool) -> Monitor:
    """The monitor of a rank; entries are computed on all ranks and written by the first."""
    return Monitor((list(targets) if writes else [_discard]) if targets else None)


def _discard(values: Mapping[str, float], step: int) -> None:
    """A recorder that discards everything."""


class TunerLog:
    """The metrics of a tuner; without a recorder it writes nothing.

    Args:
        steps: The steps.
        run: Their tensors.
        snapshots: Select a member's part of a tensor.
        rest: Minimum seconds between two entries.
    """

    def __init__(self, steps: Steps, run: RunState, snapshots: Snapshots, rest: float) -> None:
        self.metrics = Metrics(Monitor(None), steps.hyper.hparams)
        self._steps, self._run, self._snapshots = steps, run, snapshots
        self._rest, self._noted = rest, -math.inf
        self._plain, self._tuning = [0.0, 0], [0.0, 0]  # (seconds, steps) without and with tuning

    def note(self, values: Mapping[str, float]) -> None:
        """Record values for verdicts."""
        self.metrics.note({n: self._inverse(n, [v]) for n, v in values.items()})

    def _inverse(self, name: str, values: Sequence[float]) -> Tensor:
        scale = self._steps.hyper.hparams[name].bijection
        return scale.inverse(torch.tensor(values, dtype=torch.float64))

    def placed(self, step: int, values: Mapping[str, float]) -> None:
        """Log hyperparameters set by something other than a hyperparameter step."""
        if self.metrics.monitor.on:
            self.metrics.placed(values, step)

    def trained(self, step: int, loss: float) -> None:
        """Log a training loss without a hyperparameter step, if the last entry is old enough."""
        now = time.monotonic()
        if self.metrics.monitor.on and now - self._noted >= self._rest:
            self._noted = now
            self.metrics.monitor.scalar("Loss/train", loss, step)

    def note_floors(self, values: Mapping[str, float], member: int) -> None:
        """Record the floors at the first hyperparameter step, for the explanations."""
        if self.metrics.floors is None:
            raw, ends = self._raw(values, member), self._ends(values, member)
            self.metrics.note_floors(values, raw, ends)

    def hyper_step(
        self, step: int, loss: float, outer: float, values: Mapping[str, float], member: int
    ) -> None:
        """Log a hyperparameter step, unless the last entry is too recent.

        Args:
            step: Steps taken.
            loss: The training loss.
            outer: The validation loss.
            values: Tuned hyperparameters by name.
            member: The logged member.
        """
        now, monitor = time.monotonic(), self.metrics.monitor
        if not monitor.on or now - self._noted < self._rest:
            return
        self._noted = now
        monitor.scalar("Loss/train", loss, step)
        self.metrics.trained = loss
        raw = self._raw(values, member)
        self.metrics.hyper_step(step, outer, values, raw, self._signals(member))
        monitor.scalars(self._displacement(member), step)
        monitor.scalars(self._overhead(), step)

    def verdicts(self, values: Mapping[str, float], member: int) -> dict[str, Verdict]:
        """A verdict on each tuned hyperparameter."""
        return self.metrics.verdicts(values, self._signals(member), self._ends(values, member))

    def _ends(self, values: Mapping[str, float], member: int) -> Callable[[str], Ends]:
        hyper = self._steps.hyper
        frame, raw = hyper.frame(), self._snapshots.part(self._run.hyper.raw, member).cpu()
        steps = int(self._snapshots.part(self._run.step, member))
        memory = self._steps.memory({**self._steps.options, **values})
        low = hyper.lay_floor(raw, frame, memory, steps)

        def ends(name: str) -> Ends:
            slots = hyper.slots(name)
            floored = bool((low[slots] > frame.low[slots]).any())
            return Ends(float(low[slots].mean()), float(frame.high[slots].mean()), floored)

        return ends

    def _raw(self, names: Iterable[str], member: int) -> dict[str, Tensor]:
        state = self._snapshots.part(self._run.hyper.raw, member).cpu()
        return {n: state[i : i + 1] for i, n in enumerate(names)}

    def _signals(self, member: int) -> dict[str, tuple[Tensor, Tensor]]:
        state = self._run.hyper
        mean, square = (self._snapshots.part(t, member).cpu() for t in (state.mean, state.square))
        ratio = signal_to_noise(mean, square)
        names = self._steps.hyper.names
        return {n: (mean[i : i + 1], ratio[i : i + 1]) for i, n in enumerate(names)}

    def clocked(self, seconds: float, tuned: bool) -> None:
        """Measure the time of a step."""
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
        """The displacement ratio of a member's weights."""
        if not self._run.method.displacement:
            return []
        state = tree_map(lambda t: self._snapshots.part(t, member), self._run.method)
        weights = [self._snapshots.part(w, member) for w in self._run.weights]
        ratio = self._steps.method.ratio(state, weights)
        return [] if math.isnan(ratio) else [("weights/displacement", ratio)]
