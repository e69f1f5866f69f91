"""A trial: one self-tuned training run of a candidate."""

from __future__ import annotations

import logging
import math
import os
import socket
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np
import optuna
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial
from torch import nn

from selftune._processes import start_of
from selftune.method import HyperSettings
from selftune.monitor import TensorBoard
from selftune.rules import AdamW
from selftune.search._candidates import Builder, Candidate
from selftune.search._pruning import (
    close,
    evaluations,
    example_of,
    masks_of,
    sizes_of,
    start_wide,
    until,
)
from selftune.search._shape import size_of
from selftune.search._space import Space
from selftune.search._storage import Unwritable, finished, transient
from selftune.search._weights import Weights
from selftune.search.memory import Memory, Task
from selftune.structure import prune
from selftune.tuner import Progress, Tuner, TuningResult
from selftune.tuner._objective import Objective
from selftune.tuner._splitting import parts

log = logging.getLogger("selftune")

STUDY = "selftune"
"""Default name of the study."""
NEAREST = 3
"""Number of best trials of a family from whose tuned values a new trial starts."""


class Lost(Exception):
    """A trial whose value is not finite."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Runs trials.

    Attributes:
        candidates: Builders by the name of their family.
        val: Validation batches, or the share of the training data.
        metric: ``"loss"`` or the name of one of ``tuner``'s metrics.
        sign: 1 if it is minimised, −1 if it is maximised.
        length: ``epochs`` or ``steps`` of a run.
        fit: Further arguments of :meth:`~selftune.Tuner.fit`.
        tuner: Arguments of :class:`~selftune.Tuner`.
        warm: Whether runs start from the final hyperparameters of the best ones.
        seed: Seed of the weights and the data order.
        task: The task of this search, for the memory.
        structure: Arguments of :class:`~selftune.structure.Goal` for models that are cut during
            their run, or None.
        weights: The best runs, and the folder of their files and of logs.
    """

    candidates: Mapping[str, Builder]
    train: Any
    val: Any
    loss_fn: Any
    metric: str
    sign: int
    length: Mapping[str, int]
    fit: Mapping[str, Any]
    tuner: Mapping[str, Any]
    warm: bool
    weights: Weights
    seed: int
    memory: Memory | None = None
    task: Task | None = None
    structure: Mapping[str, Any] | None = None

    def attempt(self, trial: optuna.Trial) -> float:
        """Run a trial; record a failure with its candidate."""
        process = os.getpid()
        trial.set_user_attr("worker", [socket.gethostname(), process, start_of(process)])
        try:
            return self(trial)
        except optuna.TrialPruned:
            raise
        except KeyboardInterrupt:  # Optuna counts it as failed, and a grid would leave it out
            if trial.params:
                trial.study.enqueue_trial(trial.params, user_attrs={"instead of": trial.number})
            raise
        except Exception as error:
            if transient(error):  # not the candidate's failure: another trial takes its place
                raise
            if isinstance(error, StorageInternalError):
                raise Unwritable from error
            family = trial.user_attrs.get("family", "?")
            described = f"{type(error).__name__}: {error}"
            trial.set_user_attr("error", described)
            log.warning(
                "trial %d (%s, %s) failed: %s", trial.number, family, trial.params, described
            )
            raise

    def __call__(self, trial: optuna.Trial) -> float:
        """Run a trial and return its metric; keep its weights if they are the best so far."""
        family = self.family(trial)
        trial.set_user_attr("family", family)
        made = self.build(trial, family)
        if isinstance(made, (int, float, np.number)) and not isinstance(made, bool):
            if not math.isfinite(made):
                raise Lost(f"the objective is {made}")
            return float(made)
        result = self.run(made, family, trial)
        value = self.judged(result)
        if result.ended == "interrupted":
            raise KeyboardInterrupt
        trial.set_user_attr("hparams", result.hparams)
        trial.set_user_attr("steps", result.steps)
        if trial.user_attrs.get("pruned"):
            raise optuna.TrialPruned
        if not math.isfinite(value):
            raise Lost(f"{self.metric} is {value}")
        self._keep(trial, value, result)
        return value

    def family(self, trial: Any) -> str:
        """Suggest the candidate of a trial, by name."""
        names = sorted(self.candidates)  # the same choices in any order
        return names[0] if len(names) == 1 else str(trial.suggest_categorical("family", names))

    def build(self, trial: Any, family: str) -> Any:
        """Build a candidate, with initial weights that are reproducible for each trial."""
        torch.manual_seed(self.seed + trial.number)
        prefix = self.prefix(family).removesuffix(".")
        made = self.candidates[family](Space(trial, prefix, self.structure is not None))
        if self.structure is not None:
            start_wide(made.model if isinstance(made, Candidate) else made, family)
        return Candidate(model=made) if isinstance(made, nn.Module) else made

    def prefix(self, family: str) -> str:
        """Prefix of the parameter names of a family."""
        return f"{family}." if len(self.candidates) > 1 or family != "model" else ""

    def run(self, made: Candidate, family: str, trial: optuna.Trial | FrozenTrial) -> TuningResult:
        """Train a candidate; with ``structure``, at its largest sizes first, then cut.

        A finished trial is trained again, from the same starting values.
        """
        if not isinstance(made, Candidate):
            raise TypeError(
                f"a builder returned {type(made).__name__}: return a model, a Candidate, or the "
                "trial's value as a number"
            )
        own = [n for n in ("train", "val", "loss_fn") if getattr(made, n) is not None]
        own += ["objective"] if "objective" in made.tuner else []
        if self.weights.most > 1 and own:
            raise ValueError(
                f"ensemble={self.weights.most} needs candidates with the same data and loss, but "
                f"this one has its own {', '.join(own)}: omit ensemble="
            )
        calls = (self._reporting(trial),) if isinstance(trial, optuna.Trial) else ()
        if self.structure is None:
            tuner = self._tuner(made)
            tuner.start_from(self._start(tuner, made, family, trial))
            return self._fit(made, tuner, trial, calls)
        return self._run_inside(made, self.structure, family, trial, calls)

    def _run_inside(
        self, made: Candidate, structure: Mapping[str, Any], family: str,
        trial: optuna.Trial | FrozenTrial, calls: tuple[Callable[[Progress], bool], ...],
    ) -> TuningResult:  # fmt: skip
        """Train at the largest sizes, remove units, and train the smaller model for the rest."""
        val = self.val if made.val is None else made.val
        train, val, *_ = parts(self.train_of(made), val, self.seed)
        made = replace(made, train=train, val=val)
        total = self._steps(made)
        if total is None or total < 2:
            raise ValueError(
                f"structure= needs the length of the run, at least 2 steps, not {total}: pass "
                "steps=, or epochs= and training batches with a length"
            )
        end = float(structure["end"])
        tuner = self._tuner(made)
        tuner.start_from(self._start(tuner, made, family, trial))
        wide = self._fit(
            made, tuner, trial, (*calls, until(end * total)), suffix="-wide", steps=total,
            evaluate_every=evaluations(self.fit.get("evaluate_every"), train, total, end),
        )  # fmt: skip
        if trial.user_attrs.get("pruned") or wide.ended == "interrupted":
            return wide
        loss_fn = made.loss_fn or self.loss_fn
        objective = Objective(made.model, loss_fn, {**self.tuner, **made.tuner}.get("objective"))
        close(made.model, objective, val, structure)
        example = example_of(next(iter(train)), made.model)
        small = prune(made.model, example, threshold=0.0)  # with the same outputs
        if isinstance(trial, optuna.Trial):
            trial.set_user_attr("sizes", sizes_of(made.model, small))
        left = max(1, total - wide.steps)
        warm = (
            {} if "warmup_steps" in {**self.tuner, **made.tuner} else {"warmup_steps": left // 50}
        )
        rest = self._tuner(replace(made, model=small), probe=False, **warm)
        # Start from the scheduled rate: the peak would undo some of the descent.
        rates = wide.schedule.values.get("lr")
        rest.start_from({**wide.hparams, **({"lr": rates[-1][1]} if rates else {})})
        result = self._fit(made, rest, trial, calls, steps=left)
        weights = {**result.best_weights, **masks_of(made.model)}
        return replace(result, best_weights=weights, steps=result.steps + wide.steps)

    def _tuner(self, made: Candidate, **more: Any) -> Tuner:
        options = {**self.tuner, **made.tuner, **more}
        if not {"every", "estimator"} & options.keys():  # an estimator's stride goes with ``every``
            options["every"] = HyperSettings().every(self._steps(made))
        if self.metric not in (known := ["loss", *(options.get("metrics") or {})]):
            raise ValueError(f"metric={self.metric!r} must be one of {known}: add it to metrics")
        return Tuner(made.model, made.loss_fn or self.loss_fn, seed=self.seed, **options)

    def _fit(
        self, made: Candidate, tuner: Tuner, trial: optuna.Trial | FrozenTrial,
        calls: tuple[Callable[[Progress], bool], ...], suffix: str = "", **more: Any,
    ) -> TuningResult:  # fmt: skip
        """Fit a tuner, with reports to the search and a log of its own."""
        length = {} if "steps" in more else self.length
        options = {"progress": False, **length, **self.fit, **more}
        options["callbacks"] = [*options.get("callbacks", ()), *calls]
        if isinstance(trial, optuna.Trial) and self.weights.folder is not None:
            about = {"family": trial.user_attrs["family"], **trial.params}
            name = f"{trial.number:04d}-{trial.user_attrs['family']}{suffix}"
            if trial.study.study_name != STUDY:  # whose runs may be in this folder too
                name = f"{trial.study.study_name}-{name}"
            # Names of studies and families may contain a separator of paths.
            board = TensorBoard(self.weights.folder / quote(name, safe=" "), about=about)
            others = options.get("recorder")
            options["recorder"] = [board] if others is None else [board, others]
        val = self.val if made.val is None else made.val
        return tuner.fit(self.train_of(made), val, **options)

    def train_of(self, made: Candidate) -> Any:
        """Training batches of a candidate."""
        return self.train if made.train is None else made.train

    def _steps(self, made: Candidate) -> int | None:
        """Length of a run in weight steps, or None if unknown in advance."""
        if "steps" in self.length:
            return self.length["steps"]
        train = self.train_of(made)
        batches = size_of(train)
        if "epochs" not in self.length or batches is None:
            return None
        return self.length["epochs"] * batches

    def _reporting(self, trial: optuna.Trial) -> Callable[[Progress], bool]:
        """A callback that reports evaluations to the pruner, and ends a pruned run."""
        reports = 0

        def report(progress: Progress) -> bool:
            nonlocal reports
            reports += 1
            value = progress.scores[self.metric]
            if not math.isfinite(value):
                return False
            trial.report(value, reports)
            if trial.should_prune():
                trial.set_user_attr("pruned", True)
            return bool(trial.user_attrs.get("pruned"))

        return report

    def judged(self, result: TuningResult) -> float:
        """The value of the metric at the weights of the result."""
        return result.best_scores[self.metric] if math.isfinite(result.best_loss) else math.nan

    def _start(
        self, tuner: Tuner, made: Candidate, family: str, trial: optuna.Trial | FrozenTrial
    ) -> dict[str, float]:
        """Starting values: from the best trials of the family, or else from the memory."""
        if isinstance(trial, FrozenTrial):  # trained again
            return dict(trial.user_attrs.get("start", {}))
        rule = rule_of({**self.tuner, **made.tuner})
        trial.set_user_attr("rule", rule)
        start = self._medians(trial.study, family) if self.warm else {}
        if not start and self.memory is not None and self.task is not None:
            task = replace(self.task, family=family, rule=rule)
            start = self.memory.start(task, tuner.starts, tuner.scales)
        trial.set_user_attr("start", start)
        return start

    def _medians(self, study: optuna.Study, family: str) -> dict[str, float]:
        """Medians of the final hyperparameters of the best trials of a family."""
        known = [t for t in finished(study) if t.user_attrs.get("family") == family]
        best = sorted(known, key=lambda t: self.sign * (t.value or 0.0))[:NEAREST]
        values_of: dict[str, list[float]] = {}
        for one in best:
            for name, value in one.user_attrs.get("hparams", {}).items():
                values_of.setdefault(name, []).append(value)
        return {n: statistics.median_low(v) for n, v in values_of.items()}

    def _keep(self, trial: optuna.Trial, value: float, result: TuningResult) -> None:
        """Keep the weights if they are among the best so far."""
        others = [self.sign * t.value for t in finished(trial.study) if t.value is not None]
        if sum(other < self.sign * value for other in others) < self.weights.most:
            self.weights.keep(trial, self.sign * value, result)


def rule_of(tuner: Mapping[str, Any]) -> str:
    """Name of the update rule, from the arguments of a tuner."""
    return type(tuner.get("rule") or AdamW()).__name__
