"""The result of a search."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState
from torch import nn

from selftune.replay import TunedSchedule
from selftune.search._candidates import Candidate
from selftune.search._ensemble import Ensemble, choose
from selftune.search._pruning import recut
from selftune.search._space import UNLIKE
from selftune.search._storage import finished
from selftune.search._trial import Trainer
from selftune.search._workers import taken
from selftune.tuner._checkpoints import load  # compares checksums
from selftune.tuner._splitting import parts

log = logging.getLogger("selftune")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The result of a finished search.

    Attributes:
        model: The best model, trained and in evaluation mode; None if candidates return numbers.
        value: Its validation metric. The selection used it, so report results on other data.
        family: The family of the best model.
        params: The selected parameters, by name, and ``sizes`` under the family's prefix.
        hparams: The final values of its tuned hyperparameters.
        schedule: Their trajectory, for :func:`selftune.replay`, or None.
        study: The Optuna study with all trials.
        sizes: With ``structure=``, the sizes to which the model was cut: ``units`` of each gated
            layer, ``heads`` of each attention, number of optional ``blocks`` left, and
            ``parameters``. Otherwise empty.
        members: With ``ensemble=``, the weights of the trials in the mean that ``model`` computes,
            by trial number. The other attributes are those of the best trial.
    """

    model: nn.Module | None
    value: float
    family: str
    params: dict[str, Any]
    hparams: dict[str, float]
    schedule: TunedSchedule | None
    study: optuna.Study
    sizes: dict[str, Any] = field(default_factory=dict)
    members: dict[int, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        values = {**self.params, **{n: f"{v:.3g}" for n, v in self.hparams.items()}}
        named = ", ".join(f"{n}={v}" for n, v in values.items())
        return (
            f"Selection({self.family}, {self.value:.4g} on the validation data, best of "
            f"{len(taken(self.study))} trials; {named})"
        )

    def table(self) -> str:
        """A table of the trials, best first."""
        states = {TrialState.COMPLETE: "", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed",
                  TrialState.WAITING: "waiting"}  # fmt: skip
        sign = -1 if self.study.direction.name == "MAXIMIZE" else 1
        trials = self.study.get_trials(deepcopy=False)
        ended = TrialState.COMPLETE  # values of others are those of unfinished runs
        ranked = sorted(
            trials, key=lambda t: (t.state != ended, t.value is None, sign * (t.value or 0.0))
        )
        rows = [f"{'trial':>5}  {'value':>9}  choices"]
        for trial in ranked:
            value = "–" if trial.value is None else f"{trial.value:.4g}"
            settings = {**trial.params, **trial.user_attrs.get("sizes", {})}
            chosen = ", ".join(f"{k}={v}" for k, v in settings.items())
            why = trial.user_attrs.get("error") or states.get(trial.state, "running")
            rows.append(f"{trial.number:>5}  {value:>9}  {chosen}{'  ' + why if why else ''}")
        return "\n".join(rows)


def selected(trainer: Trainer, study: optuna.Study, earlier: int) -> Selection:
    """The best trial with its model, trained; ``earlier`` trials are of earlier calls."""
    own = study.trials[earlier:]
    unlike = [t for t in own if t.user_attrs.get(UNLIKE)]
    if unlike and all(t.state == TrialState.FAIL for t in own):
        why = unlike[0].user_attrs["error"].partition(": ")[2]
        raise ValueError(f"trial {unlike[0].number}: {why}")
    if not finished(study):
        errors = [t.user_attrs["error"] for t in study.trials if "error" in t.user_attrs]
        why = "; ".join(errors[:3]) or "all were pruned, or the timeout came first"
        old = (
            ". These trials are of an earlier call: pass more trials=, or another study= or "
            "storage=" if 0 < earlier == len(study.trials) else ""
        )  # fmt: skip
        raise RuntimeError(f"none of {len(study.trials)} trials finished: {why}{old}")
    best = study.best_trial
    family, made = best.user_attrs["family"], None
    if _trained(best):
        family, made = _built(trainer, best)
    again = f"value of trial {best.number}, trained again"
    model, schedule, value = None, None, float(study.user_attrs.get(again, study.best_value))
    members: dict[int, float] = {}
    if isinstance(made, Candidate):
        filled = _fill(trainer, best, made)
        if filled is None:
            result = trainer.run(_built(trainer, best)[1], family, best)
            made = _built(trainer, best)[1]
            filled = _put(trainer, made, result.best_weights), result.schedule
            trainer.weights.save(best, result)
            now = trainer.judged(result)
            log.warning("trial %d is trained again: %s is %.6g, and was %.6g", best.number,
                        trainer.metric, now, value)  # fmt: skip
            if trainer.weights.folder is not None:  # later calls read these weights
                study.set_user_attr(again, now)
            value = now
        model, schedule = filled[0].model.eval(), filled[1]
        if trainer.weights.most > 1:
            model, members = _joined(trainer, study, model)
    sizes = dict(best.user_attrs.get("sizes", {}))
    return Selection(
        model=model,
        value=value,
        family=family,
        params={**{trainer.prefix(family) + n: v for n, v in sizes.items()}, **best.params},
        hparams=dict(best.user_attrs.get("hparams", {})),
        schedule=schedule,
        study=study,
        sizes=sizes,
        members=members,
    )


def _trained(trial: FrozenTrial) -> bool:
    """Whether a finished trial trained a model; an objective, called again, may end differently."""
    return "hparams" in trial.user_attrs


def _built(trainer: Trainer, trial: FrozenTrial) -> tuple[str, Any]:
    """The family and the candidate of a trial, with its initial weights."""
    asked = FixedTrial(trial.params, number=trial.number)
    try:
        family = trainer.family(asked)
        return family, trainer.build(asked, family)
    except ValueError as error:
        raise ValueError(
            f"trial {trial.number} ({trial.params}), the best of the study, cannot be built now "
            f"({error}): if the choices have changed, pass another study= or storage="
        ) from error


def _joined(
    trainer: Trainer, study: optuna.Study, model: nn.Module
) -> tuple[nn.Module, dict[int, float]]:
    """An ensemble of the best trials whose weights are available, and its weights."""
    ranked = sorted(finished(study), key=lambda t: trainer.sign * (t.value or 0.0))
    models = {study.best_trial.number: model}
    for trial in ranked[: trainer.weights.most]:
        if trial.number not in models and _trained(trial):
            filled = _fill(trainer, trial, _built(trainer, trial)[1])
            if filled is not None:
                models[trial.number] = filled[0].model.eval()
    val = parts(trainer.train, trainer.val, trainer.seed)[1]
    members = choose(models, trainer.loss_fn, val)
    return Ensemble([models[n] for n in members], list(members.values())).eval(), members


def _put(trainer: Trainer, made: Candidate, weights: dict[str, Any]) -> Candidate:
    """The candidate with trained weights, its model pruned to their sizes."""
    return replace(made, model=recut(made.model, weights, trainer.train_of(made)))


def _fill(
    trainer: Trainer, trial: FrozenTrial, made: Candidate
) -> tuple[Candidate, TunedSchedule] | None:
    """The candidate with the trial's weights, and its schedule; None if they are lost."""
    number = trial.number
    if number in trainer.weights.results:
        result = trainer.weights.results[number]
        return _put(trainer, made, result.best_weights), result.schedule
    path = trainer.weights.path(trial)
    if path is not None and path.exists():
        try:
            filled = _put(trainer, made, load(path))
            return filled, TunedSchedule.load(path.with_suffix(".json"))
        except (ValueError, RuntimeError, TypeError, OSError) as error:
            log.warning("%s: the weights of trial %d cannot be read: %s", path, number, error)
            return None
    log.warning("the weights of trial %d are not available here", number)
    return None
