"""Whole-step estimation in an optimizer, with the loss as a closure."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from selftune._flat import local
from selftune._gathered import gradients_apart
from selftune._modes import random_kept
from selftune._trees import unchanged
from selftune.estimators import AbstractEstimator, ImplicitMemory
from selftune.method.whole_step import WholeSteps
from selftune.optim._block import Block
from selftune.optim._shifts import Shifts
from selftune.problem import Point, Problem
from selftune.products import Products, Pull, Push, Values
from selftune.update import Clock, Transition, Update

CHANGED = 0.3
"""Largest relative change of the gradient of a closure at the same weights."""
CONSTANT = 1e-3
"""Largest change of a clipped gradient's norm, relative to the change of the gradient."""


class Call:
    """A training closure that can be evaluated at other weights.

    It is evaluated with the random numbers of its own step; parameters, gradients and the running
    statistics of normalisation layers are restored afterwards.
    """

    def __init__(
        self, closure: Callable[[], Any], block: Block, statistics: Callable[[], list[Tensor]]
    ) -> None:
        self._closure, self._block, self._statistics = closure, block, statistics
        self._device = block.layout.device
        self._random = torch.get_rng_state()
        on_cuda = self._device.type == "cuda"
        self._cuda = torch.cuda.get_rng_state(self._device) if on_cuda else None
        self._known: tuple[Any, Any] | None = None

    def know(self, weights: Tensor, grads: Tensor) -> None:
        """Store weak references to the weights and the gradient of the closure's own step."""
        self._known = weakref.ref(weights), weakref.ref(grads)

    def known(self, weights: Tensor | None = None) -> Tensor | None:
        """The gradient at its own step, if ``weights`` are those of that step or None."""
        at, grads = (None, None) if self._known is None else (r() for r in self._known)
        gradient: Tensor | None = grads if at is weights or weights is None else None
        return gradient

    def check(self, weights: Tensor, expected: Tensor, near: Tensor | None = None) -> None:
        """Raise an error if the gradient of a closure differs from that at its own step.

        ``near`` is its approximate gradient now; if this matches, the exact one is not computed.
        """

        def same(value: Tensor) -> bool:
            return bool((value - expected).norm() <= CHANGED * (expected.norm() + value.norm()))

        if not (near is not None and same(near)) and not same(self.gradient(weights)):
            raise RuntimeError(
                "a closure's gradient differs from that at its own step: each closure must keep "
                "its own batch, as in opt.step(functools.partial(closure, x, y))"
            )

    def gradient(self, weights: Tensor) -> Tensor:
        block = self._block
        changed = unchanged([*map(local, block.params), *self._statistics()])
        try:
            with random_kept(self._device), changed, gradients_apart(block.params):
                torch.set_rng_state(self._random)
                if self._cuda is not None:
                    torch.cuda.set_rng_state(self._cuda, self._device)
                torch.clear_autocast_cache()  # of casts of other weights
                block.layout.write(weights, block.params)
                with torch.enable_grad():
                    self._closure()
                parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in block.params]
                return block.layout.flatten(parts).clone()
        finally:
            torch.clear_autocast_cache()


