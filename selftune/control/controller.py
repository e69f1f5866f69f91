"""The controller: maps records of a run to actions of the driver."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from selftune.control.final_weights import FinalWeights
from selftune.control.guard import Guard, GuardPolicy
from selftune.control.lr_sweep import LRSweep, SweepSettings
from selftune.control.records import (
    Action,
    Activity,
    Gradient,
    Hypergradient,
    Record,
    SweepSlope,
    TrainingLoss,
    ValidationLoss,
)  # fmt: skip
from selftune.hparams import Hparam

log = logging.getLogger("selftune")

PROOF, PROVEN = 10, 0.1
"""A sweep is confirmed by this many training losses without an alarm, or by a validation loss with
at most this relative increase."""
FADED = "units died after the learning rate had risen"
FAR = 0.01
"""Multiple of the given learning rate below which the sweep's choice is a warning."""
BAD_GRADIENTS = "gradients vanished or are not finite"


@dataclass(kw_only=True)
class Controller:
    """Manages the sweep, guard and final weights of a run.

    Args:
        hparams: The tuned hyperparameters.
        total_steps: Steps in the run, or None.
        sweep: The learning-rate sweep, or None.
        guard: The guard, or None.
        final: The selection of the final weights.
        label: Name of the optimizer in messages.

    Attributes:
        swept: Values set by the sweep.
        rewinds: Step, factor of the rate and reason of each rewind.
    """

    hparams: Mapping[str, Hparam]
    total_steps: int | None = None
    sweep: LRSweep | None = None
    guard: Guard | None = None
    final: FinalWeights = field(default_factory=FinalWeights)
    label: str = "selftune"
    swept: dict[str, float] = field(default_factory=dict)
    rewinds: list[tuple[int, float, str]] = field(default_factory=list)
    _skipped: bool = field(default=False, init=False)

    @property
    def sweeping(self) -> bool:
        """Whether the sweep is in progress."""
        return self.sweep is not None and not self.sweep.ended

    @property
    def standing(self) -> float:
        """The recent mean validation loss, which ranks members; infinite if unknown."""
        mean = math.inf if self.guard is None else self.guard.mean
        return mean if math.isfinite(mean) else math.inf

    def observe(self, record: Record) -> Action:
        """Return the action for a record of the run."""
        decide: Any = {
            SweepSlope: self._sweep,
            Gradient: self._gradient,
            Activity: self._activity,
            TrainingLoss: self._training_loss,
            ValidationLoss: self._validation_loss,
            Hypergradient: self._hypergradient,
        }[type(record)]
        sweeping = self.sweeping and decide in (self._sweep, self._gradient)
        return decide(record) if self.guard is not None or sweeping else Action()

    def _sweep(self, record: SweepSlope) -> Action:
        sweep = self._lr_sweep
        lowered = sweep.lowered
        lowest = sweep.observe(record.slope, record.start, record.gain)
        snapshot = "iterate" if lowest else ""
        moves: Mapping[str, float] | None = None
        if sweep.lowered != lowered:  # the sweep restarts
            snapshot, moves = "average", {}
        if sweep.ended:
            moves = {"lr": math.log(sweep.choice)} | self.calmed(record.values, self.hparams)
            self.swept = {n: self.hparams[n].moved(record.values[n], m) for n, m in moves.items()}
            log.info(
                "%s: sweep of %d steps, learning rate times %.3g",
                self.label, sweep.taken, sweep.choice,
            )  # fmt: skip
            if sweep.choice < FAR:
                log.warning(
                    "%s: the learning-rate sweep divides the given rate by %.3g. If that rate was "
                    "good, pass probe=False: a loss that does not measure progress, as that of a "
                    "policy gradient, misleads the sweep", self.label, 1 / sweep.choice,
                )  # fmt: skip
        return Action(snapshot=snapshot, rewind=moves)

    def calmed(
        self, values: Mapping[str, float], hparams: Mapping[str, Hparam]
    ) -> dict[str, float]:
        """Changes of the raw values of momenta that become active after a sweep.

        Args:
            values: Current values.
            hparams: Hyperparameters that become active; only tuned ones change.
        """
        if self.sweep is None:
            return {}
        settings, tuned = self.sweep.settings, hparams.keys() & self.hparams.keys()
        momenta = (hparams[n] for n in tuned if hparams[n].role == "momentum")
        averaging = [h.name for h in momenta if not h.accumulates]
        return {n: settings.calmed(values[n], self.total_steps) for n in averaging}

    def leave_sweep(self) -> Action:
        """Return to the start and the given rate, because something else sets the learning rate."""
        self._lr_sweep.leave()
        log.warning(
            "%s: a scheduler (such as OneCycleLR or ReduceLROnPlateau) or the training loop sets "
            "the learning rate in param_groups: the learning-rate sweep is skipped, and the run "
            "starts at the given rate. Pass probe=False to avoid this warning", self.label,
        )  # fmt: skip
        return Action(snapshot="average", rewind={})

    def _gradient(self, record: Gradient) -> Action:
        if not self.sweeping:
            action = self._judged(self._guard.gradient(record.finite), BAD_GRADIENTS)
            if action.skip and action.rewind is None and not self._skipped:
                self._skipped = True  # batches with NaN come back in every epoch: named once
                log.warning(
                    "%s: a training gradient is not finite; the step is skipped, as are later ones "
                    "without a message. Check the batch for NaN or infinite values", self.label,
                )  # fmt: skip
            if action.rewind is None and self._guard.skipped == self._guard.policy.patience:
                log.warning(
                    "%s: training gradients at the last good weights are not finite either, so the "
                    "learning rate is not the cause; steps are skipped until they are. Check "
                    "batches, loss and model for NaN or infinite values", self.label,
                )  # fmt: skip
            return action
        skip = not record.finite and self._lr_sweep.miss()
        if skip and self._lr_sweep.missed == 1:
            log.warning(
                "%s: a training gradient of the learning-rate sweep is not finite; the step is "
                "skipped. Check the batch for NaN or infinite values", self.label,
            )  # fmt: skip
        if skip and not self.sweeping:
            log.warning(
                "%s: %d training gradients in a row are not finite: the learning-rate sweep ends, "
                "and the run starts at the given rate", self.label, self._lr_sweep.missed,
            )  # fmt: skip
            return Action(skip=True, snapshot="average", rewind={})
        return Action(skip=skip)

    def _activity(self, record: Activity) -> Action:
        if self.sweeping:
            self._guard.units.begin(record.alive)
            return Action()
        verdict = self._guard.activity(record.alive, record.age, record.climb)
        if verdict != "fade":
            return self._judged(verdict, BAD_GRADIENTS)
        action = self._undone(self._rewind(FADED))
        moves = dict(action.rewind or {})
        moves["lr"] = max(moves["lr"], -record.climb)  # units were alive at the given rate
        return action._replace(rewind=moves)

    def _training_loss(self, record: TrainingLoss) -> Action:
        if self.sweeping:
            if math.isfinite(record.loss):  # otherwise gradients decide
                self._lr_sweep.alarmed = self._guard.sweeping_loss(record.loss)
            return Action()
        verdict = self._guard.training_loss(record.loss)
        action = self._judged(verdict, "the training loss exploded or is not finite")
        if action.rewind is not None:
            return self._undone(action)
        if self.unproven and self._guard.training.count > PROOF:
            self._lr_sweep.proven = not self._guard.units.faded
            if self._guard.lost or self._guard.units.faded:
                return action
            self._guard.units.spare()
            return action._replace(snapshot="average")
        return action

    @property
    def unproven(self) -> bool:
        """Whether the sweep is not confirmed yet; the good weights are then the initial ones."""
        return self.guard is not None and self.sweep is not None and not self.sweep.proven

    def _undone(self, action: Action) -> Action:
        """The action, which undoes an unconfirmed sweep."""
        if self.unproven:
            self._lr_sweep.proven = True
            action = action._replace(diverged=False)
        return action

    def _hypergradient(self, record: Hypergradient) -> Action:
        action = self._judged(
            self._guard.hypergradient(record.finite), "hypergradients are not finite"
        )
        # Sensitivities may have diverged while weights have not: at first, only restart.
        first = action.rewind is not None and self._guard.streak == 1
        return action._replace(rewind={}, diverged=False) if first else action

    def _validation_loss(self, record: ValidationLoss) -> Action:
        guard, loss, proof = self._guard, record.loss, False
        if self.unproven and not self.sweeping:
            if math.isfinite(loss) and loss > guard.start + PROVEN * abs(guard.start):
                return self._undone(self._rewind("the sweep increased the loss", worsened=True))
            self._lr_sweep.proven = math.isfinite(loss) and not guard.units.faded
            proof = loss <= guard.start and self._lr_sweep.proven
            if proof:
                guard.units.spare()
        verdict = guard.validation_loss(loss)
        # A few unlucky batches can look like a worsened loss or, after a lucky first one, an
        # exploded one.
        if verdict == "rewind" and (not math.isfinite(loss) or guard.confirms(*record.compare())):
            how = "exploded" if guard.exploded else "worsened"
            guard.worsened += not guard.exploded
            return self._rewind(
                f"the validation loss has {how}, to {loss:.4g}", worsened=not guard.exploded
            )
        kept = verdict if verdict in ("candidate", "promote", "average") else ""
        return Action(snapshot="average" if proof and kept in ("", "candidate") else kept)

    @property
    def _lr_sweep(self) -> LRSweep:
        assert self.sweep is not None
        return self.sweep

    @property
    def _guard(self) -> Guard:
        assert self.guard is not None
        return self.guard

    def restart(self) -> None:
        """Forget losses, because those of other weights are not comparable."""
        if self.guard is not None:
            good = replace(self.guard.good, losses=[], lowest=math.inf)
            self.guard = Guard(policy=self.guard.policy, good=good, rewinds=self.guard.rewinds)

    def units_closed(self) -> None:
        """Count live units anew, because closed ones are not dead."""
        if self.guard is not None:
            self.guard.units_closed()

    def _judged(self, verdict: str, reason: str) -> Action:
        if verdict == "rewind":
            return self._rewind(reason)
        return Action(skip=verdict == "skip")

    def _rewind(self, reason: str, *, worsened: bool = False) -> Action:
        """Divide the learning rate, and reduce momenta if the run diverged."""
        moves = {"lr": -self._guard.rewound(worsened=worsened)}
        if not worsened:
            momenta = [n for n, h in self.hparams.items() if h.role == "momentum" and h.accumulates]
            moves |= dict.fromkeys(momenta, self._guard.policy.momentum)
        return Action(skip=True, rewind=moves, reason=reason, diverged=True)

    def announce(self, action: Action, step: int) -> None:
        """Log a rewind: the first as a warning."""
        if not action.reason or self.guard is None or action.rewind is None:
            return
        factor = math.exp(action.rewind.get("lr", 0.0))
        self.rewinds.append((step, factor, action.reason))
        change = f"divided by {1 / factor:.3g}" if factor != 1 else "unchanged"
        if "lr" not in self.hparams:
            change = "unchanged, since it is not tuned"
        (log.warning if self.guard.rewinds == 1 else log.info)(
            "%s, step %d: %s; back to the last good weights, learning rate %s",
            self.label, step, action.reason, change,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The numbers to save."""
        parts = {"sweep": self.sweep, "guard": self.guard, "final": self.final}
        own = {"swept": dict(self.swept), "rewinds": [list(r) for r in self.rewinds]}
        return {n: None if p is None else p.state_dict() for n, p in parts.items()} | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``; ends the sweep if none is saved."""
        self.swept, self.rewinds = dict(state["swept"]), [tuple(r) for r in state["rewinds"]]
        if self.sweep is not None:
            if state["sweep"] is None:
                self.sweep.ended = True
            else:
                self.sweep.load_state_dict(state["sweep"])
        if self.guard is not None and state["guard"] is not None:
            self.guard.load_state_dict(state["guard"])
        self.final.load_state_dict(state["final"])


def make_guard(guard: Any) -> Guard | None:
    """Make the guard from ``guard=``: True, False or a policy."""
    if guard is False or guard is None:
        return None
    policy = GuardPolicy() if guard is True else guard
    begun: Guard = policy.begin()
    return begun


def make_sweep(
    probe: bool | int | SweepSettings, total_steps: int | None, tuned: Mapping[str, Hparam],
    warmup: int = 0,
) -> LRSweep | None:  # fmt: skip
    """Make the sweep from ``probe=``: True, False, a number of steps or settings.

    ``warmup`` is the number of steps of the warm-up, which goes on after the sweep.

    Raises:
        ValueError: The sweep is not shorter than the run.
    """
    if "lr" not in tuned or not probe:
        return None
    settings = probe if isinstance(probe, SweepSettings) else SweepSettings()
    steps = settings.steps(total_steps)
    if not isinstance(probe, SweepSettings) and probe is not True:
        steps = int(probe)
    if not steps:
        log.warning(
            "a run of %d steps is too short for the learning-rate sweep, which needs %d or more: "
            "the run starts at the given rate. Pass probe=False to avoid this warning",
            total_steps, settings.fewest,
        )  # fmt: skip
        return None
    if total_steps is not None and steps >= total_steps:
        raise ValueError(f"probe={steps} leaves no step in a run of {total_steps} steps")
    if 0 < warmup <= steps:
        log.warning(
            "warmup_steps=%d has no effect, because the learning-rate sweep takes the first %d "
            "steps at rates of its own: pass probe=False for a warm-up from the first step",
            warmup, steps,
        )  # fmt: skip
    return LRSweep(steps=steps, settings=settings)
