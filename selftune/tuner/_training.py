"""One run of a tuner: the loop, and what is decided between its steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from selftune.tuner import _checkpoints, _resuming
from selftune.tuner._checks import check_agreement
from selftune.tuner._compiled import Fused
from selftune.tuner._data import Stream
from selftune.tuner._group import Group
from selftune.tuner._interrupt import Interruption
from selftune.tuner._masks import masks_followed
from selftune.tuner._payoff import WATCHED, payoff
from selftune.tuner._pictures import picture
from selftune.tuner._plan import Plan, Progress
from selftune.tuner._population import Population
from selftune.tuner._predicting import Predictor
from selftune.tuner._randomness import restore, snapshot
from selftune.tuner._result import TuningResult, schedule_of
from selftune.tuner._saving import Parts
from selftune.tuner._scoring import POSITIONS, Scorer
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps
from selftune.tuner._sweep import sweep
from selftune.tuner._watch import Watch

log = logging.getLogger("selftune")


@dataclass(kw_only=True)
class Training:
    """The parts of one run and how they act on one another."""

    steps: Steps
    fused: Fused
    plan: Plan
    train: Stream
    val: Stream
    scorer: Scorer
    snapshots: Snapshots
    watch: Watch
    population: Population | None
    identity: dict[str, Any]
    folder: Path | None = None
    callbacks: Sequence[Any] = ()
    step: int = 0
    best: float = math.inf
    waited: int = 0
    ended: str = "finished"
    saved_best: dict[str, Any] | None = None
    interruption: Interruption = field(default_factory=Interruption)

    def __post_init__(self) -> None:
        """Nothing is under way yet."""
        self._clock: list[tuple[float, float]] = []
        self._within = False  # a step, so that its tensors may be half written
        self.group.asks = lambda: self.interruption.asked

    @property
    def group(self) -> Group:
        """The ranks that train together."""
        return self.steps.group

    # the loop

    def go(self) -> str:
        """Train to the end; returns why it ended."""
        ended = self.ended  # a run that was stopped is over
        with self.interruption.listening():
            try:
                if self.step == 0:
                    self._begin()
                while self.step < self.plan.total and ended == "finished":
                    self._step()
                    if self.plan.falls(self.plan.score, self.step):
                        ended = self.ended = self._stop(self._evaluate())
                    if self.plan.picture and self.plan.falls(self.plan.picture, self.step):
                        self._picture()
                    if ended == "stopped" or self.plan.falls(self.plan.save, self.step):
                        self.save()
                    if self._asked():
                        raise KeyboardInterrupt
            except (KeyboardInterrupt, RuntimeError) as error:
                # The same Ctrl-C ends a loader's workers, which then ends the loader.
                ended_loader = self.interruption.asked and not self.group.together
                if isinstance(error, RuntimeError) and not ended_loader:
                    raise
                ended = "interrupted"
                self._break_off()
        self.watch.digest(self.step)
        self.watch.metrics.monitor.flush()
        self.watch.bar.close()
        return ended

    def _asked(self) -> bool:
        """Whether Ctrl-C was pressed; with several ranks, on which all ranks agree.

        A GPU is waited for only at steps of the hyperparameters.
        """
        if not self.group.together:
            return self.interruption.asked
        on_gpu = self.fused.run.step.is_cuda and self.step % self.plan.every
        return not on_gpu and self.group.asked()

    def _picture(self) -> None:
        """Pictures for the log, which leave the run's random streams alone."""
        if self.watch.metrics.monitor.on:
            self.watch.digest(self.step)
            streams = snapshot()
            picture(self.watch, self.predictor, self.step)
            restore(streams)

    @property
    def predictor(self) -> Predictor:
        """Reads losses at other hyperparameters off the run."""
        return Predictor(steps=self.steps, fused=self.fused, scorer=self.scorer, val=self.val)

    def _break_off(self) -> None:
        if self._within:
            log.warning("interrupted inside step %d: the checkpoint before it stays", self.step + 1)
            return
        log.warning("interrupted after step %d: saving and ending", self.step)
        self.save()

    def _begin(self) -> None:
        """The sweep, and the first note of the hyperparameters."""
        controller = self.watch.controllers[0]
        if controller.sweeping:
            run, batch = self.fused.run, self.train.next
            self.step = sweep(self.steps, run, self.snapshots, controller, batch)
            self.watch.history.train_loss += [math.nan] * self.step
        self.watch.begin(self.step)

    def _step(self) -> None:
        self._decide()
        step = self.step + 1
        tracked, tune = self.steps.observed(step - self._since)
        batch = self.train.next()
        try:
            outer = self.val.next() if tune else None
        except BaseException:
            self.train.put_back(batch)
            raise
        with self._stepping(tune=tune):
            told = self.fused.train(batch, tracked=tracked, last=tune)
            self.watch.trained(step, told)
            if tune and not told.is_cuda:
                self.watch.digest(step)
                tune = self.watch.since < step  # or the guard took the run back
            whole = self.fused.whole
            if whole is not None and whole.whole.memory is None:
                tune = False  # no step was seen yet
            if tune:
                self.watch.tuned(step, self.fused.tune(outer))
        self.watch.read(step)
        if self.population is not None and tune and step % self.plan.exploit < self.plan.every:
            self.population.exploit(self.snapshots, self.watch.controllers, self.steps.hyper)

    @property
    def _since(self) -> int:
        """Steps at the last fresh start; members of a population keep one time."""
        return 0 if self.population is not None else self.watch.since

    @contextmanager
    def _stepping(self, tune: bool = False) -> Iterator[None]:
        """A step is taken whole, or it is known that it was not; and timed."""
        self._within, begun = True, time.perf_counter()
        yield
        self.step += 1
        self._within = False
        self.watch.log.clocked(time.perf_counter() - begun, tune)

    def _decide(self) -> None:
        """Compile if asked to, or if the first eager steps say that it will pay."""
        if self.plan.compile is False or self.fused.compiled:
            return
        if self.plan.compile is True:
            self.plan.compile = False  # decided: what cannot be compiled is not tried again
            self.fused.compile()
            return
        self._clock.append((time.perf_counter(), time.process_time()))
        if len(self._clock) == WATCHED + 1:
            left, tensors = self.plan.total - self.step, len(self.steps.params)
            pays, saved = payoff(self._clock[0], self._clock[-1], left, tensors)
            if self.group.from_first(lambda: pays):
                if self.group.together:
                    self.save()  # torchrun kills ranks that compile for 30 s after Ctrl-C
                self.fused.compile()
            else:
                self.plan.compile = False
                log.info("not compiled: it would save about %.0f s", saved)

    # evaluation

    def _evaluate(self) -> Progress:
        self.watch.digest(self.step)
        check_agreement(self.fused.run, self.group)
        metrics, leader = self.watch.metrics, self.watch.leader
        monitor = metrics.monitor
        scores, last = self.scorer.score(self.fused.run, self.val, leader, last=monitor.on)
        history = self.watch.history
        history.score(self.step, scores)
        monitor.scalars([(f"score/{n}", v) for n, v in scores.items()], self.step)
        if monitor.on:
            metrics.compared(scores["loss"], last, self.step)
            metrics.verdict_rows(self.watch.verdicts(), self.step)
        recent = [x for x in history.train_loss[-self.plan.score :] if math.isfinite(x)]
        if scores["loss"] < self.best:
            self.best, self.waited = scores["loss"], 0
            self._save_best()
        else:
            self.waited += 1
            if not math.isfinite(scores["loss"]):
                log.warning("step %d: the validation loss is %s", self.step, scores["loss"])
        return Progress(
            step=self.step,
            total=self.plan.total,
            epoch=self.train.epoch,
            train_loss=sum(recent) / len(recent) if recent else math.nan,
            scores=scores,
            hparams=self.watch.hparams(),
        )

    def _stop(self, progress: Progress) -> str:
        """``"stopped"`` if patience is over or a callback asks for it."""
        stop = self.plan.patience is not None and self.waited >= self.plan.patience
        if self.callbacks:
            parts = self.steps, self.scorer, self.snapshots, self.watch.leader
            with masks_followed(*parts) as closed:
                stop |= any([bool(call(progress)) for call in self.callbacks])
            if closed:  # losses of another size are no yardstick
                self.best, self.saved_best, self.waited = math.inf, None, 0
                self.watch.controllers[0].restart()
            self.group.share_streams()  # from which callbacks may have drawn
        return "stopped" if self.group.any(stop) else "finished"

    def finish(self, ended: str) -> TuningResult:
        """Leave the best weights in the model and sum the run up."""
        saved = self.group.from_first(self._read_best)
        guarded = self.watch.controllers[0].guard is not None
        good = self.snapshots if guarded else None
        positions = POSITIONS if self.steps.method.settings.final_weights else (0.0,)
        best = self.scorer.best(self.fused.run, self.val, self.watch.leader, good, saved, positions)
        if self._writes is not None and best < self.best:
            _checkpoints.write(self._writes / _checkpoints.BEST, self._shown_state(best))
        self.steps.release()
        history, known = self.watch.history, self.watch.hparams()
        verdicts = self.watch.verdicts()
        why = self.watch.why(self.steps.starts, self.identity["schedule"], verdicts)
        log.info("%s", why)
        self.watch.metrics.finish(known, verdicts, self.step, why)
        self.watch.metrics.monitor.last([("final/loss", best)], self.step)
        return TuningResult(
            history=history.arrays(),
            best_weights={
                k: v.clone() if isinstance(v, torch.Tensor) else v
                for k, v in self.scorer.model.state_dict().items()
            },
            best_loss=best,
            hparams=known,
            schedule=schedule_of(history, self.steps, known, self.step),
            steps=self.step,
            ended=ended,
            verdicts=verdicts,
            why=why,
            folder=self._writes,
        )

    def _read_best(self) -> dict[str, Any] | None:
        """The best weights that were saved, from memory or from disk."""
        if self.saved_best is not None or self.folder is None or self.best == math.inf:
            return self.saved_best
        return _checkpoints.read_best(self.folder)

    # saving

    @property
    def _writes(self) -> Path | None:
        """The folder, on the rank that writes to it."""
        return self.folder if self.group.first else None

    @property
    def _parts(self) -> Parts:
        return Parts(
            steps=self.steps, fused=self.fused, train=self.train, val=self.val,
            snapshots=self.snapshots, watch=self.watch,
            population=self.population, identity=self.identity,
        )  # fmt: skip

    def save(self) -> None:
        """Write the whole run."""
        if self.folder is None:
            return
        self.watch.digest(self.step)
        self.watch.metrics.monitor.flush()  # a run that is killed goes on behind these rows
        own = {
            "ended": self.ended,
            "numbers": [self.step, self.best, self.waited],
            "starts": self.steps.starts,
            "rates": self.steps.rates.clone(),
            "compile": True if self.fused.compiled else self.plan.compile,
        }
        state = {**self._parts.pack(), **own}
        if self._writes is not None:
            _checkpoints.write(self._writes / _checkpoints.LAST, state)

    def load(self, state: dict[str, Any], best: dict[str, Any] | None) -> None:
        """Continue a saved run; a checkpoint of another one is refused before anything changes.

        Args:
            state: What ``save`` wrote.
            best: What was saved beside it as the best weights.
        """
        longer = _resuming.extends(state, self.identity)
        self._parts.unpack(state, _resuming.FOLLOWS if longer else ())
        self.saved_best, self.ended = best, state["ended"]
        self.step, self.best, self.waited = state["numbers"]
        self.plan.compile = state["compile"]
        self.watch.bar.update(self.step)
        rates = self.steps.rates  # of a run that was made longer: as they were until then
        rates[: len(state["rates"])].copy_(state["rates"])
        _resuming.name_changes(state, self.steps.starts, self.watch.hparams())
        _resuming.announce(state, self.plan.total, longer=longer)
        if longer:
            _resuming.extend(self.watch, self.snapshots, self.step)

    def _save_best(self) -> None:
        """Keep the best weights: on disk, or in memory where there is none or it is full."""
        if not self.group.first:
            return
        with self.scorer.shown(self.fused.run, self.watch.leader):
            state = self._shown_state(self.best)
        written = self._writes and _checkpoints.write(self._writes / _checkpoints.BEST, state)
        self.saved_best = None if written else state

    def _shown_state(self, loss: float) -> dict[str, Any]:
        """The weights that the model shows, of a known loss."""
        known = {"step": self.step, "loss": loss, "hparams": self.watch.hparams()}
        return {**self.scorer.state(), **known}
