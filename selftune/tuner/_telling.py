"""What a run tells its log: where hyperparameters are, how sure that is, and what it costs."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from selftune.bilevel import Bilevel, Run
from selftune.monitor import Agreement, Monitor, Verdict, hyper_rows, judge
from selftune.tuner._good import Good
from selftune.tuner._result import History

SCATTER = 20  # hyperparameter steps whose scatter is the margin of a value


class Telling:
    """Turns what a run knows into rows of the log.

    Args:
        bilevel: The steps.
        run: Their tensors.
        good: Knows which part of a tensor is a member's.
        history: The course so far.
        rest: Seconds from one entry to the next, at least.

    Attributes:
        monitor: The log.
    """

    def __init__(
        self, bilevel: Bilevel, run: Run, good: Good, history: History, rest: float
    ) -> None:
        self.monitor = Monitor(None)
        self._bilevel, self._run, self._good, self._history = bilevel, run, good, history
        self._rest, self._noted = rest, -math.inf
        self._agreement = Agreement()
        self._plain, self._tuning = [0.0, 0], [0.0, 0]  # seconds and steps without, with tuning

    def tuned(
        self,
        step: int,
        loss: float,
        outer: float,
        values: dict[str, float],
        leader: int,
        standing: float,
    ) -> None:
        """Tell of a hyperparameter step, unless the last entry is too recent.

        Args:
            step: Steps taken.
            loss: The training loss.
            outer: The validation loss.
            values: Hyperparameters by name.
            leader: The member that is told of.
            standing: Its recent validation loss.
        """
        now = time.monotonic()
        if not self.monitor.on or now - self._noted < self._rest:
            return
        self._noted = now
        state = self._run.hyper
        mean, square = (self._good.part(t, leader).cpu() for t in (state.mean, state.square))
        ratio = mean.abs() / square.sqrt()
        signals = {n: (mean[i : i + 1], ratio[i : i + 1]) for i, n in enumerate(values)}
        raw = self._good.part(state.raw, leader).tolist()
        self.monitor.scalars([("train/loss", loss), ("gap/val-train", outer - loss)], step)
        self.monitor.scalars(hyper_rows(outer, values, signals), step)
        self.monitor.scalars(self._margins(), step)
        self.monitor.scalars(self._travel(leader), step)
        self.monitor.scalars(self._agreement.look(mean.tolist(), raw, standing), step)
        self.monitor.scalars(self._overhead(), step)

    def clocked(self, seconds: float, tuned: bool) -> None:
        """Take the time of a step."""
        kind = self._tuning if tuned else self._plain
        kind[0] += seconds
        kind[1] += 1

    def _overhead(self) -> list[tuple[str, float]]:
        """The share of time that steps took because some of them tune."""
        (plain, count), (tuning, more) = self._plain, self._tuning
        self._plain, self._tuning = [0.0, 0], [0.0, 0]
        if not count or not more:
            return []
        return [("cost/overhead", 1 - plain / count * (count + more) / (plain + tuning))]

    def _travel(self, leader: int) -> list[tuple[str, float]]:
        """How far the weights of a member have come, against a random walk."""
        if not self._run.way:
            return []
        way = tree_map(lambda t: self._good.part(t, leader), self._run.way[0])
        weights = [self._good.part(w.value, leader) for w in self._run.weights]
        return [("travel/ratio", float(way.square(weights).sqrt()))]

    def _margins(self) -> list[tuple[str, float]]:
        """How far the last values of each hyperparameter scattered."""
        rows = []
        for name, raw in self.raw(SCATTER).items():
            scale, spread = self._bilevel.hyper.hparams[name].bijection, raw.std(correction=0)
            ends = (scale.forward(raw[-1] + sign * spread) for sign in (-1, 1))
            rows += [
                (f"margin/{name}/{end}", float(value))
                for end, value in zip(("low", "high"), ends, strict=True)
            ]
        return rows

    def raw(self, last: int | None = None) -> dict[str, Tensor]:
        """The raw course of each tuned hyperparameter."""
        known, found = self._bilevel.hyper.hparams, {}
        for name, values in self._history.hparams.items():
            some = torch.tensor(values if last is None else values[-last:], dtype=torch.float64)
            found[name] = known[name].bijection.inverse(some)
        return found

    def verdicts(self, leader: int) -> dict[str, Verdict]:
        """What has become of each tuned hyperparameter so far."""
        hyper, state, found = self._bilevel.hyper, self._run.hyper, {}
        means = self._good.part(state.mean, leader).tolist()
        squares = self._good.part(state.square, leader).tolist()
        course = self.raw()
        for at, name in enumerate(hyper.names):
            if name not in course:
                continue
            hparam, raw = hyper.hparams[name], course[name].tolist()
            snr = abs(means[at]) / math.sqrt(squares[at]) if squares[at] > 0 else math.nan
            ends = torch.tensor([hparam.lower, hparam.upper], dtype=torch.float64)
            low, high = hparam.bijection.inverse(ends).tolist()
            value = self._history.hparams[name][-1]
            found[name] = judge(name, raw, snr, (low, high), value, means[at])
        return found
