"""Warnings, each given once, about what a training loop does or lacks."""

from __future__ import annotations

import logging

from torch import nn

from selftune.nn import tunables
from selftune.optim._engine import Engine
from selftune.optim._weight_steps import TRAINING_ONLY_AFTER
from selftune.schedules import Schedule

log = logging.getLogger("selftune")

MANY = 20
"""Written learning rates that are no longer occasional changes."""


class Advice:
    """Warnings about rates set twice, a run longer than stated, and missing hyper steps."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._given: set[str] = set()

    def name_strengths(self, label: str, model: nn.Module | None) -> None:
        """Warn about strengths of a model's layers, which only ``st.Tuner`` tunes."""
        strengths = {} if model is None else tunables(model)
        if strengths:
            log.warning(
                "%s: the strengths of layers %s keep their values: only st.Tuner tunes them",
                label, list(strengths),
            )  # fmt: skip

    def give(self, engine: Engine, *, annealed: bool, writes: int) -> None:
        """Warn after a step."""
        steps = engine.clock.steps
        shape, total = self._schedule.shape, self._schedule.total_steps
        if annealed and shape != "constant" and self._first("twice"):
            log.warning(
                "%s: a torch scheduler lowers the learning rate, and so does schedule=%r with "
                "total_steps=%d: the rate is annealed twice. Pass schedule=\"constant\", or "
                "remove the scheduler.", engine.controller.label, shape, total,
            )  # fmt: skip
        if writes > MANY and self._first("written"):
            log.warning(
                "%s: the training loop writes the learning rate to param_groups at every step, "
                "which replaces the tuned one, so it is not tuned. Let a scheduler of "
                "torch.optim.lr_scheduler set it, whose rate the tuned factor multiplies, or "
                "remove the line and pass total_steps=", engine.controller.label,
            )  # fmt: skip
        over = total is not None and steps > total + engine.every
        if over and self._first("over") and self._schedule(steps) == 0:
            log.warning(
                "%s: step %d is past total_steps=%d, where the %s schedule has a learning rate "
                "of 0, so the weights do not change. Pass total_steps= of the whole run.",
                engine.controller.label, steps, total, shape,
            )  # fmt: skip
        alone = steps > TRAINING_ONLY_AFTER and not engine.clock.last_validation_step
        if alone and engine.whole is None and self._first("alone"):
            names = set(engine.shifts.names)
            regularizers = engine.method.sensitivities.update.regularizers
            stay = sorted(regularizers & names | set(engine.shifts.asleep))
            if stay:
                log.warning(
                    "%s: no hyper_step in %d steps: training gradients tune the learning rate; "
                    "not tuned: %s. Call opt.hyper_step(lambda: loss on a validation batch) to "
                    "tune all.", engine.controller.label, TRAINING_ONLY_AFTER, ", ".join(stay),
                )  # fmt: skip

    def _first(self, warning: str) -> bool:
        known = warning in self._given
        self._given.add(warning)
        return not known
