"""A run seen as a bilevel problem, for estimators that look at whole steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from selftune._flat import Layout
from selftune.bilevel import Bilevel, Run
from selftune.estimators import AbstractEstimator
from selftune.problem import Hparams, Point, Problem
from selftune.rules._base import State
from selftune.update import Clock

log = logging.getLogger("selftune")

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Wrapped(Problem):
    """A problem whose derivatives of a step are compiled, one graph each."""

    def wrapped(self, wrap: Wrap) -> _Wrapped:
        """The same problem."""
        parts = {
            "step": wrap(lambda point, h: Problem.step(self, point, h)),
            "known": wrap(lambda point, h: Problem.gradient(self, point, h)),
            "pull": wrap(lambda point, h, cotangent: Problem.pulling(self, point, h)(cotangent)),
            "curve": wrap(lambda point, h, v: Problem.curving(self, point, h)(v)),
        }
        object.__setattr__(self, "_parts", parts)
        return self

    def step(self, point: Point, hparams: Hparams, batch: Any = None) -> Point:
        after: Point = self._parts["step"](point, hparams)  # type: ignore[attr-defined]
        return after._replace(batch=batch)

    def known(self, point: Point, hparams: Hparams) -> Point:
        if point.grads is not None:
            return point
        return point._replace(grads=self._parts["known"](point, hparams))  # type: ignore[attr-defined]

    def pulling(self, point: Point, hparams: Hparams) -> Callable[..., Any]:
        return lambda cotangent: self.pull(point, hparams, cotangent)

    def pull(self, point: Point, hparams: Hparams, cotangent: tuple[Tensor, State]) -> Any:
        return self._parts["pull"](point, hparams, cotangent)  # type: ignore[attr-defined]

    def curving(self, point: Point, hparams: Hparams) -> Callable[[Tensor], Any]:
        return lambda v: self._parts["curve"](point, hparams, v)  # type: ignore[attr-defined]


class Followed:
    """Follows a run by an estimator that is not content with what a step computed anyway.

    The outer gradient, taken at the averaged weights, is handed to the estimator as if it were
    that of the last.

    Args:
        bilevel: The run's steps.
        estimator: Follows them.
        run: Where it starts.
    """

    def __init__(self, bilevel: Bilevel, estimator: AbstractEstimator, run: Run) -> None:
        self._bilevel, self._estimator = bilevel, estimator
        self._layout = Layout([w.average for w in run.weights])
        self._dtypes = [w.value.dtype for w in run.weights]
        self.problem = _Wrapped(
            update=bilevel.update.joined(self._layout), inner_loss=self._inner,
            outer_loss=lambda params, batch: params.sum(), options=bilevel.options,
        )  # fmt: skip
        self._warned = False
        self.wrap(lambda step: step)
        self.memory: Any = None

    def wrap(self, wrap: Wrap) -> None:
        """Compile what is worth it."""
        self.problem = self.problem.wrapped(wrap)
        estimator, problem = self._estimator, self.problem

        def observe(memory: Any, point: Point, hparams: Hparams) -> Any:
            return estimator.observe(problem, memory, point, hparams)

        self._observe = wrap(observe) if estimator.compiles else observe

    def _inner(self, params: Tensor, hparams: Hparams, batch: Any) -> Tensor:
        """The training loss of the vector of weights; the model's buffers come with the batch."""
        bilevel, (batch, buffers) = self._bilevel, batch
        parts = zip(self._layout.views(params), self._dtypes, strict=True)
        named = dict(zip(bilevel.params, [p.to(dtype) for p, dtype in parts], strict=True))
        held = {n: b.clone() for n, b in zip(bilevel.buffers, buffers, strict=True)}
        with bilevel.autocast():
            loss: Tensor = functional_call(bilevel.inner, {**named, **held}, (batch,))
        return loss

    def point(self, run: Run, batch: Any) -> Point:
        """A copy of where the run is, before the step on a batch."""
        state = {
            k: self._layout.flatten([w.rule[k] for w in run.weights]) for k in run.weights[0].rule
        }
        params = self._layout.flatten([w.value for w in run.weights])
        buffers = [b.clone() for b in run.buffers]
        return Point(params, state, (batch, buffers), self._clock(run))

    def _clock(self, run: Run) -> Clock:
        rates = self._bilevel.rates
        last = torch.clamp(run.step, max=len(rates) - 1)
        rate = rates.gather(0, last).squeeze(0).to(self._layout.dtype)
        step, age = (t.squeeze(0).to(self._layout.dtype) for t in (run.step, run.age))
        return Clock(step, rate, age)

    def _hparams(self, run: Run) -> dict[str, Tensor]:
        values = self._bilevel.hyper.values(run.hyper.raw)
        return {n: v.to(self._layout.dtype) for n, v in values.items()}

    def observe(self, run: Run, point: Point, grads: Sequence[Tensor]) -> None:
        """Take note of the step from a point, along its gradients."""
        point, hparams = point._replace(grads=self._layout.flatten(grads)), self._hparams(run)
        if self.memory is None:
            self.problem.products.prepare(point.params, hparams, point.batch)
            self.memory = self._estimator.init(self.problem, point, hparams)
        self.memory = self._observe(self.memory, point, hparams)

    def signal(self, run: Run, grads: Sequence[Tensor]) -> Tensor:
        """dL/d(raw) of every tuned hyperparameter for outer gradients."""
        point, hparams = self.point(run, None), self._hparams(run)
        flat = self._layout.flatten(grads)
        found, self.memory = self._estimator.solve(self.problem, self.memory, point, hparams, flat)
        if found.solution is not None and not self._warned and bool(found.solution.diverged):
            self._warned = True
            log.warning(
                "the linear solve diverged and its best iterate is used, with a relative residual "
                "of %.2g: add damping, or take fewer terms", float(found.solution.residual),
            )  # fmt: skip
        return self._raw(found.grads, run)

    def _raw(self, grads: Mapping[str, Tensor], run: Run) -> Tensor:
        hyper = self._bilevel.hyper
        slopes = hyper.slopes(hyper.values(run.hyper.raw))
        return torch.stack([grads[n].to(torch.float64) * slopes[n] for n in hyper.names])

    def forget(self) -> None:
        """Begin anew: the run has gone back to earlier weights."""
        self.memory = None
