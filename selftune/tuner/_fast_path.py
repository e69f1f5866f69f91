"""The eager weight step that nobody tracks, by one kernel of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from selftune.method import fast_path
from selftune.tuner._steps import Batch, RunState, Steps
from selftune.update import Clock, learning_rate


class FastPath:
    """Takes the untracked step in place: the same numbers, up to rounding, in less time.

    Args:
        steps: The steps.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    @staticmethod
    def serves(steps: Steps, run: RunState) -> bool:
        """Whether steps are left untracked, and weights are such as torch's kernels take."""
        untracked = steps.method.sensitivities.estimator.stride > 1 and steps.whole is None
        return untracked and all(
            p.params.device.type == "cpu"
            and p.params.dtype == p.average.dtype
            and p.params.is_contiguous()
            for p in run.method.parts
        )

    def __call__(self, run: RunState, batch: Batch) -> Tensor | None:
        """Take a step; returns what it tells, or None if nothing could be done."""
        steps = self._steps
        values, _ = steps.numbers(run)
        kernel = fast_path.kernel(steps.update, values)
        if kernel is None:
            return None
        loss, grads, buffers = steps.gradient(run, batch)
        grads = [g.contiguous() for g in grads]
        fine = torch.isfinite(loss) & torch.stack(torch._foreach_norm(grads)).sum().isfinite()
        if bool(fine):
            parts = run.method.parts
            step, age = int(run.step), int(run.age)
            clock = Clock(step, steps.factor(step), age)
            state = {k: [p.rule[k] for p in parts] for k in parts[0].rule}
            ages = [torch.tensor(float(age + 1))] * len(grads)
            kernel(run.weights, grads, state, ages, learning_rate(values, clock))
            for old, new in zip(run.buffers, buffers, strict=True):
                old.copy_(new)
            run.age.add_(1)
        run.step.add_(1)
        return steps.told(loss, (), fine)
