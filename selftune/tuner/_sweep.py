"""The learning-rate sweep of a tuner's run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from selftune._trees import copy_into
from selftune.control import Action, Activity, Controller, Gradient, SweepSlope, TrainingLoss
from selftune.method import fast_path, live_units
from selftune.method.slopes import Slopes
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps


@torch.no_grad()
def sweep(
    steps: Steps, snapshots: Snapshots, controller: Controller, batch: Callable[[], Any]
) -> int:
    """Sweep the rate, eagerly and in place, and return to the best weights and the selected rate.

    Every batch counts as a step of the run, as in the optimizers, including the last one, which
    only ends the sweep.
    """
    run, slopes, cuts = snapshots.run, Slopes(), steps.shards.of_slopes()
    state = controller.sweep
    assert state is not None
    while not state.ended:
        passed = steps.gradient(run, batch())
        grads = steps.views(passed[1])
        norm = steps.method.total(fast_path.norms(grads).sum().double())
        action = Action() if bool(norm.isfinite()) else controller.observe(Gradient(False))
        if action.skip:
            run.step.add_(1)
            if action.rewind is not None:
                snapshots.rewind(action.rewind, swept=False)
            continue
        if not state.taken:
            controller.observe(Activity(steps.method.total(live_units(grads)).tolist()))
        slopes_now = slopes.along(grads, steps.views(run.weights), steps.method.total, cuts)
        if slopes_now is not None:
            values = {n: float(v) for n, v in steps.hyper.values(run.hyper.raw).items()}
            gain = steps.update.rule.initial_gain({**steps.options, **values}, state.taken)
            action = controller.observe(SweepSlope(slopes_now[1], values, slopes_now[0], gain))
            if action.snapshot:
                snapshots.take(action.snapshot)
            if action.rewind is not None:
                slopes.forget()
                run.step.add_(1)
                snapshots.rewind(action.rewind, swept=action.planned)
                continue
        after, _ = steps.advance(run, passed, tracked=False, rate=state.factor(state.taken))
        copy_into(run, after)
        state.taken += 1
        controller.observe(TrainingLoss(float(passed[0])))
    return int(run.step)
