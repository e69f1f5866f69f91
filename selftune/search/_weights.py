"""The weights of the best trials, in memory and in files."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import torch
from optuna.trial import FrozenTrial

from selftune.tuner import TuningResult

log = logging.getLogger("selftune")

Trial = optuna.Trial | FrozenTrial


@dataclass
class Weights:
    """The best runs of this process.

    Attributes:
        folder: Folder of their files and of logs, or None.
        most: Number of runs that are kept.
        results: The runs, by trial number.
        values: Their values, the lowest being the best.
        written: Their files.
    """

    folder: Path | None
    most: int = 1
    results: dict[int, TuningResult] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)
    written: dict[int, Path] = field(default_factory=dict)

    def keep(self, trial: Trial, value: float, result: TuningResult) -> None:
        """Keep a run, and of the others the best ones."""
        self.results[trial.number], self.values[trial.number] = result, value
        for number in sorted(self.values, key=self.values.__getitem__)[self.most :]:
            del self.results[number], self.values[number]
        if self.save(trial, result):
            for number in self.written.keys() - self.values.keys():
                old = self.written.pop(number)
                for suffix in (".pt", ".json"):
                    old.with_suffix(suffix).unlink(missing_ok=True)

    def save(self, trial: Trial, result: TuningResult) -> bool:
        """Write the weights and the schedule of a run; return whether they were written."""
        path = self.path(trial)
        if path is None:
            return False
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(result.best_weights, part)
            result.schedule.save(path.with_suffix(".json"))
            part.replace(path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            with suppress(OSError):
                part.unlink(missing_ok=True)
            log.warning(
                "trial %d: its weights were not written and are kept in memory: %s", trial.number,
                error,
            )  # fmt: skip
            return False
        self.written[trial.number] = path
        return True

    def path(self, trial: Trial) -> Path | None:
        """Path of a trial's weights; when it began tells it from those of other studies."""
        if self.folder is None:
            return None
        begun = f"{trial.datetime_start:%Y%m%d-%H%M%S-%f}" if trial.datetime_start else "unknown"
        return self.folder / "weights" / f"{trial.number:04d}-{begun}.pt"
