"""The eager weight step that nobody observes, by one kernel of torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from selftune.bilevel import Batch, Bilevel, Run
from selftune.rules._base import InPlace
from selftune.update import Clock, learning_rate


class Unobserved:
    """Takes ``Bilevel.train``'s step in place: the same numbers, up to rounding, in less time.

    The pure step makes some twenty small tensors. Most steps of a run are observed by nobody, so
    that of these nothing is needed but where weights and state end.

    Args:
        bilevel: The steps.
    """

    def __init__(self, bilevel: Bilevel) -> None:
        self._bilevel = bilevel
        self._raw: Tensor | None = None
        self._version = -1
        self._values: dict[str, Any] = {}
        self._kernel: InPlace | None = None
        self._rates = bilevel.rates.tolist()

    @staticmethod
    def serves(bilevel: Bilevel, run: Run) -> bool:
        """Whether steps are left unobserved, and weights are such as torch's kernels take."""
        unobserved = bilevel.estimator.stride > 1 and bilevel.follow is None
        return unobserved and not bilevel.update.penalties and all(
            w.value.device.type == "cpu"
            and w.value.dtype == w.average.dtype
            and w.value.is_contiguous()
            for w in run.weights
        )  # fmt: skip

    def __call__(self, run: Run, batch: Batch) -> Tensor | None:
        """Take a step; returns the training loss, or None if nothing could be done."""
        self._look_up(run)
        if self._kernel is None:
            return None
        loss, grads, buffers = self._bilevel.gradient(run, batch)
        if math.isfinite(float(loss)):
            step, age = int(run.step), int(run.age)
            clock = Clock(step, self._rates[min(step, len(self._rates) - 1)], age)
            state = {k: [w.rule[k] for w in run.weights] for k in run.weights[0].rule}
            ages = [torch.tensor(float(age + 1))] * len(grads)
            params = [w.value for w in run.weights]
            grads = [g.contiguous() for g in grads]
            self._kernel(params, grads, state, ages, learning_rate(self._values, clock))
            for old, new in zip(run.buffers, buffers, strict=True):
                old.copy_(new)
            run.age.add_(1)
        run.step.add_(1)
        return loss

    def _look_up(self, run: Run) -> None:
        """Hyperparameters as numbers, which change at hyperparameter steps alone."""
        raw = run.hyper.raw
        if raw is self._raw and raw._version == self._version:
            return
        self._raw, self._version = raw, raw._version
        tuned = {n: float(v) for n, v in self._bilevel.hyper.values(raw).items()}
        self._values = {**self._bilevel.options, **tuned}
        self._kernel = self._bilevel.update.rule.in_place(self._values)
