"""The learning-rate sweep of a tuner's run, and the trial of the rate it chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selftune._trees import leaves
from selftune.control import Action, Controller, SweepSlope, TrialSlopes
from selftune.method.slopes import Slopes
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import RunState, Steps
from selftune.tuner._whole_step import FunctionalSteps


class Sweep:
    """Takes the steps of a sweep and its trial, eagerly and in place.

    Every batch counts as a step of the run, as in the optimizers, also where it only shows that
    the sweep is over.

    Args:
        steps: The steps.
        run: Their tensors.
        snapshots: Get the weights at the lowest sum of slopes.
        controller: Decides.
        whole: The steps as an estimator of whole steps sees them, or None.

    Attributes:
        slopes: Of the last step.
    """

    def __init__(
        self,
        steps: Steps,
        run: RunState,
        snapshots: Snapshots,
        controller: Controller,
        whole: FunctionalSteps | None = None,
    ) -> None:
        self._steps, self._run, self._snapshots = steps, run, snapshots
        self._controller, self._whole = controller, whole
        self.slopes = Slopes()

    @torch.no_grad()
    def sweep(self, batch: Callable[[], Any]) -> int:
        """Sweep the rate and return to the best weights, at the rate it chose; steps taken."""
        steps, run, sweep = self._steps, self._run, self._controller.sweep
        assert sweep is not None
        while True:
            passed = steps.gradient(run, batch())
            found = self.slopes.along(passed[1], run.weights)
            if found is not None:
                values = {n: float(v) for n, v in steps.hyper.values(run.hyper.raw).items()}
                record = SweepSlope(found[1], values, found[0])
                if self._carry_out(self._controller.observe(record)):
                    if sweep.ended:
                        return int(run.step)
                    continue
            rate = sweep.factor(sweep.taken)
            self._write(steps.advance(run, passed, tracked=False, rate=rate))
            sweep.taken += 1

    @torch.no_grad()
    def trial(self, batch: Any, *, tracked: bool) -> Tensor | None:
        """A step on trial, and what it tells; None where it led uphill, and the rate was cut."""
        passed = self._steps.gradient(self._run, batch)
        found = self.slopes.along(passed[1], self._run.weights)
        if found is not None and self._carry_out(self._controller.observe(TrialSlopes(*found))):
            return None
        whole = self._whole
        seen = None if whole is None else whole.seen(self._run)
        told = self._write(self._steps.advance(self._run, passed, tracked=tracked))
        if whole is not None and seen is not None and bool(told[1]):
            whole.observe(*seen, batch)
        return told

    def _carry_out(self, action: Action) -> bool:
        """Whether the run was rewound; the batch that showed it counts as a step."""
        if action.snapshot:
            self._snapshots.take(action.snapshot)
        if action.rewind is None:
            return False
        self.slopes.forget()
        self._run.step.add_(1)
        self._snapshots.rewind(action.rewind)
        self._controller.announce(action, int(self._run.step))
        return True

    def _write(self, found: tuple[RunState, Tensor]) -> Tensor:
        for old, new in zip(leaves(self._run), leaves(found[0]), strict=True):
            if new is not old:
                old.copy_(new)
        return found[1]
