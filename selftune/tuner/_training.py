"""One run of a tuner: the loop, and what is decided between its steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from selftune.bilevel import Bilevel, Run
from selftune.fused import Fused
from selftune.guard import Guard
from selftune.monitor import Monitor, hyper_rows
from selftune.probe import Probe
from selftune.replay import TunedSchedule
from selftune.tuner import _checkpoints
from selftune.tuner._data import Stream
from selftune.tuner._good import Good
from selftune.tuner._interrupt import Interruption
from selftune.tuner._population import Population
from selftune.tuner._probing import sweep
from selftune.tuner._randomness import restore, snapshot
from selftune.tuner._result import History, TuningResult
from selftune.tuner._scoring import Scorer
from selftune.tuning import MOMENTA

log = logging.getLogger("selftune")

YOUNG = 200  # steps in which a network may be found dead
LOOK = 0.2  # seconds between two looks at the progress bar's text


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What callbacks are told after each evaluation.

    Attributes:
        step: Training steps taken.
        total: Steps in the whole run.
        epoch: Epochs begun before.
        train_loss: Mean training loss since the last evaluation.
        scores: ``loss`` and other metrics over the whole validation set, at the average.
        hparams: Present hyperparameters.
    """

    step: int
    total: int
    epoch: int
    train_loss: float
    scores: dict[str, float]
    hparams: dict[str, float]


@dataclass(kw_only=True)
class Plan:
    """How long a run lasts and how often what happens, in steps."""

    total: int
    every: int
    score: int
    save: int
    log: int
    patience: int | None
    compile: bool | str
    exploit: int


