"""Estimators of whole steps in an optimizer: all it knows of the loss is a closure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from selftune.estimators import AbstractEstimator
from selftune.optim._block import Block
from selftune.problem import Point, Problem
from selftune.products import Products, Pull, Push, Values
from selftune.tuning import Tuning
from selftune.update import Transition, Update

log = logging.getLogger("selftune")

CHANGED = 0.3
"""Share by which the gradient of a closure may differ from what it was at the same weights."""


class Call:
    """A training closure that can be asked for its gradient at other weights.

    It is evaluated with the random numbers of its own step; parameters, gradients and the running
    statistics of normalisation layers are put back afterwards.

    Args:
        closure: Computes the loss and calls ``backward``.
        block: The weights.
        statistics: Gives those running statistics.
    """

    def __init__(
        self, closure: Callable[[], Any], block: Block, statistics: Callable[[], list[Tensor]]
    ) -> None:
        self._closure, self._block, self._statistics = closure, block, statistics
        self._device = block.layout.device
        self._random = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(self._device) if self._on_cuda else None
        self.known: tuple[Tensor, Tensor] | None = None  # weights and gradient at its own step

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    def gradient(self, weights: Tensor) -> Tensor:
        """The gradient there, shape (N,)."""
        block = self._block
        before, grads = block.weights(), [p.grad for p in block.params]
        statistics = [(t, t.clone()) for t in self._statistics()]
        with torch.random.fork_rng([self._device] if self._on_cuda else []):
            torch.set_rng_state(self._random)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            block.layout.write(weights, block.params)
            with torch.enable_grad():
                self._closure()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in block.params]
        found = block.layout.flatten(parts).clone()
        block.layout.write(before, block.params)
        for param, grad in zip(block.params, grads, strict=True):
            param.grad = grad
        for tensor, value in statistics:
            tensor.copy_(value)
        return found


class _ByClosures(Products):
    """Second derivatives by differences of closures' gradients."""

    def __init__(self) -> None:
        super().__init__(lambda *args: torch.zeros(()), "differences")
        self.mapped = False

    def prepare(self, params: Tensor, hparams: Values, *batch: Any) -> None:
        """Nothing to choose."""

    def gradient(self, params: Tensor, hparams: Values, *batch: Any) -> Tensor:
        """The closure's gradient."""
        found: Tensor = batch[0].gradient(params)
        return found

    def linear(self, params: Tensor, hparams: Values, *batch: Any) -> tuple[Tensor, Pull]:
        """The closure knows nothing of hyperparameters."""
        gradient, product = self.curvature(params, hparams, *batch)
        still = {n: torch.zeros_like(h) for n, h in hparams.items()}
        return gradient, lambda v: (product(v), still)

    def curvature(
        self, params: Tensor, hparams: Values, *batch: Any
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Differences; a gradient that is known already is not computed again."""
        call: Call = batch[0]
        known = call.known
        own = known is not None and known[0] is params
        gradient = known[1] if known is not None and own else call.gradient(params)

        def product(vector: Tensor) -> Tensor:
            step = self._step(params, vector)
            up, down = (call.gradient(params + sign * step * vector) for sign in (1, -1))
            if own and (up + down - 2 * gradient).norm() > 2 * CHANGED * gradient.norm():
                raise RuntimeError(
                    "a closure of an earlier step computes another gradient now: each closure "
                    "must keep its own batch, as in opt.step(functools.partial(closure, x, y))"
                )
            return (up - down) / (2 * step)

        return gradient, product

    def push(self, params: Tensor, hparams: Values, *batch: Any) -> Push:
        """``(v, ḣ) ↦ H v``."""
        product = self.curvature(params, hparams, *batch)[1]
        return lambda v, moving: product(v)


class _ClosureProblem(Problem):
    """A problem whose batches are closures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "products", _ByClosures())


class Following:
    """Follows an optimizer's steps by an estimator that must see them whole.

    Args:
        estimator: Follows them.
        update: What the optimizer steps by.
        tuning: The tuned hyperparameters.
    """

    def __init__(self, estimator: AbstractEstimator, update: Update, tuning: Tuning) -> None:
        self._estimator, self._update, self._tuning = estimator, update, tuning
        self._memory: Any = None
        self._last: Call | None = None
        self._warned = False

    def forget(self) -> None:
        """Begin anew."""
        self._memory = self._last = None

    def _problem(self, block: Block, values: Mapping[str, Any]) -> Problem:
        """The problem with the group's present options."""
        index = torch.arange(len(block.layout.sizes), device=block.layout.device)
        sizes = torch.tensor(block.layout.sizes, device=block.layout.device)
        return _ClosureProblem(
            update=self._update.joined(block.layout), inner_loss=lambda w, h, b: w.sum(),
            outer_loss=lambda w, b: w.sum(), segments=index.repeat_interleave(sizes),
            options={n: v for n, v in values.items() if n not in self._tuning.rows},
        )  # fmt: skip

    def _hparams(self, block: Block) -> dict[str, Tensor]:
        """One value for all, or one a tensor."""
        dtype, device = block.layout.dtype, block.layout.device
        shared = self._tuning.shared
        rows = {n: t.values() for n, t in self._tuning.rows.items()}
        return {n: (v[0] if shared else v).to(device, dtype) for n, v in rows.items()}

    def observe(
        self, block: Block, values: Mapping[str, Any], grads: Tensor, step: Transition, call: Call
    ) -> None:
        """Take note of a step that is about to be written."""
        problem, hparams = self._problem(block, values), self._hparams(block)
        point = Point(step.params.clone(), dict(step.state), call, step.clock, grads.clone())
        call.known = point.params, point.grads  # type: ignore[assignment]
        if self._memory is None:
            self._memory = self._estimator.init(problem, point, hparams)
        self._memory = self._estimator.observe(problem, self._memory, point, hparams)
        self._last = call

    def signal(self, block: Block, values: Mapping[str, Any], grads: Tensor) -> Tensor:
        """dL/d(raw) for an outer gradient: shape (hyperparameters, tensors or 1)."""
        problem, hparams = self._problem(block, values), self._hparams(block)
        if self._memory is None:
            return torch.zeros(len(hparams), 1, dtype=grads.dtype, device=grads.device)
        state = {k: block.state[k] for k in block.state}
        clock = problem.start(grads, hparams).clock._replace(age=block.age())
        end = Point(block.weights(), state, self._last, clock)
        found, self._memory = self._estimator.solve(problem, self._memory, end, hparams, grads)
        if found.solution is not None and not self._warned and bool(found.solution.diverged):
            self._warned = True
            log.warning(
                "the linear solve diverged and its best iterate is used, with a relative residual "
                "of %.2g: add damping, or take fewer terms", float(found.solution.residual),
            )  # fmt: skip
        slopes = {n: t.slopes().to(grads) for n, t in self._tuning.rows.items()}
        rows = [
            (found.grads[n] * (slopes[n][0] if self._tuning.shared else slopes[n])).reshape(-1)
            for n in hparams
        ]
        return torch.stack(rows)
