"""A run seen as a bilevel problem, for estimators that look at whole steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from selftune._flat import Layout
from selftune.bilevel import Bilevel, Run
from selftune.estimators import AbstractEstimator, Follower
from selftune.problem import Hparams, InGraphs, Point
from selftune.update import Clock

log = logging.getLogger("selftune")

Function = Callable[..., Any]


class _Method(nn.Module):
    """A method of a module as a module of its own, so that it can be called functionally."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any) -> Any:
        return getattr(self.module, self.method)(*args)


class Followed:
    """Follows a run by an estimator that is not content with what a step computed anyway.

    The outer gradient, taken at the averaged weights, is handed to the estimator as if it were
    that of the last.

    Args:
        bilevel: The run's steps.
        estimator: Follows them.
        run: Where it starts.

    Attributes:
        follower: The estimator with what it remembers.
        sees_all: Whether every step is to be observed.
    """

    def __init__(self, bilevel: Bilevel, estimator: AbstractEstimator, run: Run) -> None:
        self._bilevel = bilevel
        self._layout = bilevel.layout or Layout([w.average for w in run.weights])
        self._dtypes = [t.dtype for t in bilevel.parts([w.value for w in run.weights])]
        inner = bilevel.inner
        splits = hasattr(inner, "predicted") and hasattr(inner, "judged")
        self._problem = InGraphs(
            update=bilevel.update.joined(self._layout),
            inner_loss=lambda w, h, batch: self._call("forward", w, h, batch),
            outer_loss=lambda params, batch: params.sum(), options=bilevel.options,
            shapes=self._layout.shapes, scales=bilevel.hyper.hparams,
            split=(self._predicted, self._judged) if splits else None,
        )  # fmt: skip
        # Made here: a module that is made within a graph cannot be called in it.
        self._halves = {n: _Method(inner, n) for n in ("predicted", "judged") if splits}
        self.sees_all = estimator.sees_all
        self.follower = Follower(estimator)
        self._told = False
        self.wrap(lambda function: function)

    def wrap(self, wrap: Callable[[Function], Function]) -> None:
        """Wrap what the estimator computes."""
        self._problem.begin(wrap)

    def _predicted(self, params: Tensor, hparams: Hparams, batch: Any) -> Any:
        return self._call("predicted", params, hparams, batch)

    def _judged(self, predicted: Any, hparams: Hparams, batch: Any) -> Tensor:
        found: Tensor = self._call("judged", None, hparams, batch, predicted)
        return found

    def _call(
        self, method: str, params: Tensor | None, hparams: Hparams, batch: Any, *first: Any
    ) -> Any:
        """A method of the training objective at the vector of weights, by default at its own.

        The model's buffers come with the batch.
        """
        bilevel, (batch, buffers) = self._bilevel, batch
        tensors = {n: b.clone() for n, b in zip(bilevel.buffers, buffers, strict=True)}
        if params is not None:
            parts = zip(self._layout.views(params), self._dtypes, strict=True)
            tensors |= zip(bilevel.params, [p.to(dtype) for p, dtype in parts], strict=True)
        for name, value in hparams.items():
            for buffer in bilevel.strengths.get(name, []):
                tensors[buffer] = value.view(1)
        module = bilevel.inner
        if method != "forward":
            module = self._halves[method]
            tensors = {f"module.{n}": t for n, t in tensors.items()}
        with bilevel.autocast():
            return functional_call(module, tensors, (*first, batch))

    # pure: parts of the graphs of steps

    def seen(self, run: Run) -> tuple[Point, dict[str, Tensor]]:
        """A copy of where the run is, with buffers in the place of a batch; hyperparameters."""
        dtype, rates, bilevel = self._layout.dtype, self._bilevel.rates, self._bilevel
        state = {
            k: self._layout.flatten([w.rule[k] for w in run.weights]) for k in run.weights[0].rule
        }
        params = self._layout.flatten([w.value for w in run.weights])
        last = torch.clamp(run.step, max=len(rates) - 1)
        rate = rates.gather(0, last).squeeze(0).to(dtype)
        step, age = (t.squeeze(0).to(dtype) for t in (run.step, run.age))
        values = {n: v.to(dtype) for n, v in bilevel.hyper.values(run.hyper.raw).items()}
        others = {n: v for n, v in values.items() if n not in bilevel.followed} or None
        held = [b.clone() for b in run.buffers]
        point = Point(params, state, held, Clock(step, rate, age), options=others)
        return point, {n: values[n] for n in bilevel.followed}

    def joined(self, grads: Sequence[Tensor]) -> Tensor:
        """Gradients as one vector."""
        return self._layout.flatten(grads)

    def raw(self, run: Run, grads: Mapping[str, Tensor]) -> Tensor:
        """dL/d(raw) of every tuned hyperparameter; 0 for those that are not followed."""
        hyper = self._bilevel.hyper
        slopes = hyper.slopes(hyper.values(run.hyper.raw))
        zero = torch.zeros_like(run.hyper.raw[0])
        found = {n: g.to(torch.float64) * slopes[n] for n, g in grads.items()}
        return torch.stack([found.get(n, zero) for n in hyper.names])

    # between the graphs

    def observe(self, point: Point, hparams: Hparams, batch: Any) -> None:
        """Take note of a step on a batch."""
        point = point._replace(batch=(batch, point.batch))
        self.follower.observe(self._problem, point, hparams)

    def shift(self, run: Run, move: Tensor) -> list[Tensor]:
        """``J δ`` for a move δ of the followed hyperparameters in raw space, a tensor a weight.

        Raises:
            ValueError: The estimator holds no response.
        """
        params = self._layout.flatten([w.average for w in run.weights])
        move = move.to(self._layout.dtype)
        memory = self.follower.memory
        if memory is None:
            shift = torch.zeros_like(params)
        else:
            shift = self.follower.estimator.shift(self._problem, memory, params, move)
        return [shift] if self._bilevel.layout is not None else self._layout.views(shift)

    def estimate(self, end: Point, hparams: Hparams, grads: Tensor) -> Mapping[str, Tensor]:
        """Hypergradients for outer gradients at the end of the last step.

        Those of strengths are along an outer gradient of length 1: the length falls by orders of
        magnitude in a run, and steps that remember the first ones would end long before it. Before
        any they are NaN, which moves nothing.
        """
        if self.follower.memory is None:
            return {n: torch.full_like(h, torch.nan) for n, h in hparams.items()}
        length = grads.norm().clamp_min(torch.finfo(grads.dtype).tiny)
        solved = self.follower.solve(self._problem, end, hparams, grads / length).grads
        found = {n: g if n in self._bilevel.strengths else g * length for n, g in solved.items()}
        if not self._told and not all(bool(torch.isfinite(g).all()) for g in found.values()):
            self._told = True
            log.warning("hypergradients are not finite, and such steps move nothing: %s",
                        {n: float(g) for n, g in found.items()})  # fmt: skip
        return found
