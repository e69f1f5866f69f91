"""The guard: detects divergence, dead units and overfitting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from selftune._arguments import Settings
from selftune.control.good_weights import GoodWeights
from selftune.control.live_units import LiveUnits, total
from selftune.control.loss_spike import LossSpike
from selftune.control.records import Saved
from selftune.control.training_losses import TrainingLosses


@dataclass(frozen=True, kw_only=True)
class GuardPolicy(Settings):
    """The thresholds of the guard; pass a modified one as ``guard=``.

    Attributes:
        patience: Number of consecutive alarms before a rewind: gradients, hypergradients or
            training losses that are not finite, or vanishing gradients.
        explosion: A smoothed loss has exploded if it exceeds the first by this factor.
        sigmas: The smoothed validation loss has worsened if it exceeds its best by this many
            standard errors, and by ``tolerance`` and ``least``.
        tolerance: Minimum increase, relative to the progress so far.
        least: Minimum increase, relative to the first loss.
        limit: Number of consecutive rewinds after which the divisor of the rate no longer grows
            and the first loss is measured again.
        wild: A training loss has diverged if it exceeds the first losses of the sweep by this
            multiple of their value or range.
        memory: Weight of the newest training loss in their running mean.
        noise: An increase below this many standard deviations of the first ten training losses is
            not an explosion, because the zero of a loss is arbitrary.
        spike: Three consecutive validation losses that undo this share of the descent are an
            alarm, because the mean of ``recent`` losses shows it late (:class:`LossSpike`).
        spike_sigmas: Minimum rise for this alarm in standard errors of a single loss.
        fresh: Number of initial evaluations, which set the reference even if the loss rises.
        recent: Number of recent validation losses whose mean is compared with its best.
        window: Number of consecutive losses that judge the averaged weights at the middle one.
        dead: Gradients have vanished if live units fall below this share of their maximum.
        pulse: Steps between two counts of live units.
        young: Steps after a restart in which vanishing gradients are an alarm. Later a zero
            gradient may mean that training has converged.
        capacity: If the rate has risen by ``climbed``, fewer live units than this share of their
            maximum are an alarm (:class:`LiveUnits`).
        bottleneck: The same for the harmonic mean of the shares of layers, of which a wide output
            does not hide a dead one.
        grace: Grace period after a sweep in steps: an earlier count does not confirm it, because
            units die some steps after the rate has become too high.
        climbed: Threshold on the log of the ratio of the learning rate to the given one.
        cool: Divisor of the rate in a rewind; consecutive rewinds use powers of it.
        cool_worsened: Divisor of the rate if only the validation loss worsened.
        momentum: Change of the raw values of momenta that make steps longer if the run diverged:
            −0.7 about halves the memory 1/(1 − μ).
        fewest_batches: Minimum number of validation batches that confirm a worsened loss.
        steps_a_batch: Steps of the run for each such batch.
        most_batches: Maximum number of such batches. The tuner, which compares on the same
            batches, uses this number if the validation set has a length.
    """

    signed = ("momentum",)
    positive = ("pulse", "window")

    patience: int = 3
    explosion: float = 2.0
    sigmas: float = 2.5
    tolerance: float = 0.05
    least: float = 0.02
    spike: float = 0.5
    spike_sigmas: float = 4.0
    limit: int = 10
    wild: float = 10.0
    memory: float = 0.1
    noise: float = 4.0
    fresh: int = 5
    recent: int = 10
    window: int = 5
    dead: float = 0.1
    pulse: int = 8
    young: int = 160
    capacity: float = 0.7
    bottleneck: float = 0.33
    grace: int = 10
    climbed: float = 0.4
    cool: float = 3.0
    cool_worsened: float = 2.0
    momentum: float = -0.7
    fewest_batches: int = 8
    steps_a_batch: int = 50
    most_batches: int = 50

    def begin(self) -> Guard:
        """The guard of a new run."""
        return Guard(policy=self, good=GoodWeights(window=self.window))

    def counts(self, age: int, stride: int) -> bool:
        """Whether live units are counted at a tracked step.

        Args:
            age: Steps since the last restart.
            stride: Steps between two tracked steps.
        """
        return age % (stride * -(-self.pulse // stride)) == 0

    def batches(self, horizon: int) -> int:
        """Number of validation batches for comparing two points of a run."""
        return min(self.most_batches, max(self.fewest_batches, horizon // self.steps_a_batch))


@dataclass(kw_only=True)
class Guard(Saved):
    """Monitors gradients and losses; its state is plain numbers, saved with the run.

    Each judgement is one of ``"ok"``, a snapshot of :class:`GoodWeights` (``"candidate"``,
    ``"promote"``, ``"average"``), ``"skip"`` (ignore this step), ``"fade"`` (units died at a raised
    learning rate) and ``"rewind"`` (return to the last good weights).

    Args:
        policy: The thresholds.
        good: Judges the averaged weights.
        units: Compares live units with those before.
        training: Statistics of the training loss.
        spike: Compares the latest validation losses with the lowest ones.
    """

    policy: GuardPolicy = GuardPolicy()
    good: GoodWeights = field(default_factory=GoodWeights)
    units: LiveUnits = field(default_factory=LiveUnits)
    training: TrainingLosses = field(default_factory=TrainingLosses)
    spike: LossSpike = field(default_factory=LossSpike)

    start: float = math.nan
    origin: float = math.nan  # first start, kept when start is reset; higher losses are not good
    excess: float = 0.0  # tolerated rise above the start, after a false alarm
    first: float = math.nan
    mean: float = math.nan
    count: int = 0
    best: float = math.inf
    best_error: float = 0.0
    recent: list[float] = field(default_factory=list)
    swept: int = 0
    skipped: int = 0
    skipped_hyper: int = 0
    missed: int = 0
    quiet: int = 0
    loudest: float = 0.0
    streak: int = 0
    rewinds: int = 0
    moved: bool = True  # since the last rewind: if no gradient is finite, another would not help
    worsened: int = 0  # rewinds because the validation loss had worsened
    exploded: bool = False  # whether the last validation loss exploded, not merely worsened

    def gradient(self, finite: bool) -> str:
        """Judge a training gradient, or the weights after its step."""
        self.skipped = 0 if finite else self.skipped + 1
        self.moved |= finite
        return self._after(self.skipped)

    def hypergradient(self, finite: bool) -> str:
        """Judge a hypergradient."""
        self.skipped_hyper = 0 if finite else self.skipped_hyper + 1
        return self._after(self.skipped_hyper)

    def _after(self, alarms: int) -> str:
        patient = alarms < self.policy.patience or not self.moved
        return "ok" if not alarms else "skip" if patient else "rewind"

    def activity(self, alive: Sequence[float], age: int = 0, climb: float = 0.0) -> str:
        """Judge live units (arguments of ``Activity``), of which a dead network has nearly none.

        So has a converged one (a hinge loss at its margin). A run whose loss has decreased is
        therefore judged only if its learning rate has risen: too high a rate moves units to where
        they have no gradient, even if the loss looks good.
        """
        policy = self.policy
        self.units.observe(
            alive, raised=climb > policy.climbed, capacity=policy.capacity,
            bottleneck=policy.bottleneck, early=age <= policy.grace,
        )  # fmt: skip
        if self.units.fading >= policy.patience:
            return "fade"
        if age > policy.young:
            return "ok"
        self.loudest = max(self.loudest, total(alive))
        self.quiet = self.quiet + 1 if total(alive) < policy.dead * self.loudest else 0
        learned = self.first - self.best > 0.1 * abs(self.first) or (
            self.training.first - self.training.mean > 0.1 * abs(self.training.first)
        )
        return "rewind" if self.quiet >= policy.patience and not learned else "ok"

    def training_loss(self, loss: float) -> str:
        """Judge a training loss by its running mean: it may rise, but not explode."""
        policy, training = self.policy, self.training
        if not math.isfinite(loss):
            self.missed += 1
            return self._after(self.missed)
        self.missed = 0
        training.observe(loss, policy.memory)
        noise = policy.noise * math.sqrt(training.spread)
        exploded = self._exploded(training.mean - noise, training.first)
        # Near 0, rare hard examples exceed ten typical losses many times over.
        exploded &= training.mean - noise > training.first + policy.least * training.scale
        exploded &= training.count >= policy.patience  # one batch may be unlucky, too
        return "rewind" if exploded or (training.fresh and self._wild(training.mean)) else "ok"

    def _wild(self, loss: float) -> bool:
        """Whether a training loss is many times above those at the start, if they are known."""
        start = self.training.start
        return loss > start + self.policy.wild * max(abs(start), start - self.training.low)

    def sweeping_loss(self, loss: float) -> bool:
        """Record a training loss of the sweep; return whether the rate is far too high.

        The first few, at the lowest rates, are the reference for losses after the sweep.
        """
        self.swept += 1
        if self.swept <= self.policy.patience:
            self.training.begin(loss)
        return self._wild(loss)

    @property
    def lost(self) -> bool:
        """Whether training losses were reported, and are higher than at the start."""
        start = self.training.start
        return self.training.mean > start + self.policy.least * abs(start)

    @property
    def stuck(self) -> bool:
        """Whether consecutive rewinds brought no improvement at any rate."""
        return self.streak >= self.policy.limit

    def begin(self, loss: float) -> None:
        """Use the validation loss at the initial good weights as the reference."""
        if math.isnan(self.start) and math.isfinite(loss):
            self.start = loss
            self.origin = loss if math.isnan(self.origin) else self.origin

    def validation_loss(self, loss: float) -> str:
        """Judge a loss at the outer point by the mean of the most recent ones.

        The minimum of many noisy means is biased downwards, so the threshold adds the errors of the
        current and best mean. A rise counts only after ten evaluations.
        """
        policy = self.policy
        self.exploded = not math.isfinite(loss)
        if self.exploded:
            return "rewind"
        self.begin(loss)
        self.count += 1
        self.recent = [*self.recent, loss][-policy.recent :]
        self.mean = statistics.fmean(self.recent)
        full = len(self.recent) == policy.recent
        self.exploded = self._exploded(self.mean - self.excess, self.start)
        if self.exploded:
            return "rewind"
        if math.isnan(self.first):
            self.first = loss
        deviations = math.hypot(*(each - self.mean for each in self.recent))
        error = deviations / math.sqrt(len(self.recent) * max(1, len(self.recent) - 1))
        least, noise = policy.least * abs(self.first), math.hypot(error, self.best_error)
        slack = max(policy.sigmas * noise, policy.tolerance * (self.first - self.best), least)
        # Each rewind without an improvement raises the thresholds of the next.
        fresh, raised = self.count <= policy.fresh, 1 + self.streak / 2
        if not fresh and self.spike.observe(
            self.recent, self.first, share=policy.spike, least=least,
            sigmas=policy.spike_sigmas * raised,
        ):  # fmt: skip
            return "rewind"
        if full and self.count > 10 and self.mean > self.best + slack * raised:
            return "rewind"
        # The first means set the reference; only weights that beat the start are good.
        bar = self.origin + policy.least * abs(self.origin)
        better = self.mean < min(self.best, bar) and (full or fresh)
        if better or fresh:
            self.best, self.best_error = self.mean, error
        self.streak = 0 if better else self.streak
        # A lucky window while the mean rises would replace good weights by worse ones.
        rising = self.mean > self.best + math.hypot(error, self.best_error)
        kept = self.good.observe(loss, bar, rejected=self.units.fading > 0 or rising)
        if kept in ("promote", "average"):
            self.units.spare()
        return kept

    def confirms(self, now: float, good: float, error: float = 0.0) -> bool:
        """Whether losses over many batches confirm that the validation loss has worsened.

        If not, the alarm was noise, and the mean restarts from these losses.

        Args:
            now: Loss at the current outer point.
            good: Loss at the good weights, over the same batches or as many others.
            error: Standard error of their difference; 0 if the batches are the same.
        """
        policy = self.policy
        first = self.start if math.isnan(self.first) else self.first
        slack = max(
            policy.tolerance * (first - good), policy.least * abs(first), policy.sigmas * error
        )
        if not now <= good + slack:
            return True
        if self.exploded:  # the start was a lucky batch, or a loss near 0 within the noise
            above = self.mean - max(self.start, good)
            self.start, self.exploded = max(self.start, good), False
            self.origin = max(self.origin, good)
            self.excess = max(self.excess, policy.explosion * above)
        self.best = self.good.lowest = self.spike.low = min(now, good)
        self.best_error = 0.0
        self.mean, self.count, self.recent = now, policy.fresh, []
        self.good.restart()
        return False

    def _exploded(self, mean: float, first: float) -> bool:
        return mean > first + (self.policy.explosion - 1) * max(abs(first), 1e-6)

    def units_closed(self) -> None:
        """Count live units anew, because closed ones are not dead.

        Losses stay comparable: if closing units raises them beyond the thresholds, the good
        weights, now without these units too, are no better, and :meth:`confirms` sets a new
        reference.
        """
        self.units, self.quiet, self.loudest = LiveUnits(), 0, 0.0

    def rewound(self, *, worsened: bool) -> float:
        """Count a rewind; return the log of the learning rate's divisor.

        If the loss only worsened, the rate is divided by 2; consecutive divergences divide it by
        3, 9, 27, …, so that a run is not rewound endlessly.
        """
        policy = self.policy
        self.rewinds += 1
        self.streak += 1
        self.mean = self.best if math.isfinite(self.best) else math.nan
        self.recent = []
        self.good.restart()
        self.training.restart()
        self.skipped = self.skipped_hyper = self.missed = self.quiet = 0
        self.moved = False
        self.units.rewind()
        if self.stuck:  # lower rates do not help, so the reference must be wrong
            self.start = self.mean = math.nan
        if worsened:
            return math.log(policy.cool_worsened)
        return math.log(policy.cool) * min(self.streak, policy.limit)
