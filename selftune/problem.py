"""The bilevel problem as pure functions of one vector of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from selftune._flat import Layout
from selftune.products import Products
from selftune.rules._base import State
from selftune.update import Clock, Update

Hparams = Mapping[str, Tensor]
InnerLoss = Callable[[Tensor, Hparams, Any], Tensor]
OuterLoss = Callable[[Tensor, Any], Tensor]


class Point(NamedTuple):
    """Where a run is before a step, and the batch it takes.

    Attributes:
        params: The weights, shape (N,).
        state: The rule's state.
        batch: The training batch of the step.
        clock: When it is.
    """

    params: Tensor
    state: State
    batch: Any
    clock: Clock


@dataclass(frozen=True, kw_only=True)
class Problem:
    """``min_h L_val(w_T(h))``, where ``(w, s)₊ = U(w, s, ∇L_train(w, h; batch), h)``.

    Hyperparameters are tensors by name: those of the update (``lr``, ``momentum``, strengths of
    penalties, …) may have the shape of the weights, and all others go to ``inner_loss``.

    Args:
        update: The weight step.
        inner_loss: ``inner_loss(params, hparams, batch)``, without the update's penalties.
        outer_loss: ``outer_loss(params, batch)``.
        options: The rule's options, and hyperparameters that are not asked for, by name.
        rate: The schedule's factor by step.
        backend: How second derivatives are taken (:class:`~selftune.products.Products`).

    Example:
        >>> import torch, selftune as st
        >>> from selftune.update import Update
        >>> problem = Problem(
        ...     update=Update(st.rules.SGD()),
        ...     inner_loss=lambda w, h, batch: ((w - batch) ** 2).sum() / 2,
        ...     outer_loss=lambda w, batch: (w * batch).sum(),
        ... )
        >>> start, lr = torch.zeros(2), {"lr": torch.tensor(0.5)}
        >>> end = problem.run(start, lr, [torch.ones(2)] * 2)
        >>> end.params
        tensor([0.7500, 0.7500])
    """

    update: Update
    inner_loss: InnerLoss
    outer_loss: OuterLoss
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: Callable[[int], float] = lambda step: 1.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Make the products, whose choice of a backend is remembered."""
        object.__setattr__(self, "products", Products(self.inner_loss, self.backend))

    products: Products = field(init=False, repr=False)

    def values(self, hparams: Hparams) -> dict[str, Any]:
        """Everything the update reads."""
        fixed = dict.fromkeys(self.update.hparams, 0.0) | dict(self.update.rule.defaults)
        return {**fixed, **self.options, **hparams}

    def start(self, params: Tensor, hparams: Hparams, batch: Any = None) -> Point:
        """The point before the first step."""
        state = self.update.rule.init(params, self.values(hparams))
        return Point(params, state, batch, Clock(0, self.rate(0), 0))

    def gradient(self, point: Point, hparams: Hparams) -> Tensor:
        """∇L_train, without the update's penalties."""
        return self.products.gradient(point.params, hparams, point.batch)

    def step(self, point: Point, hparams: Hparams, batch: Any = None) -> Point:
        """The next point, which takes ``batch``."""
        grads = self.gradient(point, hparams)
        params, state = self.moved(point, grads, hparams)
        step = point.clock.step + 1
        return Point(params, state, batch, Clock(step, self.rate(step), point.clock.age + 1))

    def moved(self, point: Point, grads: Tensor, hparams: Hparams) -> tuple[Tensor, State]:
        """Weights and state after a step along given gradients: differentiable, elementwise."""
        values = self.values(hparams)
        params, after = self.update(point.params, grads, point.state, values, point.clock)
        return params, {k: after[k] for k in point.state}

    def points(self, params: Tensor, hparams: Hparams, batches: Iterable[Any]) -> Iterable[Point]:
        """The points of a run, one before each step and the last after all."""
        point = self.start(params, hparams)
        for batch in batches:
            point = point._replace(batch=batch)
            yield point
            point = self.step(point, hparams)
        yield point

    def run(self, params: Tensor, hparams: Hparams, batches: Iterable[Any]) -> Point:
        """The point after all batches."""
        *_, end = self.points(params, hparams, batches)
        return end

    # derivatives of a step

    def push(
        self, point: Point, hparams: Hparams, tangent: tuple[Tensor, State], moving: Hparams
    ) -> tuple[Tensor, State]:
        """The step's derivative along a direction, curvature included.

        Args:
            point: Before the step.
            hparams: All hyperparameters asked for.
            tangent: Direction of weights and state.
            moving: Direction of hyperparameters.
        """
        curved = self.products.push(point.params, hparams, point.batch)(tangent[0], moving)
        return self.push_update(point, hparams, tangent, curved, moving)

    def push_update(
        self,
        point: Point,
        hparams: Hparams,
        tangent: tuple[Tensor, State],
        grads_dot: Tensor,
        moving: Hparams,
    ) -> tuple[Tensor, State]:
        """The step's derivative where that of the gradient is known."""

        def moved(params: Tensor, state: State, grads: Tensor, h: Hparams) -> Any:
            return self.moved(point._replace(params=params, state=state), grads, h)

        primals = (point.params, dict(point.state), self.gradient(point, hparams), dict(hparams))
        found: tuple[Tensor, State] = jvp(moved, primals, (*tangent, grads_dot, dict(moving)))[1]
        return found

    def pull(
        self, point: Point, hparams: Hparams, cotangent: tuple[Tensor, State]
    ) -> tuple[tuple[Tensor, State], dict[str, Tensor]]:
        """The transpose of ``push``: cotangents before the step, and those of hyperparameters."""

        def moved(params: Tensor, state: State, grads: Tensor, h: Hparams) -> Any:
            return self.moved(point._replace(params=params, state=state), grads, h)

        primals = (point.params, dict(point.state), self.gradient(point, hparams), dict(hparams))
        params, state, grads, direct = vjp(moved, *primals)[1](cotangent)
        curved, mixed = self.products.pull(point.params, hparams, point.batch)(grads)
        return (params + curved, state), {n: direct[n] + mixed[n] for n in hparams}


def flat(model: nn.Module, buffers: bool = True) -> tuple[Tensor, Callable[[Tensor, Any], Any]]:
    """A model as a vector of its trained parameters and a pure function of it.

    Args:
        model: Any module; buffers are read and what passes write to them is dropped.
        buffers: Whether to copy buffers at each call, which modules in training mode need.

    Returns:
        The parameters, shape (N,), and ``call(params, *inputs)``.

    Example:
        >>> import torch
        >>> weights, call = flat(torch.nn.Linear(3, 2))
        >>> weights.shape, call(weights, torch.ones(5, 3)).shape
        (torch.Size([8]), torch.Size([5, 2]))
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    layout = Layout(list(named.values()))
    kept = dict(model.named_buffers())

    def call(params: Tensor, *inputs: Any) -> Any:
        tensors = dict(zip(named, layout.views(params), strict=True))
        held = {n: b.clone() if buffers else b for n, b in kept.items()}
        return functional_call(model, {**tensors, **held}, inputs)

    with torch.no_grad():
        return layout.flatten(list(named.values())).clone(), call
