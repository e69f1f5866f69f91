"""The bilevel problem, as pure functions of a vector of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from selftune._graphs import Function, Graphs, compile_alone
from selftune.hparams import Hparam
from selftune.products import Products
from selftune.rules._base import State
from selftune.update import Clock, Point, Update

Hparams = Mapping[str, Tensor]
InnerLoss = Callable[[Tensor, Hparams, Any], Tensor]
OuterLoss = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """``min_h L_val(w_T(h))``, where ``(w, s)₊ = U(w, s, ∇L_train(w, h; batch), h)``.

    Hyperparameters are tensors by name: those of the update (``lr``, ``momentum``, strengths of
    penalties, …) may have the shape of the weights; all others are passed to ``inner_loss``.

    Args:
        update: The update rule.
        inner_loss: ``inner_loss(params, hparams, batch)``, without the update's penalties.
        outer_loss: ``outer_loss(params, batch)``.
        options: Options of the rule, and hyperparameters without a hypergradient, by name; by
            default those of the rule.
        rate: Factor of the schedule as a function of the step.
        segments: Segment of each weight, shape (N,): hyperparameters of the update may then have
            one value for each segment (a layer, a parameter group).
        shapes: Shapes of the concatenated parameter tensors, if needed.
        scales: Scale and bounds of the objective's hyperparameters; by default logarithmic.
        split: ``inner_loss`` in two parts, ``outputs(params, hparams, batch)`` and
            ``criterion(outputs, hparams, batch)``, for the Gauss-Newton matrix.
        backend: Method for second derivatives (:class:`~selftune.products.Products`).
        graphs: Compiles functions of estimators.

    Examples:
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
    segments: Tensor | None = None
    shapes: Sequence[torch.Size] | None = None
    scales: Mapping[str, Hparam] = field(default_factory=dict)
    split: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None
    backend: str = "auto"
    graphs: Graphs | None = None
    products: Products = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Create the products, which store their backend."""
        object.__setattr__(self, "products", Products(self.inner_loss, self.backend))
        fixed = dict.fromkeys(self.update.hparams, 0.0) | dict(self.update.rule.defaults)
        object.__setattr__(self, "options", {**fixed, **self.options})

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parameter tensors of a vector of shape (N,)."""
        if self.shapes is None:
            return [vector]
        parts = vector.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def scale(self, name: str) -> Hparam | None:
        """Scale and bounds of a hyperparameter, if known."""
        return self.scales.get(name) or self.update.hparams.get(name)

    def values(self, hparams: Hparams) -> dict[str, Any]:
        """All values that the update reads."""
        known = self.update.hparams
        spread = {n: self._spread(h) if n in known else h for n, h in hparams.items()}
        return {**self.options, **spread}

    def _spread(self, hparam: Tensor) -> Tensor:
        """Expand one value per segment to one per weight."""
        return hparam if self.segments is None or not hparam.ndim else hparam[self.segments]

    def _check_shape(self, name: str, hparam: Tensor, weights: int) -> None:
        """Raise an error for hyperparameters of the update with a wrong shape."""
        if name not in self.update.hparams or not hparam.ndim:
            return
        fits = weights if self.segments is None else int(self.segments.max()) + 1
        if hparam.shape != (fits,):
            one = "weight" if self.segments is None else "segment"
            raise ValueError(
                f"hparams[{name!r}] has shape {tuple(hparam.shape)}, which must be () for one "
                f"value, or ({fits},) for one per {one}"
            )

    def gather(self, single: Tensor, hparam: Tensor) -> Tensor:
        """Derivatives w.r.t. a hyperparameter, from those w.r.t. its value at each weight.

        Args:
            single: Derivatives at each weight, shape (N,).
            hparam: Its value: one for all, for each segment or for each weight.
        """
        if not hparam.ndim:
            return single.sum()
        if self.segments is None:
            return single
        return torch.zeros_like(hparam).index_add(0, self.segments, single)

    def start(self, params: Tensor, hparams: Hparams, batch: Any = None) -> Point:
        """The point before the first step."""
        for name, hparam in hparams.items():
            self._check_shape(name, hparam, params.numel())
        state = self.update.rule.init(params, self.values(hparams))
        return Point(params, state, batch, Clock(0, self.rate(0), 0))

    def gradient(self, point: Point, hparams: Hparams) -> Tensor:
        """∇L_train, without the update's penalties."""
        if point.grads is not None:
            return point.grads
        return self.products.gradient(point.params, hparams, point.batch)

    def known(self, point: Point, hparams: Hparams) -> Point:
        """The point with its gradient stored."""
        return point._replace(grads=self.gradient(point, hparams))

    def step(self, point: Point, hparams: Hparams, batch: Any = None) -> Point:
        """The next point, with ``batch`` as its batch."""
        grads = self.gradient(point, hparams)
        params, state = self.moved(point, grads, hparams)
        step = point.clock.step + 1
        return Point(params, state, batch, Clock(step, self.rate(step), point.clock.age + 1))

    def moved(self, point: Point, grads: Tensor, hparams: Hparams) -> tuple[Tensor, State]:
        """Weights and state after a step along given gradients; differentiable."""
        values = {**self.values(hparams), **(point.options or {})}
        params, after = self.update(point.params, grads, point.state, values, point.clock)
        return params, {k: after[k] for k in point.state}

    def points(self, params: Tensor, hparams: Hparams, batches: Iterable[Any]) -> Iterable[Point]:
        """The points of a run, one before each step and one after the last."""
        point = self.start(params, hparams)
        for batch in batches:
            point = self.known(point._replace(batch=batch), hparams)
            yield point
            point = self.step(point, hparams)
        yield point

    def run(self, params: Tensor, hparams: Hparams, batches: Iterable[Any]) -> Point:
        """The point after all batches."""
        *_, end = self.points(params, hparams, batches)
        return end

    def graph(self, name: str, function: Function) -> Function:
        """A function of tensors, the same object for each name; compiled on request."""
        return function if self.graphs is None else self.graphs(name, function)

    def compiled(self) -> Problem:
        """The same problem with compiled functions of estimators.

        Examples:
            >>> import torch, selftune as st
            >>> problem, weights = st.as_problem(
            ...     torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, Update(st.rules.SGD())
            ... )
            >>> fast = problem.compiled()  # for many estimates of the same shapes
        """
        return replace(self, graphs=Graphs(compile_alone))

    # influence of hyperparameters

    def check_influence(self, point: Point, hparams: Hparams) -> None:
        """Raise an error for hyperparameters that neither the update nor the training loss reads.

        Raises:
            ValueError: There are such hyperparameters; the message names them.
        """
        outside = [n for n in hparams if n not in self.update.hparams]
        if not outside:
            return
        leaves = {n: h.detach().clone().requires_grad_() for n, h in hparams.items()}
        with torch.enable_grad():
            loss = self.inner_loss(point.params, leaves, point.batch)
            tracked = loss.requires_grad
            slopes = (
                torch.autograd.grad(loss, [leaves[n] for n in outside], allow_unused=True)
                if tracked
                else [None] * len(outside)
            )
        idle = [n for n, g in zip(outside, slopes, strict=True) if g is None]
        if idle:
            raise ValueError(
                f"hparams {idle} influence neither the training loss nor the update, which reads "
                f"{sorted(self.update.hparams)}: is a name misspelt, or a penalty not passed to "
                "Update?"
            )

    def mixed(self, point: Point, hparams: Hparams) -> Callable[[Hparams], Tensor]:
        """``ḣ ↦ M ḣ``, where M is the derivative of the training gradient w.r.t. h."""
        if all(n in self.update.hparams for n in hparams):
            return lambda moving: torch.zeros_like(point.params)
        push = self.products.push(point.params, hparams, point.batch)
        return lambda moving: push(torch.zeros_like(point.params), moving)

    def gauss_newton(self, point: Point, hparams: Hparams) -> Callable[[Tensor], Tensor]:
        """``v ↦ Jᵀ (∂²criterion/∂outputs²) J v``, positive semi-definite for convex criteria.

        Source: Schraudolph 2002.
        """
        if self.split is None:
            raise ValueError("curvature='gauss-newton' needs Problem(split=(outputs, criterion))")
        outputs, criterion = self.split
        predict = lambda w: outputs(w, hparams, point.batch)  # noqa: E731
        slope = grad(lambda out: criterion(out, hparams, point.batch))

        def product(vector: Tensor) -> Tensor:
            out, moved = jvp(predict, (point.params,), (vector,))  # type: ignore[misc]
            curved = vjp(slope, out)[1](moved)[0]
            return vjp(predict, point.params)[1](curved)[0]

        return product

    # derivatives of a step

    def _step_from(self, point: Point) -> Callable[..., tuple[Tensor, State]]:
        """The step as a function of weights, state, gradient and hyperparameters."""
        return lambda params, state, grads, hparams: self.moved(
            point._replace(params=params, state=state), grads, hparams
        )

    def push_update(
        self,
        point: Point,
        hparams: Hparams,
        tangent: tuple[Tensor, State],
        grads_dot: Tensor,
        moving: Hparams,
    ) -> tuple[Tensor, State]:
        """The step's derivative along a direction, for a known derivative of the gradient.

        Args:
            point: The point before the step.
            hparams: All hyperparameters.
            tangent: Direction of weights and state.
            grads_dot: Derivative of the gradient along it, with curvature.
            moving: Direction of hyperparameters.
        """
        primals = (point.params, dict(point.state), self.gradient(point, hparams), dict(hparams))
        pushed: tuple[Tensor, State] = jvp(
            self._step_from(point), primals, (*tangent, grads_dot, dict(moving))
        )[1]
        return pushed

    def pull(
        self, point: Point, hparams: Hparams, cotangent: tuple[Tensor, State]
    ) -> tuple[tuple[Tensor, State], dict[str, Tensor]]:
        """The transpose of the step's derivative, with curvature.

        Returns:
            Cotangents of the earlier point and of hyperparameters.
        """
        gradient, product = self.products.linear(point.params, hparams, point.batch)
        gradient = gradient if point.grads is None else point.grads
        moved = self._step_from(point)
        update = vjp(moved, point.params, dict(point.state), gradient, dict(hparams))[1]
        params, state, grads, direct = update(cotangent)
        curved, mixed = product(grads)
        return (params + curved, state), {n: direct[n] + mixed[n] for n in hparams}

    def turning(
        self, point: Point, hparams: Hparams
    ) -> Callable[[tuple[Tensor, State]], tuple[Tensor, State]]:
        """``pull`` without the cotangents of hyperparameters, as a function of cotangents.

        The loss is evaluated only once.
        """
        gradient, product = self.products.curvature(point.params, hparams, point.batch)
        gradient = gradient if point.grads is None else point.grads
        moved = self._step_from(point)
        update = vjp(lambda *at: moved(*at, hparams), point.params, dict(point.state), gradient)[1]

        def turn(cotangent: tuple[Tensor, State]) -> tuple[Tensor, State]:
            params, state, grads = update(cotangent)
            return params + product(grads), state

        return turn

    def hessian(self, point: Point, hparams: Hparams) -> Callable[[Tensor], Tensor]:
        """``v ↦ A v``, where A is the derivative of the penalised gradient w.r.t. the weights."""
        product = self.products.curvature(point.params, hparams, point.batch)[1]

        def curve(vector: Tensor) -> Tensor:
            # Computed for each vector, because storing it would keep a copy of the weights.
            penalties = vjp(lambda w: self.penalties(w, hparams), point.params)[1]
            return product(vector).add_(penalties(vector)[0])

        return curve

    def mixing(self, point: Point, hparams: Hparams) -> Callable[[Tensor], dict[str, Tensor]]:
        """``v ↦ vᵀ B``, where B is the derivative of the penalised gradient w.r.t. h."""
        direct = vjp(lambda h: self.penalties(point.params, h), dict(hparams))[1]
        if all(n in self.update.hparams for n in hparams):
            return lambda v: direct(v)[0]
        product = self.products.pull(point.params, hparams, point.batch)

        def mix(vector: Tensor) -> dict[str, Tensor]:
            inside, outside = direct(vector)[0], product(vector)[1]
            return {n: inside[n] + outside[n] for n in hparams}

        return mix

    def penalties(
        self, params: Tensor, hparams: Hparams, options: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The gradient of the update's penalties, optionally with a step's options."""
        nothing = params.new_zeros(()).expand_as(params)
        values = {**self.values(hparams), **(options or {})}
        return self.update.penalised(params, nothing, values)