class _ByClosures(Products):
    """Second derivatives by differences of closures' gradients."""

    def __init__(self) -> None:
        super().__init__(lambda *args: torch.zeros((), device="cpu"), "differences")
        self.mapped = False

    def prepare(self, params: Tensor, hparams: Values, *batch: Any) -> None:
        """Nothing to choose."""

    def gradient(self, params: Tensor, hparams: Values, *batch: Any) -> Tensor:
        gradient: Tensor = batch[0].gradient(params)
        return gradient

    def linear(self, params: Tensor, hparams: Values, *batch: Any) -> tuple[Tensor, Pull]:
        """Zero for hyperparameters, on which the closure does not depend."""
        gradient, product = self.curvature(params, hparams, *batch)
        still = {n: torch.zeros_like(h) for n, h in hparams.items()}
        return gradient, lambda v: (product(v), still)

    def curvature(
        self, params: Tensor, hparams: Values, *batch: Any
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """``v ↦ H v``, which is its own transpose unless the gradient is clipped."""
        gradient, product = self._differences(params, batch[0])
        if not self._tried:
            self._check_norm(params, gradient, batch[0])
            self._tried = True
        return gradient, product

    def push(self, params: Tensor, hparams: Values, *batch: Any) -> Push:
        """``(v, ḣ) ↦ H v``, also for clipped gradients."""
        product = self._differences(params, batch[0])[1]
        return lambda v, moving: product(v)

    def _differences(self, params: Tensor, call: Call) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Products by differences; a known gradient is not computed again."""
        known = call.known(params)
        gradient = call.gradient(params) if known is None else known

        def product(vector: Tensor) -> Tensor:
            up, down, step = self._beside(params, vector, call)
            if known is not None:
                call.check(params, known, (up + down) / 2)
            return (up - down) / (2 * step)

        return gradient, product

    def _beside(self, params: Tensor, vector: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients at ``w + εv`` and ``w − εv``, and ε."""
        step = self._step(params, vector)
        up, down = (call.gradient(params + sign * step * vector) for sign in (1, -1))
        return up, down, step

    def _check_norm(self, params: Tensor, gradient: Tensor, call: Call) -> None:
        """Check that the gradient's norm changes with the weights, in two directions at most."""
        direction = gradient
        for _ in range(2):
            up, down, _ = self._beside(params, direction, call)
            direction, norms = up - down, torch.stack([g.norm() for g in (gradient, up, down)])
            # Also for NaN, which the guard judges.
            if not bool(norms.max() - norms.min() < CONSTANT * direction.norm()):
                return
        raise RuntimeError(
            "a closure clips the norm of its gradient, so its Jacobian is not symmetric, which "
            "this estimator needs: use Forward, or do not clip in closures"
        )


class _ClosureProblem(Problem):
    """A problem with closures as batches, also in copies with other options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "products", _ByClosures())


class ClosureSteps:
    """The steps of an optimizer, for a whole-step estimator."""

    def __init__(self, estimator: AbstractEstimator, update: Update, shifts: Shifts) -> None:
        self._steps, self._update, self._shifts = WholeSteps(estimator), update, shifts
        # The call and time of the last step; its weights and gradient, if not stored elsewhere.
        self._last: tuple[Call, Clock, tuple[Tensor, Tensor] | None] | None = None

    def forget(self) -> None:
        self._steps.forget()
        self._last = None

    def anew(self) -> ClosureSteps:
        """A copy with a copy of the memory, if that has no closures."""
        copied = ClosureSteps(self._steps.estimator, self._update, self._shifts)
        copied.restore(self.saved())
        return copied

    def saved(self) -> Any:
        """A copy of the memory of the steps; None if it has their closures, as that of Unrolled."""
        memory = self._steps.memory
        if isinstance(memory, ImplicitMemory):  # the batch is that of the next step
            memory = memory._replace(batch=None)
        if any(isinstance(leaf, Call) for leaf in tree_leaves(memory)):
            return None
        return tree_map_only(Tensor, lambda t: t.detach().clone(), memory)

    def restore(self, memory: Any) -> None:
        """Continue with a saved memory."""
        self._steps.memory = memory

    def _problem(self, block: Block, values: Mapping[str, Any]) -> Problem:
        """The problem with the group's current options."""
        index = torch.arange(len(block.layout.sizes), device=block.layout.device)
        sizes = torch.tensor(block.layout.sizes, device=block.layout.device)
        return _ClosureProblem(
            update=self._update.joined(block.layout), inner_loss=lambda w, h, b: w.sum(),
            outer_loss=lambda w, b: w.sum(), segments=index.repeat_interleave(sizes),
            shapes=block.layout.shapes,
            options={n: v for n, v in values.items() if n not in self._shifts.rows},
        )  # fmt: skip

    def _hparams(self, block: Block) -> dict[str, Tensor]:
        """One value for all tensors, or one for each."""
        dtype, device = block.layout.dtype, block.layout.device
        shared = self._shifts.shared
        rows = {n: t.values() for n, t in self._shifts.rows.items()}
        return {n: (v[0] if shared else v).to(device, dtype) for n, v in rows.items()}

    def observe(
        self, block: Block, values: Mapping[str, Any], grads: Tensor, step: Transition, call: Call
    ) -> None:
        problem, hparams = self._problem(block, values), self._hparams(block)
        options = {n: v for n, v in values.items() if n not in self._shifts.rows}
        params, grads = step.params.clone(), grads.clone()
        point = Point(params, dict(step.state), call, step.clock, grads, options)
        call.know(params, grads)
        estimator = self._steps.estimator
        if estimator.sees(int(step.clock.step), last=True):
            self._steps.observe(problem, point, hparams)
        kept = None if estimator.sees_all else (params, grads)
        self._last = call, step.clock, kept

    def signal(self, block: Block, values: Mapping[str, Any], grads: Tensor) -> Tensor | None:
        """dL/d(raw) along an outer gradient of length 1: shape (hyperparameters, tensors or 1).

        None if no step was observed since the last restart.
        """
        problem, hparams = self._problem(block, values), self._hparams(block)
        if self._steps.memory is None or self._last is None:
            return None
        call, clock, kept = self._last
        if kept is not None:  # one more pass tells whether the closure still has its batch
            call.check(*kept)
        clock = clock._replace(step=clock.step + 1, age=block.layout.expand(block.ages()))
        end = Point(block.weights(), dict(block.part.rule), call, clock)
        hypergrads = self._steps.estimate(problem, end, hparams, grads)
        slopes = {n: t.slopes().to(grads) for n, t in self._shifts.rows.items()}
        rows = [
            (hypergrads[n] * (slopes[n][0] if self._shifts.shared else slopes[n])).reshape(-1)
            for n in hparams
        ]
        return torch.stack(rows)
