"""One run of a tuner: the loop, and the decisions between its steps."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from selftune.monitor import verdict_rows
from selftune.tuner import _checkpoints, _choice, _final_weights, _joining, _resuming, _saving
from selftune.tuner._callbacks import stop
from selftune.tuner._checks import check_agreement
from selftune.tuner._group import RankLost
from selftune.tuner._interrupt import Interruption
from selftune.tuner._noise_scale import EVERY
from selftune.tuner._parts import Parts
from selftune.tuner._payoff import Compiling
from selftune.tuner._predicting import picture, predicted
from selftune.tuner._result import TuningResult, schedule_of
from selftune.tuner._resuming import HYPER, SCORES, WEIGHTS
from selftune.tuner._sweep import sweep

log = logging.getLogger("selftune")


@dataclass(kw_only=True)
class Training(Parts):
    """The loop of one run."""

    def __post_init__(self) -> None:
        self.due = WEIGHTS  # the part of a step at which the run continues
        self.interruption = Interruption(terminating=self.group.together)
        self._compiling = Compiling(self.plan, self.fused, self.group, self.save)
        self._within = False  # inside a step, when tensors may be half written
        self._position: dict[str, Any] = {}
        self.group.asks = lambda: self.interruption.asked

    # the loop

    def go(self) -> str:
        """Train to the end; returns why it ended."""
        ended = self.ended  # a run that was stopped is over
        with self.interruption.listening():
            try:
                if self.step == 0:
                    self._begin()
                elif self.longer:
                    _resuming.extend(self.watch, self.snapshots, self.step)
                    self.save()  # else an extension that is killed logs its beginning again
                self._reach(self.due)
                while (self.step < self.plan.total or self.due == SCORES) and ended == "finished":
                    if self.due != SCORES:
                        self._step()
                    if self.plan.falls(self.plan.score, self.step):
                        self._reach(SCORES)
                        scores = self._scores()
                        self._reach(WEIGHTS)
                        ended = self.ended = stop(self, scores)
                        self._reach(WEIGHTS)
                    if self.plan.pictured(self.step) and not self.joined:
                        picture(self)
                        self._reach(WEIGHTS)
                    if ended == "stopped" or self.plan.falls(self.plan.save, self.step):
                        self.save()
                    if self._asked():
                        raise KeyboardInterrupt
            except RankLost:
                if self._position and not self.group.sharded:  # the sweep is over
                    _checkpoints.rescue(self.folder, self.group.first, self.save)
                raise
            except (KeyboardInterrupt, RuntimeError) as error:
                # Ctrl-C also ends a loader's workers, and then the loader raises an error.
                ended_loader = self.interruption.asked and not self.group.together
                half = self._within and self.group.together  # others wait for this rank
                if half or (isinstance(error, RuntimeError) and not ended_loader):
                    raise
                if self.step == self.watch.since and not self.watch.history.rewinds:
                    raise  # a second Ctrl-C, before the first step after the sweep
                ended = "interrupted"
                self._break_off()
        self.watch.close(self.step)
        return ended

    def _reach(self, due: str) -> None:
        """Start a part of a step; if another rank is lost during it, the run resumes there."""
        self.due, self._position = due, self._now()

    def _now(self) -> dict[str, Any]:
        return _saving.position(self) if self.group.together else {}

    def _asked(self) -> bool:
        """Whether Ctrl-C was pressed on any rank.

        Synchronises with a GPU only at hyperparameter steps.
        """
        if not self.group.together:
            return self.interruption.asked
        on_gpu = self.fused.run.step.is_cuda and self.step % self.plan.every
        return not on_gpu and self.group.asked()

    def _break_off(self) -> None:
        if self._within or (self.group.sharded and not self.group.asked()):  # on this rank alone
            log.warning("interrupted within step %d: the last checkpoint is kept", self.step + 1)
            return
        log.warning("interrupted after step %d: saving and ending", self.step)
        self.save()

    def _begin(self) -> None:
        """Run the sweep, and record the initial hyperparameters."""
        if self.plan.picture is not None and not predicted(self):
            log.warning(
                "pictures_every=%d draws nothing: the response of the weights is learned only for "
                "the strengths of st.nn, or with estimator=st.BestResponse(update=True)",
                self.plan.picture,
            )
        controller = self.watch.controllers[0]
        if controller.sweeping:
            self._within = True
            self.step = sweep(self.steps, self.snapshots, controller, self.train.next)
            self._within = False
            self.watch.history.train_loss += [math.nan] * self.step
        self.watch.begin(self.step)

    def _step(self) -> None:
        step, tracked, tune, batch = self.step + 1, False, True, None
        if self.due == WEIGHTS:
            self._compiling.decide(self.step, len(self.steps.params))
            batch, self._within = self.train.next(), True
            _choice.choose(self, batch)
            self._within = False
            age = step - (0 if self.population is not None else self.watch.since)
            stride = self.steps.method.sensitivities.estimator.stride
            tracked, tune = age % stride == 0, age % self.steps.every == 0  # for all members
        between = self._now() if tune else {}
        try:
            outer = self.val.next() if tune and not self.joined else None
        except BaseException:
            if self.due == WEIGHTS:
                self.train.put_back(batch)
            raise
        follows, tune = tune and self.joined, tune and not self.joined
        self._within, begun, kind = True, time.perf_counter(), tune
        if self.due == WEIGHTS:
            tune = self._step_weights(step, batch, tracked, tune)
        if tune:
            if between:  # the step may have measured the noise scale
                between["train"] = self.train.state_dict()
            self.due, self._position = HYPER, between
            self.watch.tuned(step, self.fused.tune(outer))
        self.step, self._within = step, False
        self.watch.log.clocked(time.perf_counter() - begun, kind)
        self._reach(WEIGHTS)
        self.watch.read(step)
        if follows:
            _joining.follow(self, batch)
        if self.population is not None and tune and step % self.plan.exploit < self.plan.every:
            self.population.exploit(self.snapshots, self.watch, self.steps.hyper)

    def _step_weights(self, step: int, batch: Any, tracked: bool, tune: bool) -> bool:
        """Take a weight step; return whether a hyperparameter step follows."""
        halved = self.steps.halved
        measured = halved is not None and halved.prepare(step, self.train.drawn)
        record = self.fused.train(batch, tracked=tracked, last=tune, step=self.step)
        self.watch.trained(step, record)
        if halved is not None and measured and step % self.plan.log < EVERY:
            self.watch.metrics.monitor.scalars(halved.batches.entries, step)
        if tune and not record.is_cuda:
            self.watch.digest(step)
            tune = self.watch.since < step  # unless the guard rewound the run
        whole = self.fused.whole
        if whole is not None and whole.estimates.memory is None:
            tune = False  # no step was seen yet
        return tune

    # evaluation

    def _scores(self) -> dict[str, float]:
        """Scores over the validation set; after the join, those at the join."""
        if self.joining is not None and self.joined:
            return self.joining.scores
        scores = self._evaluate()
        if self.joining is not None and self.step >= self.joining.step:
            _joining.join(self, scores)
        return scores

    def _evaluate(self) -> dict[str, float]:
        """Evaluate losses and metrics over the whole validation set, and log them."""
        self.watch.digest(self.step)
        check_agreement(self.steps, self.fused.run)
        metrics, leader = self.watch.metrics, self.watch.leader
        points = [self.scorer.at(p) for p in ((0, 1) if metrics.monitor.on else (0,))]
        scores, *last = self.scorer.score(points, self.val, leader)
        better = scores["loss"] < self.best
        if better:
            _final_weights.save_best(self, scores)
            self.group.any(False)  # the first rank has written them, or was lost before
        self.best, self.waited = (scores["loss"], 0) if better else (self.best, self.waited + 1)
        if not math.isfinite(scores["loss"]):
            log.warning("step %d: the validation loss is %s", self.step, scores["loss"])
        self.watch.history.score(self.step, scores)
        metrics.monitor.scalars(_tagged(scores), self.step)
        if last:
            metrics.compared(scores["loss"], last[0]["loss"], self.step)
            metrics.monitor.scalars(verdict_rows(self.watch.verdicts()), self.step)
        return scores

    def finish(self, ended: str) -> TuningResult:
        scores = _final_weights.place(self)
        if self.folder is not None and (self.joined or scores["loss"] < self.best):
            _final_weights.write_best(self, scores, resumable=ended == "interrupted")
        self.steps.release()
        history, known = self.watch.history, self.watch.hparams()
        verdicts = self.watch.verdicts()
        why = self.watch.why(self.steps.starts, self.identity["schedule"], verdicts)
        log.info("%s", why)
        self.watch.metrics.finish(known, verdicts, self.step, why)
        if not self.joined:
            self.watch.metrics.monitor.last(_tagged(scores), self.step)
        return TuningResult(
            history=history.arrays(),
            best_weights=self.steps.shards.weights_of(self.scorer.model),
            best_loss=scores["loss"],
            best_scores=scores,
            hparams=known,
            schedule=schedule_of(history, self.steps, known, self.step),
            steps=self.step, ended=ended, verdicts=verdicts, why=why, folder=self.writes,
            rule=_choice.optimizer_of(self.steps, known),
            joined=None if self.joining is None else self.joining.joined,
        )  # fmt: skip

    # saving

    def save(self, everywhere: bool = False) -> None:
        """Write a checkpoint on the first rank, or ``everywhere`` if the first may have died."""
        if self.folder is None:
            return
        self.watch.digest(self.step)
        self.watch.metrics.monitor.flush()  # a killed run resumes after these rows
        own = {
            "ended": self.ended,
            "due": self.due,
            "numbers": [self.step, self.best, self.waited],
            "joining": None if self.joining is None else self.joining.state_dict(),
            "starts": self.steps.starts,
            "rates": self.steps.rates.clone(),
            "carried": sorted(self.steps.carried),
            "changes": self.steps.inner.changes,
            "compile": True if self.fused.compiled else self.plan.compile,
        }
        state = {**_saving.pack(self), **self._position, **own}
        suffix = f".{self.group.rank}.partial" if everywhere else ".partial"
        if everywhere or self.group.first:
            _checkpoints.write(self.folder / _checkpoints.LAST, state, suffix)

    def load(self, state: dict[str, Any], best: dict[str, Any] | None) -> None:
        """Continue a saved run; a checkpoint of another run raises an error, without changes."""
        longer = _resuming.extends(state, self.identity)
        if self.joining is not None and state.get("joining") is not None:
            self.joining.load_state_dict(state["joining"])
            self.joining.back &= not longer  # an extension restarts from the average
            self.train = self.joining.batches if self.joined else self.train
        _saving.check(self, state, _resuming.FOLLOWS if longer else ())
        if best is not None and self.joining is None and self.val.sized:
            _resuming.check_data(self.scorer, self.val, best)  # before streams are set
        _saving.unpack(self, state)
        self.step, self.best, self.waited = state["numbers"]
        if longer and best is not None:  # the end of the finished run was judged after its saving
            self.best = min(self.best, best["loss"])
        self.saved_best = best if self.best < math.inf and self.group.first else None
        self.ended, self.due = state["ended"], state["due"]
        if self.plan.compile == "auto":
            self.plan.compile = state["compile"]
        bar = self.watch.bar
        bar.initial = bar.n = bar.last_print_n = self.step  # not steps of this process
        rates = self.steps.rates  # an extended run keeps its earlier rates
        rates[: len(state["rates"])].copy_(state["rates"])
        _resuming.name_changes(state, self.steps.starts, self.watch.hparams())
        self.steps.start.update(state["starts"])
        _resuming.announce(state, self.plan.total, longer=longer)
        self.longer = longer


def _tagged(scores: dict[str, float]) -> list[tuple[str, float]]:
    """Scores with their tags in the log."""
    return [("Loss/final" if n == "loss" else f"score/{n}", v) for n, v in scores.items()]