@dataclass(kw_only=True)
class Training:
    """The parts of one run and how they act on one another."""

    bilevel: Bilevel
    fused: Fused
    plan: Plan
    train: Stream
    val: Stream
    scorer: Scorer
    good: Good
    guards: list[Guard]
    guarded: bool
    probe: Probe | None
    population: Population | None
    monitor: Monitor
    folder: Path | None
    identity: dict[str, Any]
    callbacks: Sequence[Any]
    bar: tqdm[Any]
    history: History = field(default_factory=History)
    step: int = 0
    since: int = 0
    best: float = math.inf
    waited: int = 0
    interruption: Interruption = field(default_factory=Interruption)

    def __post_init__(self) -> None:
        """Nothing is waiting yet."""
        self._losses: list[Tensor] = []
        self._told: list[tuple[int, Tensor]] = []
        self._clock: list[float] = []
        self._looked = 0.0
        self._leader = 0
        self._saved_best: dict[str, Any] | None = None

    @property
    def run(self) -> Run:
        """The run's tensors."""
        return self.fused.run

    # the loop

    def go(self) -> str:
        """Train to the end; returns why it ended."""
        ended = "finished"
        with self.interruption.listening():
            try:
                if self.step == 0:
                    self._begin()
                while self.step < self.plan.total and ended == "finished":
                    self._step()
                    if self.step % self.plan.score == 0 or self.step == self.plan.total:
                        ended = self._stop(self._evaluate())
                    if self.step % self.plan.save == 0 or self.step == self.plan.total:
                        self.save()
                    if self.interruption.asked:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                log.warning("interrupted at step %d: saving and ending", self.step)
                self.digest()
                self.save()
                ended = "interrupted"
        self.digest()
        self.monitor.flush()
        self.bar.close()
        return ended

    def _begin(self) -> None:
        """The probe, and the first look at the validation loss."""
        if self.probe is not None:
            sweep(self.bilevel, self.run, self.good, self.probe, self.train.next)
            self.step = self.since = self.probe.taken
            self.history.train_loss += [math.nan] * self.step
            self.bar.update(self.step)
        self._note(math.nan)

    def _step(self) -> None:
        self._decide()
        batch = self.train.next()
        self.step += 1
        if (self.step - self.since) % self.plan.every:
            self._losses.append(self._kept(self.fused.train(batch)))
            return
        told = self.fused.tune(batch, self.val.next())
        self._told.append((self.step, self._kept(told)))
        # A GPU is not waited for at every hyperparameter step, only when something is to be told.
        if not told.is_cuda or self.step % self.plan.log < self.plan.every:
            self.digest()
        if self.population is not None and self.step % self.plan.exploit < self.plan.every:
            self.population.exploit(self.good, self.guards, self.bilevel.hyper)

    @staticmethod
    def _kept(told: Tensor) -> Tensor:
        """What a step returned; a CUDA graph writes over it at the next."""
        return told.clone() if told.is_cuda else told

    def _decide(self) -> None:
        """Compile if asked to, or if the first eager steps say that it will pay."""
        if self.plan.compile is False or self.fused.compiled:
            return
        if self.plan.compile is True:
            self.fused.compile()
            return
        self._clock.append(time.perf_counter())
        if len(self._clock) == WATCHED + 1:
            taken = (self._clock[-1] - self._clock[0]) / WATCHED
            saved = taken * (1 - GAIN) * (self.plan.total - self.step)
            if saved > REPAID:
                self.fused.compile()
            else:
                self.plan.compile = False
                log.info("not compiled: it would save about %.0f s", saved)

    # between steps

    def digest(self) -> None:
        """Read what steps told since last time, and act on it."""
        losses, self._losses = self._losses, []
        told, self._told = self._told, []
        rows = torch.stack([t for _, t in told]).tolist() if told else []
        if self.population is None:
            rows = [[row] for row in rows]
        plain = torch.stack(losses).tolist() if losses else []
        self._take_in(plain, [(step, row) for (step, _), row in zip(told, rows, strict=True)])

    def _take_in(self, losses: list[Any], told: list[tuple[int, list[list[float]]]]) -> None:
        first = self.history.train_loss
        start = len(first)
        first += losses if self.population is None else [min(row) for row in losses]
        for step, rows in told:
            lead = min(range(len(rows)), key=lambda m: self._standing(m))
            self._leader = lead
            loss, outer, _, *values = rows[lead]
            first.insert(step - 1, loss)
            named = dict(zip(self.bilevel.hyper.names, values, strict=True))
            self.history.hyper(step, outer, named)
            self._show(step, loss, outer, named)
        self.bar.update(self.step - self.bar.n)
        if not self.guarded:
            return
        for loss in first[start:] if self.population is None else []:
            if self.guards[0].training_loss(loss) == "rollback":
                self._roll_back(0, "the training loss exploded or is not finite", worsened=False)
                return
        for step, rows in told:
            for member, row in enumerate(rows):
                self._judge(member, step, row[1], row[2])

    def _standing(self, member: int) -> float:
        """A member's recent validation loss, for ranking."""
        mean = self.guards[member].mean
        return mean if math.isfinite(mean) else math.inf

    def _judge(self, member: int, step: int, outer: float, alive: float) -> None:
        guard = self.guards[member]
        if step - self.since <= YOUNG and guard.pulse(alive) == "rollback":
            self._roll_back(member, "gradients vanished", worsened=False)
            return
        verdict = guard.loss(outer)
        if verdict == "best":
            self.good.keep(member)
        elif verdict == "rollback":
            what = "exploded" if guard.exploded else "worsened"
            why = f"the validation loss has {what}, to {outer:.4g}"
            self._roll_back(member, why, worsened=not guard.exploded)

    @torch.no_grad()
    def _roll_back(self, member: int, why: str, *, worsened: bool) -> None:
        """Return to the last good weights with a lower rate, as the optimizers' engine does."""
        guard, hyper = self.guards[member], self.bilevel.hyper
        cool = guard.rolled_back(worsened=worsened)
        self.good.rewind(member)
        raw = self.good.part(self.run.hyper.raw, member)
        state = hyper.move(self.run.hyper._replace(raw=raw), "lr", -cool)
        for name in () if worsened else MOMENTA:
            state = hyper.move(state, name, -0.7)  # memory 1/(1 − μ) about halves
        raw.copy_(state.raw)
        if self.population is None:
            self.since = self.step
        (log.warning if guard.rollbacks == 1 else log.info)(
            "selftune, step %d: %s; back to the last good weights, learning rate divided by %.3g",
            self.step, why, math.exp(cool),
        )  # fmt: skip
        self.history.rollbacks.append(self.step)
        self._note(math.nan)

    def _note(self, loss: float) -> None:
        """Note hyperparameters that something else than a hyperparameter step has set."""
        raw = self.good.part(self.run.hyper.raw, self._leader)
        values = {n: float(v) for n, v in self.bilevel.hyper.values(raw).items()}
        self.history.hyper(self.step, loss, values)

    def hparams(self) -> dict[str, float]:
        """All hyperparameters as they are now; the learning rate is the tuned peak."""
        raw = self.good.part(self.run.hyper.raw, self._leader)
        tuned = {n: float(v) for n, v in self.bilevel.hyper.values(raw).items()}
        known = self.bilevel.update.hparams
        return {n: tuned.get(n, self.bilevel.options.get(n, 0.0)) for n in known}

    def _show(self, step: int, loss: float, outer: float, values: dict[str, float]) -> None:
        """The log and the progress bar, no more often than they are looked at."""
        if self.monitor.on and step % self.plan.log < self.plan.every:
            state = self.run.hyper
            part = [self.good.part(t, self._leader).cpu() for t in (state.mean, state.square)]
            signals = {
                n: (part[0][i : i + 1], (part[0][i : i + 1].abs() / part[1][i : i + 1].sqrt()))
                for i, n in enumerate(values)
            }
            self.monitor.scalar("train/loss", loss, step)
            self.monitor.scalars(hyper_rows(outer, values, signals), step)
        now = time.monotonic()
        if now - self._looked > LOOK:
            self._looked = now
            shown = {n: f"{v:.2g}" for n, v in values.items()}
            self.bar.set_postfix(loss=f"{loss:.3f}", val=f"{outer:.3f}", **shown, refresh=False)

    # evaluation

    def _evaluate(self) -> Progress:
        self.digest()
        scores = self.scorer.score(self.run, self.val, self._leader)
        self.history.score(self.step, scores)
        self.monitor.scalars([(f"score/{n}", v) for n, v in scores.items()], self.step)
        recent = [x for x in self.history.train_loss[-self.plan.score :] if math.isfinite(x)]
        progress = Progress(
            step=self.step, total=self.plan.total, epoch=self.train.epoch,
            train_loss=sum(recent) / len(recent) if recent else math.nan,
            scores=scores, hparams=self.hparams(),
        )  # fmt: skip
        if scores["loss"] < self.best:
            self.best, self.waited = scores["loss"], 0
            self.good.keep(self._leader)
            self._save_best()
        else:
            self.waited += 1
        return progress

    def _stop(self, progress: Progress) -> str:
        """``"stopped"`` if patience is over or a callback asks for it."""
        stop = self.plan.patience is not None and self.waited > self.plan.patience
        if self.callbacks:
            with self.scorer.shown(self.run, self._leader):
                stop |= any([bool(call(progress)) for call in self.callbacks])
        return "stopped" if stop else "finished"

    def finish(self, ended: str) -> TuningResult:
        """Leave the best weights in the model and sum the run up."""
        saved = self._saved_best
        if saved is None and self.folder is not None and (self.folder / _checkpoints.BEST).exists():
            saved = _checkpoints.read(self.folder / _checkpoints.BEST)
        best = self.scorer.best(self.run, self.val, self._leader, self.good, saved)
        known = self.hparams()
        return TuningResult(
            history=self.history.arrays(),
            best_weights={k: v.clone() for k, v in self.scorer.model.state_dict().items()},
            best_loss=best,
            hparams=known,
            schedule=self.schedule(known),
            steps=self.step,
            ended=ended,
        )

    def schedule(self, known: dict[str, float]) -> TunedSchedule:
        """What every hyperparameter was after the probe, the rate with its schedule and decay."""
        start = self.history.hyper_step[0] if self.history.hyper_step else 0
        changes = {n: dict(zip(self.history.hyper_step, v, strict=True))
                   for n, v in self.history.hparams.items()}  # fmt: skip
        rates = self.bilevel.rates.tolist()
        values: dict[str, list[list[float]]] = {n: [] for n in known}
        present = dict(known) | {n: v[0] for n, v in self.history.hparams.items()}
        for step in range(start, self.step):
            present |= {n: c[step] for n, c in changes.items() if step in c}
            acted = present["lr"] * rates[min(step, len(rates) - 1)]
            for name, value in {**present, "lr": acted / (1 + present["decay"] * step)}.items():
                if not values[name] or values[name][-1][1] != value:
                    values[name].append([step - start, value])
        for name in [n for n, v in values.items() if n == "decay" or v == [[0, 0.0]]]:
            del values[name]
        rule = type(self.bilevel.update.rule).__name__
        return TunedSchedule(rule=rule, steps=self.step - start, values=values)

    # saving

    def save(self) -> None:
        """Write the whole run."""
        if self.folder is None:
            return
        self.digest()
        state = {
            "identity": self.identity,
            "leaves": [t.detach().clone() for t in tree_leaves(self.run)],
            "good": self.good.state_dict(),
            "guards": [g.state_dict() for g in self.guards],
            "train": self.train.state_dict(),
            "val": self.val.state_dict(),
            "history": dict(vars(self.history)),
            "numbers": [self.step, self.since, self.best, self.waited, self._leader],
            "population": None if self.population is None else self.population.state_dict(),
            "compile": True if self.fused.compiled else self.plan.compile,
            "random": snapshot(),
        }
        _checkpoints.write(self.folder / _checkpoints.LAST, state)

    def _save_best(self) -> None:
        """Keep the best weights: on disk, or in memory where there is none or it is full."""
        with self.scorer.shown(self.run, self._leader):
            state = {
                "model": {k: v.cpu().clone() for k, v in self.scorer.model.state_dict().items()},
                "step": self.step,
                "loss": self.best,
                "hparams": self.hparams(),
            }
        folder = self.folder
        written = folder is not None and _checkpoints.write(folder / _checkpoints.BEST, state)
        self._saved_best = None if written else state

    @torch.no_grad()
    def load(self, state: dict[str, Any], best: dict[str, Any] | None) -> None:
        """Continue a saved run; a checkpoint of another one is refused before anything changes.

        Args:
            state: What ``save`` wrote.
            best: What was saved beside it as the best weights.
        """
        for key, value in self.identity.items():
            found = state["identity"].get(key)
            if found != value:
                raise ValueError(
                    f"resume: the checkpoint's {key} is {found}, this run's is {value}: resume "
                    "with the same model and settings, or start anew in another log_dir"
                )
        for leaf, saved in zip(tree_leaves(self.run), state["leaves"], strict=True):
            leaf.copy_(saved)
        for name in ("weights", "buffers"):
            for leaf, saved in zip(getattr(self.good, name), state["good"][name], strict=True):
                leaf.copy_(saved)
        for guard, saved in zip(self.guards, state["guards"], strict=True):
            guard.load_state_dict(saved)
        self._saved_best = best
        self.history = History(**state["history"])
        self.step, self.since, self.best, self.waited, self._leader = state["numbers"]
        self.plan.compile = state["compile"]
        if self.population is not None:
            self.population.load_state_dict(state["population"])
        self.train.load_state_dict(state["train"])
        self.val.load_state_dict(state["val"])
        restore(state["random"])
        self.bar.update(self.step)


WATCHED = 20
"""Eager steps that are timed before it is decided whether to compile."""
GAIN = 0.7
"""A compiled step's usual time as a share of the eager step's."""
REPAID = 40.0
"""Seconds that compiling takes, about."""
