"""Whole-step estimation in a tuner: the run as a bilevel problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selftune._binding import bound
from selftune._flat import Layout
from selftune._graphs import Graphs
from selftune.method.whole_step import WholeSteps
from selftune.problem import Hparams, Point, Problem
from selftune.rules._base import concatenated
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps

Function = Callable[..., Any]


class FunctionalSteps:
    """The steps of a run, for a whole-step estimator."""

    def __init__(self, steps: Steps, run: RunState) -> None:
        assert steps.whole is not None
        self._steps = steps
        self._layout = steps.layout or Layout(run.averages)
        self._dtypes = [t.dtype for t in steps.views(run.weights)]
        inner: Any = steps.inner
        own, self._rates = concatenated(steps.own, self._layout)
        splits = hasattr(inner, "predicted") and hasattr(inner, "judged")
        self._problem = Problem(
            update=steps.update.joined(self._layout),
            inner_loss=lambda w, h, batch: self._call(inner, w, h, batch),
            outer_loss=lambda params, batch: params.sum(), options={**steps.options, **own},
            shapes=self._layout.shapes, scales=steps.hyper.hparams,
            split=(
                lambda w, h, batch: self._call(inner.predicted, w, h, batch),
                lambda predicted, h, batch: self._call(inner.judged, None, h, batch, predicted),
            ) if splits else None,
        )  # fmt: skip
        self.sees, self.estimates = steps.whole.sees, WholeSteps(steps.whole)
        self._batch: Any = None  # of the last step

    def wrap(self, wrap: Callable[[Function], Function]) -> None:
        self._problem = replace(self._problem, graphs=Graphs(wrap))

    def _call(
        self, function: Function, params: Tensor | None, hparams: Hparams, batch: Any, *first: Any
    ) -> Any:
        """The training objective, or a part of it, at a vector of weights; None: the current ones.

        The model's buffers are part of the batch.
        """
        steps, (batch, buffers) = self._steps, batch
        tensors = {n: b.clone() for n, b in zip(steps.buffers, buffers, strict=True)}
        if params is not None:
            parts = zip(self._layout.views(params), self._dtypes, strict=True)
            tensors |= zip(steps.params, [p.to(dtype) for p, dtype in parts], strict=True)
        for name, value in hparams.items():
            for buffer in steps.layers.get(name, []):
                tensors[buffer] = value.view(1)
        with steps.autocast(), bound(steps.inner, tensors):
            return function(*first, batch)

    # pure: parts of the graphs of steps

    def seen(self, run: RunState) -> tuple[Point, dict[str, Tensor]]:
        """A copy of the current point, with buffers instead of a batch, and the hyperparameters."""
        dtype, steps = self._layout.dtype, self._steps
        parts = run.method.parts
        state = {  # parameters with their own options may have other state tensors
            name: self._layout.flatten(
                [p.rule[name] if name in p.rule else torch.zeros_like(p.average) for p in parts]
            )
            for name in sorted({k for p in parts for k in p.rule})
        }
        params = self._layout.flatten(run.weights)
        clock = steps.clock(run, dtype)
        clock = clock._replace(rate=clock.rate * self._rates)
        values = {n: v.to(dtype) for n, v in steps.hyper.values(run.hyper.raw).items()}
        others = {n: v for n, v in values.items() if n not in steps.whole_step_names} or None
        buffers = [b.clone() for b in run.buffers]
        point = Point(params, state, buffers, clock, options=others)
        return point, {n: values[n] for n in steps.whole_step_names}

    def joined(self, grads: Sequence[Tensor]) -> Tensor:
        return self._layout.flatten(grads)

    def raw(self, run: RunState, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """dL/d(raw) by name, from dL/d(value)."""
        hyper = self._steps.hyper
        slopes = hyper.slopes(hyper.values(run.hyper.raw))
        return {n: g.to(torch.float64) * slopes[n] for n, g in grads.items()}

    # between the graphs

    def observe(self, point: Point, hparams: Hparams, batch: Any) -> None:
        self._batch = batch
        point = point._replace(batch=(batch, point.batch))
        self.estimates.observe(self._problem, point, hparams)

    def estimate(self, end: Point, hparams: Hparams, grads: Tensor) -> Mapping[str, Tensor]:
        """Hypergradients along an outer gradient of length 1, at the end of the last step."""
        end = end._replace(batch=(self._batch, end.batch))
        return self.estimates.estimate(self._problem, end, hparams, grads)

    def shift(self, run: RunState, move: Tensor) -> list[Tensor]:
        """``J δ`` for a change δ of the hyperparameters in raw space, one tensor for each part."""
        params = self._layout.flatten(run.averages)
        move = move.to(self._layout.dtype)
        memory = self.estimates.memory
        if memory is None:
            shift = torch.zeros_like(params)
        else:
            shift = self.estimates.estimator.shift(self._problem, memory, params, move)
        return [shift] if self._steps.layout is not None else self._layout.views(shift)
