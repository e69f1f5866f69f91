"""The results of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selftune._files import write_text
from selftune.monitor import Verdict
from selftune.monitor.report import MOST, Curve, line, page, table
from selftune.replay import TunedSchedule
from selftune.rules import Mixture, PlainOptimizer
from selftune.tuner._steps import Steps


@dataclass(kw_only=True)
class History:
    """The history of a run as plain numbers; part of its checkpoints."""

    train_loss: list[float] = field(default_factory=list)
    hyper_step: list[int] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    hparams: dict[str, list[float]] = field(default_factory=dict)
    score_step: list[int] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)
    rewinds: list[int] = field(default_factory=list)
    undone: list[list[int]] = field(default_factory=list)

    def hyper(self, step: int, loss: float, values: dict[str, float]) -> None:
        self.hyper_step.append(step)
        self.val_loss.append(loss)
        for name, value in values.items():
            self.hparams.setdefault(name, []).append(value)

    def mean_loss(self, steps: int) -> float:
        """Mean training loss of the last steps; NaN if there are none."""
        known = [loss for loss in self.train_loss[-steps:] if math.isfinite(loss)]
        return sum(known) / len(known) if known else math.nan

    def score(self, step: int, scores: dict[str, float]) -> None:
        self.score_step.append(step)
        for name, value in scores.items():
            self.scores.setdefault(name, []).append(value)

    def arrays(self) -> dict[str, NDArray[Any]]:
        arrays = {
            "train_loss": np.asarray(self.train_loss),
            "hyper_step": np.asarray(self.hyper_step, dtype=np.int64),
            "val_loss": np.asarray(self.val_loss),
            "score_step": np.asarray(self.score_step, dtype=np.int64),
            "rewinds": np.asarray(self.rewinds, dtype=np.int64),
        }
        arrays |= {f"score/{n}": np.asarray(v) for n, v in self.scores.items()}
        return arrays | {n: np.asarray(v) for n, v in self.hparams.items()}


def schedule_of(
    history: History, run: Steps, known: Mapping[str, float], steps: int
) -> TunedSchedule:
    """The values of all hyperparameters after the sweep; the rate includes schedule and decay.

    Steps undone by a rewind are left out.
    """
    start = history.hyper_step[0] if history.hyper_step else 0
    changes = {n: dict(zip(history.hyper_step, v, strict=True)) for n, v in history.hparams.items()}
    rates = run.rates.tolist()
    lost = {step for first, last in history.undone for step in range(first, last)}
    if lost.issuperset(range(start, steps)):
        lost = set()  # nothing would be left
    taken = 0
    values: dict[str, list[list[float]]] = {n: [] for n in known}
    present = dict(known) | {n: v[0] for n, v in history.hparams.items()}
    for step in range(start, steps):
        present |= {n: c[step] for n, c in changes.items() if step in c}
        if step in lost:
            continue
        acted = present["lr"] * rates[min(step, len(rates) - 1)]
        acting = {**present, "lr": acted / (1 + present["decay"] * step)}
        if run.chosen is not None and step < run.chosen.step:  # converted to the chosen rule
            moves = run.chosen.moves
            acting |= {n: acting[n] * math.exp(moves[n]) for n in ("lr", "weight_decay")}
        for name, value in acting.items():
            if not values[name] or values[name][-1][1] != value:
                values[name].append([taken, value])
        taken += 1
    del values["decay"]  # part of the learning rate
    rule = run.update.rule
    if isinstance(rule, Mixture) and rule.chosen is not None:
        prefix = f"{rule.chosen}_"
        own = {h.name for h in run.update.hparams.values()} - rule.inactive
        values = {
            n.removeprefix(prefix): v
            for n, v in values.items()
            if n in own or n not in run.update.hparams
        }
        rule = rule.members[rule.chosen]
    return TunedSchedule(rule=type(rule).__name__, steps=taken, values=values)


@dataclass(frozen=True, kw_only=True)
class TuningResult:
    """The result of a finished or interrupted run.

    Attributes:
        history: Arrays by name. ``train_loss`` has one entry for each training step; ``val_loss``
            and every hyperparameter have one for each step in ``hyper_step``; ``score/loss`` and
            other metrics over the whole validation set have one for each step in ``score_step``;
            ``rewinds`` contains the steps of rewinds.
        best_weights: The model's state_dict at the weights with the lowest validation loss. The
            model holds these weights.
        best_loss: Their loss over the whole validation set. This set was used for tuning, so report
            results on other data. With ``val=None`` it is measured on the held-out examples at the
            join, and the loss of the final weights is usually lower; after overfitting, it is that
            of the last good weights.
        best_scores: ``"loss"`` and the metrics of these weights over the whole validation set; with
            ``val=None`` those at the join.
        hparams: All hyperparameters at the end; the learning rate is the tuned peak.
        schedule: The trajectory of all hyperparameters, for :func:`selftune.replay`, without the
            sweep and without steps undone by a rewind.
        steps: Training steps taken.
        ended: ``"finished"``, ``"stopped"`` or ``"interrupted"``.
        verdicts: A verdict on each tuned hyperparameter, by name.
        why: An explanation of each tuned hyperparameter's value, one line each.
        folder: The run's ``log_dir``, or None.
        rule: The update rule with these hyperparameters as a plain torch optimizer, without
            penalties. For a mixture the chosen rule, or None if the run ended before the choice.
        joined: The step at which held-out examples became training data (``val=None``), or None.
            The final weights are then the average at the end of the run or, if the run overfitted
            before the join, the last good weights from before it.
    """

    history: dict[str, NDArray[Any]]
    best_weights: dict[str, Tensor]
    best_loss: float
    hparams: dict[str, float]
    schedule: TunedSchedule
    steps: int
    ended: str
    best_scores: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    why: str = ""
    folder: Path | None = None
    rule: PlainOptimizer | None = None
    joined: int | None = None

    @property
    def _loss(self) -> str:
        at = "" if self.joined is None else f" at the join, step {self.joined}"
        return f"validation loss {self.best_loss:.4g}{at}"

    def report(self, folder: str | Path | None = None) -> str:
        """Return a table of the run, and write ``report.html`` and ``schedule.json``.

        Args:
            folder: Folder for the files; by default the run's ``log_dir``. If both are None, no
                files are written.

        Returns:
            A table with one row per tuned hyperparameter (initial value, final value, range of
            steps in which it changed, verdict), followed by an explanation of each value.

        Raises:
            OSError: The files cannot be written.
        """
        steps = self.history["hyper_step"].tolist()
        lines = [
            line(name, (steps, self.history[name].tolist()), verdict.sentence)
            for name, verdict in self.verdicts.items()
        ]
        target = self.folder if folder is None else Path(folder)
        if target is not None:
            target.mkdir(parents=True, exist_ok=True)
            title = f"{self.steps} steps, {self.ended}, {self._loss}"
            rewinds = self.history["rewinds"].tolist()
            text = page(title, lines, self._panels(steps), self.why, rewinds)
            write_text(target / "report.html", text)
            self.schedule.save(target / "schedule.json")
        return f"{table(lines)}\n\n{self.why}"

    def _panels(self, steps: list[int]) -> dict[str, dict[str, Curve]]:
        """The plots of the report."""
        losses = self.history["train_loss"].tolist()
        panels: dict[str, dict[str, Curve]] = {
            "loss": {
                "training": (range(1, len(losses) + 1), losses),
                "validation batches": (steps, self.history["val_loss"].tolist()),
            }
        }
        if len(self.history["score_step"]):
            scores = self.history["score/loss"].tolist()
            panels["loss"]["validation set"] = (self.history["score_step"].tolist(), scores)
        names = list(self.verdicts)[:MOST]
        return panels | {n: {n: (steps, self.history[n].tolist())} for n in names}

    def __repr__(self) -> str:
        values = ", ".join(f"{n}={v:.3g}" for n, v in self.hparams.items())
        best = "best " if self.joined is None else ""
        return f"TuningResult({self.ended} after {self.steps} steps, {best}{self._loss}; {values})"
