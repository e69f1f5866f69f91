"""What happens in a run: weight steps, the probe, hyperparameter steps and roll-backs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selftune.averaging import Average
from selftune.ending import Ending
from selftune.guard import Guard
from selftune.hparams import MOMENTA
from selftune.monitor import Monitor
from selftune.optim._block import Block
from selftune.optim._buffers import Buffers
from selftune.optim._following import Call, Following
from selftune.optim._hypergradients import Hypergradients
from selftune.optim._ranks import Ranks
from selftune.optim._stepper import AbstractStepper, Grads
from selftune.probe import Probe
from selftune.rules._base import Values
from selftune.travel import BEGINNING, Travel
from selftune.tuning import Tuning
from selftune.update import Clock, Transition

log = logging.getLogger("selftune")

PULSE = 8  # steps between two looks at gradients and weights; mostly those that are observed
THINNED = 5  # steps between two samples of BatchNorm statistics in their average
TOO_HIGH = "the rate that the probe chose leads uphill"
BAD_GRADIENTS = "gradients vanished or are not finite"
BAD_WEIGHTS = "a step led to weights that are not finite"
ALONE = 50  # steps without a hyper_step after which training gradients serve instead


@dataclass(kw_only=True)
class Counts:
    """Step counts of a run.

    Attributes:
        steps: Training steps taken, the probe's and skipped ones included.
        since: Steps at the last fresh start (after the probe or a roll-back).
        outer: Steps at the last hyperparameter step.
        heard: Steps at the last call of ``hyper_step``.
    """

    steps: int = 0
    since: int = 0
    outer: int = 0
    heard: int = 0


@dataclass(kw_only=True)
class Engine:
    """The parts of a run and how they act on one another; it knows nothing of torch's interface."""

    tuning: Tuning
    averaging: Average
    every: int
    stride: int
    probe: Probe | None
    guard: Guard | None
    buffers: Buffers
    monitor: Monitor
    stepper: AbstractStepper
    ranks: Ranks
    hypergradients: Hypergradients
    regularizers: set[str]
    clock: Counts = field(default_factory=Counts)
    travel: Travel = field(default_factory=Travel)
    ending: Ending = field(default_factory=Ending)
    blocks: list[Block] = field(default_factory=list)
    slopes: Sequence[Mapping[str, Any]] = field(default_factory=list)
    alone: Tensor | None = None
    last: list[tuple[Tensor, Tensor]] | None = None
    following: Following | None = None
    heard: bool = False

    @property
    def probing(self) -> bool:
        """Whether the start-up probe is still sweeping."""
        return self.probe is not None and not self.probe.ended

    def due(self, total: int | None) -> tuple[bool, bool]:
        """Whether a hyperparameter step is due, and judging the end of a run of so many steps."""
        clock, ending = self.clock, self.ending
        if self.probing:
            return False, False
        step = clock.steps - max(clock.outer, clock.since) >= self.every
        period = clock.steps - clock.heard
        return (
            step and not ending.over(clock.steps, total, self.every),
            ending.due(clock.steps, period, total, self.every),
        )

    def begin(self) -> None:
        """Take weights and statistics as they are for averaged and good ones."""
        if self.buffers.shown:
            return
        for block in self.blocks:
            block.begin()
        self.buffers.begin()

    def train(
        self,
        grads: Grads,
        values: Sequence[Values],
        rates: Sequence[float],
        call: Call | None = None,
    ) -> bool:
        """One training step from gradients; true if hyperparameters changed.

        Args:
            grads: Of every block.
            values: Options and hyperparameters of every block.
            rates: The schedule's factor of every block.
            call: Gives gradients at other weights, to an estimator that needs them.
        """
        self.clock.steps += 1
        if self.probe is not None and not self.probe.ended:
            return self._probe_step(self.probe, grads, values)
        # A step that cannot be taken back is judged before, any other only if it went wrong.
        if self.stepper.commits or self._pulse:
            verdict = self._verdict(grads)
            if verdict != "ok":
                return verdict == "rollback" and self.roll_back(BAD_GRADIENTS, worsened=False)
        if self._unsettled(grads):
            return True
        transitions = self._move(grads, values, rates)
        if self.guard is not None:
            if not self._finite(transitions):
                verdict = self._verdict(grads)
                why = BAD_WEIGHTS if verdict == "ok" else BAD_GRADIENTS
                return verdict != "skip" and self.roll_back(why, worsened=False)
            self.guard.skipped = 0
        changed = self._train_alone(grads)
        if self.clock.since == self.clock.steps:  # rolled back
            return True
        age = self.clock.steps - self.clock.since
        if self.following is not None and call is not None:
            self.following.observe(self.blocks[0], values[0], grads[0][0], transitions[0], call)
        observed = age % self.stride == 0
        if observed:
            self.hypergradients.note(self.blocks, grads, transitions, age // self.stride)
        share = self.averaging.weight(age, self.stride)
        for block, step, slope, (_, mask) in zip(
            self.blocks, transitions, self.slopes, grads, strict=True
        ):
            block.advance(step, slope if observed else None, mask)
            if observed:
                block.blend(step, share, mask)
            block.layout.write(step.moved, block.params)
        self._blend_buffers()
        return changed

    def unobserved(self, values: Sequence[Values], rates: Sequence[float]) -> bool:
        """One training step in place that nobody observes; false, and nothing done, if one does.

        Most steps are of this kind, and one kernel in place of some thirty operations.
        """
        step = self.clock.steps + 1
        age = step - self.clock.since
        looked_at = age % self.stride == 0 or age % PULSE == 0
        if looked_at or self.probing or self.following is not None or not self.clock.heard:
            return False
        if self.probe is not None and self.probe.settling:
            return False
        if not self.stepper.unobserved(self.blocks, values, self._clocks(step, rates)):
            return False
        self.clock.steps = step
        if self.guard is not None:
            self.guard.skipped = 0
        self._blend_buffers()
        return True

    @property
    def _pulse(self) -> bool:
        return (self.clock.steps - self.clock.since) % PULSE == 0

    def _blend_buffers(self) -> None:
        if self.clock.steps % THINNED == 0:
            age = self.clock.steps - self.clock.since
            self.buffers.blend(self.averaging.weight(age, THINNED))

    @staticmethod
    def _clocks(step: int, rates: Sequence[float]) -> list[Clock]:
        return [Clock(step - 1, rate) for rate in rates]

    def _move(
        self, grads: Grads, values: Sequence[Values], rates: Sequence[float]
    ) -> list[Transition]:
        clocks = self._clocks(self.clock.steps, rates)
        return self.stepper.move(self.blocks, values, grads, clocks)

    def _finite(self, transitions: Sequence[Transition]) -> bool:
        """Whether a step may be written; not asked of a GPU at every step, which would wait."""
        if transitions[0].moved.is_cuda and not self._pulse:
            return True
        return math.isfinite(self._total([t.moved.sum() for t in transitions]))

    def _total(self, parts: Sequence[Tensor]) -> float:
        """The sum over blocks, and over processes that hold parts of the parameters."""
        whole = parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum()
        return float(self.ranks.total(whole))

    def _verdict(self, grads: Grads) -> str:
        if self.guard is None or (grads[0][0].is_cuda and not self._pulse):
            return "ok"
        verdict = self.guard.gradient(self._total([g @ g for g, _ in grads]))
        # A network dies at once or not at all; later, no gradient may mean nothing left to learn.
        young = self.clock.steps - self.clock.since <= 20 * PULSE
        if verdict == "ok" and young and self._pulse:
            alive = self._total([torch.count_nonzero(g).to(g.dtype) for g, _ in grads])
            verdict = self.guard.pulse(alive)
        return verdict

    def _probe_step(self, probe: Probe, grads: Grads, values: Sequence[Values]) -> bool:
        if probe.taken:
            slopes = [
                g @ (b.weights() - b.average) for b, (g, _) in zip(self.blocks, grads, strict=True)
            ]
            if probe.observe(self._total(slopes)):
                self._keep([b.weights() for b in self.blocks])
        if probe.ended:
            self._fresh_start()
            beta1, total_steps = self.tuning.value("beta1"), self.tuning.total_steps
            for name, raw in probe.moves(beta1, total_steps).items():
                self.tuning.move(name, raw)
            log.info("probe: %d steps, learning rate times %.3g", probe.taken, probe.choice)
            self.monitor.scalar("guard/probe", probe.choice, self.clock.steps)
            return True
        rates = [probe.factor(probe.taken)] * len(self.blocks)
        transitions = self._move(grads, values, rates)
        for block, step in zip(self.blocks, transitions, strict=True):
            block.average.copy_(step.params)  # not in use yet, it holds the weights before
            block.advance(step, None, None)
            block.layout.write(step.moved, block.params)
        probe.taken += 1
        return False

    def _unsettled(self, grads: Grads) -> bool:
        """Whether the rate that the probe chose loses what it had found; then it is lowered."""
        probe, last, self.last = self.probe, self.last, None
        if self.guard is None or probe is None or not probe.settling:
            return False
        self.last = [(g.clone(), b.weights()) for b, (g, _) in zip(self.blocks, grads, strict=True)]
        if last is None or [w.shape for _, w in last] != [w.shape for _, w in self.last]:
            return False  # the first of them, or parameters were added
        pairs = list(zip(last, self.last, strict=True))
        start = self._total([g @ (w - v) for (g, v), (_, w) in pairs])
        end = self._total([h @ (w - v) for (_, v), (h, w) in pairs])
        if not probe.settle(start, end):
            return False
        return self.roll_back(TOO_HIGH, worsened=False)

    def _train_alone(self, grads: Grads) -> bool:
        """Let this training gradient, at the averaged tangents, stand in for a validation one.

        It comes from a batch that the tangents have not seen, so within the first epoch it is
        an unbiased outer gradient; a regularizer it cannot judge.
        """
        names = [n for n in self.tuning.names if n not in self.regularizers]
        if self.following is not None:  # whose estimates are too dear for every step
            return False
        if not names or self.clock.heard or self.clock.steps <= ALONE:
            return False
        flat = [g for g, _ in grads]
        signal = self.hypergradients.along(self.blocks, flat)
        self.alone = signal if self.alone is None else self.alone + signal
        if self.clock.steps - self.clock.outer < self.every:
            return False
        self.clock.outer = self.clock.steps
        signal, self.alone = self.hypergradients.scaled(self.alone, flat, self.ranks.total), None
        averages = [b.average for b in self.blocks]
        due = self.clock.steps % (10 * self.every) < self.every  # nothing else says which are good
        if due and math.isfinite(self._total([a.sum() for a in averages])):
            self._keep(averages)
        return self.tune(signal, names)

    def outer_step(
        self,
        loss: float,
        grads: Sequence[Tensor],
        values: Sequence[Values],
        compare: Callable[[], tuple[float, float, float]],
    ) -> bool:
        """One hyperparameter step from the outer gradients; true if hyperparameters changed.

        Args:
            loss: The outer loss.
            grads: Its gradients, of every block.
            values: Options and hyperparameters of every block.
            compare: Mean losses at the averaged and at the good weights, over many batches, and
                the standard error of their difference.
        """
        gone = self.clock.steps - max(self.clock.outer, self.clock.since)
        self.clock.outer = self.clock.steps
        if self.guard is not None:
            verdict = self.guard.loss(loss)
            # A few unlucky batches look like a loss that has worsened, or, beside a lucky first
            # one, exploded.
            if verdict == "rollback" and (
                not math.isfinite(loss) or self.guard.confirms(*compare())
            ):
                what = "exploded" if self.guard.exploded else "worsened"
                why = f"the validation loss has {what}, to {loss:.4g}"
                return self.roll_back(why, worsened=not self.guard.exploded)
            if verdict == "hold":
                for block in self.blocks:
                    block.held.copy_(block.average)
                self.buffers.hold()
            if verdict == "best":
                self._keep([b.held for b in self.blocks], held=True)
        if not self.tuning.rows:
            return False
        if self.following is not None:
            signal = self.following.signal(self.blocks[0], values[0], grads[0])
            if signal is None:
                return False
        else:
            signal = self.hypergradients.outer(self.blocks, grads, gone)
        signal = self.hypergradients.scaled(signal, grads, self.ranks.outer)
        return self.tune(signal, self.tuning.names)

    def tune(self, signal: Tensor, names: Sequence[str]) -> bool:
        """Step the named hyperparameters, unless the hypergradient is not finite."""
        if not bool(torch.isfinite(signal).all()):
            return self.roll_back("a hypergradient is not finite", worsened=False)
        climb = self._led() if "lr" in names else 1.0
        self.tuning.step(signal, names, climb=climb, steps=self.clock.steps)
        return True

    def _led(self) -> float:
        """How far the gradient has led the weights to where they are; also ends a stretch.

        Of a beginning, a tenth of the run, nothing can be said yet; and where nothing guards a run,
        as in a game, going to and fro may be its way.
        """
        if self.guard is None:
            return 1.0
        travel, step = self.travel, self.clock.steps
        if travel.ended(step):
            way = self._total([b.square_distance(b.mark) for b in self.blocks])
            share = travel.add(way, step)
            for block in self.blocks:
                block.end_stretch(share)
        away = math.sqrt(self._total([b.square_distance(b.centre) for b in self.blocks]))
        self.monitor.scalar("travel/ratio", travel.ratio(away), step)
        return 1.0 if step < self.tuning.horizon / BEGINNING else travel.led(away)

    def roll_back(self, why: str, *, worsened: bool) -> bool:
        """Return to the last good weights with a lower rate; true, as hyperparameters changed."""
        if self.guard is None:
            return False
        cool = self.guard.rolled_back(worsened=worsened)
        self._fresh_start()
        self.tuning.hyper.reset()
        self.tuning.move("lr", -cool)
        if not worsened:
            for name in MOMENTA:
                self.tuning.move(name, -0.7)  # memory 1/(1 − μ) about halves
        message = (
            "selftune, step %d: %s; back to the last good weights, learning rate divided by %.3g"
        )
        (log.warning if self.guard.rollbacks == 1 else log.info)(
            message, self.clock.steps, why, math.exp(cool)
        )
        self.monitor.scalar("guard/events", self.guard.rollbacks, self.clock.steps)
        return True

    def _keep(self, weights: Sequence[Tensor], *, held: bool = False) -> None:
        for block, good in zip(self.blocks, weights, strict=True):
            block.good.copy_(good)
        self.buffers.keep(held=held)

    def _fresh_start(self) -> None:
        for block in self.blocks:
            block.rewind()
        self.stepper.forget()
        if self.following is not None:
            self.following.forget()
        self.buffers.restore()
        self.alone, self.last = None, None
        self.clock.since = self.clock.steps
        self.travel = Travel(since=self.clock.since)
        self.hypergradients.settled.forget()
