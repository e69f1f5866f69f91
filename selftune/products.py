"""Second derivatives of a training loss as matrix-vector products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from selftune._gradient import gradient, nodes
from selftune._modes import random_kept

Values = Mapping[str, Tensor]
Loss = Callable[..., Tensor]
"""A loss of the weights, one vector of shape (N,), of hyperparameters by name, and of a batch."""
Pull = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
Push = Callable[[Tensor, Values], Tensor]

UNEVEN = "its second derivatives are not symmetric, so some of them are wrong"
CLOSE = 0.3
"""Largest relative error of differences in a hyperparameter; kinks of ReLU cause some."""
BACKENDS = ("double backward", "forward over reverse", "differences")


class Products:
    """Products with the curvature ``H = ∂²L/∂w²`` and the mixed derivative ``M = ∂²L/∂w∂h``.

    Three backends agree to rounding, or to the error of finite differences:

    - ``"double backward"``: reverse over reverse, if torch can differentiate the operations twice
      (attention with its MATH kernel, because the fused ones have no second derivative);
    - ``"forward over reverse"``: if all operations have forward derivatives;
    - ``"differences"``: ``(∇L(w + εv) − ∇L(w − εv)) / 2ε``, with first derivatives only, so it
      works with every module, and under autocast.

    ``"auto"`` selects the first that works, at the first product.

    Args:
        loss: The training loss ``loss(params, hparams, *batch)``.
        backend: One of the three, or ``"auto"``.
        relative_step: ε ‖v‖ / max(‖w‖, 1) for differences, with ‖w‖ weighted by v²; by default the
            cube root of the machine epsilon.

    Attributes:
        backend: The current backend; ``"auto"`` until the first product.
        refused: Reasons why other backends failed, by name.
        unmoved: Hyperparameters of the loss whose derivatives are not those of its differences, if
            that is the backend: rates of random masks, and values at the edge of their range.
        mapped: Whether products are mapped over several directions at once; False after torch
            failed to map them.

    Raises:
        ValueError: The backend is unknown.
        RuntimeError: The backend does not work with this loss; the message gives the reason.

    Examples:
        >>> import torch
        >>> products = Products(lambda w, h: (h["scale"] * w**3).sum())
        >>> w, scale = torch.tensor([1.0, 2.0]), {"scale": torch.tensor(2.0)}
        >>> products.pull(w, scale)(torch.tensor([1.0, 1.0]))
        (tensor([12., 24.]), {'scale': tensor(15.)})
        >>> products.backend
        'double backward'

    Source: Pearlmutter 1994.
    """

    def __init__(
        self, loss: Loss, backend: str = "auto", relative_step: float | None = None
    ) -> None:
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend={backend!r} must be 'auto' or one of {BACKENDS}")
        self.loss = loss
        self.backend = backend
        self.refused: dict[str, str] = {}
        self.unmoved: list[str] = []
        self.mapped = True
        self._tried = False
        self._relative = relative_step

    def prepare(self, params: Tensor, hparams: Values, *batch: Any) -> None:
        """Select the backend now, on real tensors, before functions are mapped."""
        self._chosen(params, hparams, *batch)

    def gradient(self, params: Tensor, hparams: Values, *batch: Any) -> Tensor:
        """∇L, shape (N,)."""
        values = dict(hparams)
        return gradient(lambda w: (self._loss(w[0], values, *batch), []), [params])[0][0]

    def _at(self, batch: Sequence[Any], argnums: Any = 0) -> Callable[..., Any]:
        """Gradients on a batch as a function of weights and hyperparameters."""
        return grad(lambda w, h: self._loss(w, h, *batch), argnums=argnums)

    def _loss(self, params: Tensor, hparams: Values, *batch: Any) -> Tensor:
        if self.backend == "differences":
            return self.loss(params, hparams, *batch)
        with sdpa_kernel(SDPBackend.MATH):
            return self.loss(params, hparams, *batch)

    def pull(self, params: Tensor, hparams: Values, *batch: Any) -> Pull:
        """The function ``v ↦ (H v, vᵀ M)``, which evaluates the loss once."""
        return self.linear(params, hparams, *batch)[1]

    def linear(self, params: Tensor, hparams: Values, *batch: Any) -> tuple[Tensor, Pull]:
        """∇L and ``pull``, with shared computations."""
        backend, values = self._chosen(params, hparams, *batch), dict(hparams)
        gradient = self._at(batch)
        if backend == "double backward":
            product: Any = vjp(gradient, params, values)
            return product[0], lambda v: _detached(product[1](v))
        both = self._at(batch, (0, 1))
        if backend == "forward over reverse":
            return gradient(params, values), lambda v: jvp(
                lambda w: both(w, values), (params,), (v,)
            )[1]

        def differences(vector: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            step = self._step(params, vector)
            (up, up_mixed), (down, down_mixed) = (
                both(params + sign * step * vector, values) for sign in (1, -1)
            )
            mixed = {n: (up_mixed[n] - down_mixed[n]) / (2 * step) for n in values}
            return (up - down) / (2 * step), mixed

        return gradient(params, values), differences

    def curvature(
        self, params: Tensor, hparams: Values, *batch: Any
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """∇L and ``v ↦ H v`` only, which is cheaper than ``pull``."""
        if self._chosen(params, hparams, *batch) != "double backward":
            product, pull = self.linear(params, hparams, *batch)
            return product, lambda v: pull(v)[0]
        gradient, values = self._at(batch), dict(hparams)
        primal: Any = vjp(lambda w: gradient(w, values), params)
        return primal[0], lambda v: _detached(primal[1](v)[0])

    def push(self, params: Tensor, hparams: Values, *batch: Any) -> Push:
        """The function ``(v, ḣ) ↦ H v + M ḣ``.

        Raises:
            RuntimeError: Differences do not give M.
        """
        push = self._push(params, hparams, *batch)
        if self.unmoved:
            raise RuntimeError(
                f"this estimator needs the derivative of the training gradient w.r.t. "
                f"{self.unmoved}, which differences of the loss do not give (rates of random "
                "masks, values at the edge of their range), and other backends cannot "
                "differentiate the loss: use Unrolled, or Implicit(through='update')"
            )
        return push

    def _push(self, params: Tensor, hparams: Values, *batch: Any) -> Push:
        backend, values = self._chosen(params, hparams, *batch), dict(hparams)
        gradient = self._at(batch)
        if backend == "double backward":  # the transpose of its transpose
            zero = torch.zeros_like(params)
            back = vjp(vjp(gradient, params, values)[1], zero)[1]
            return lambda v, moving: back((v, dict(moving)))[0]
        if backend == "forward over reverse":
            return lambda v, moving: jvp(gradient, (params, values), (v, dict(moving)))[1]

        def differences(vector: Tensor, moving: Values) -> Tensor:
            step = self._step(params, vector)
            for name, speed in moving.items():
                step = torch.minimum(step, self._step(values[name], speed))
            up, down = (
                gradient(
                    params + sign * step * vector,
                    {n: h + sign * step * moving[n] for n, h in values.items()},
                )
                for sign in (1, -1)
            )
            return (up - down) / (2 * step)

        return differences

    def _step(self, at: Tensor, vector: Tensor) -> Tensor:
        """ε, such that the displacement is small relative to the weights."""
        info = torch.finfo(at.dtype)
        square = vector.square() / vector.square().sum().clamp_min(info.tiny)
        size = ((at.square() * square).sum() / square.square().sum().clamp_min(info.tiny)).sqrt()
        reach = (self._relative or info.eps ** (1 / 3)) * size.clamp_min(1.0)
        return reach / vector.norm().clamp_min(info.tiny**0.5)

    def _chosen(self, params: Tensor, hparams: Values, *batch: Any) -> str:
        """The backend, tried at the first product."""
        if not self._tried:
            self._tried = True
            asked = self.backend
            for self.backend in BACKENDS if asked == "auto" else (asked,):
                # The trial must not advance the generators, because a resumed run repeats it.
                with random_kept(params.device):
                    if self._works(params, hparams, *batch):
                        break
            else:
                remedy = "backend='differences', which only needs first derivatives"
                if "differences" in self.refused:
                    remedy = "an estimator without curvature, such as selftune.estimators.Trace()"
                raise RuntimeError(
                    f"backend={asked!r} cannot differentiate this loss twice: "
                    f"{self.refused[self.backend]}. Use {remedy}"
                )
        return self.backend

    def check_double_backward(self, params: Tensor, hparams: Values, *batch: Any) -> None:
        """Raise an error unless autograd differentiates the loss twice, without mistakes.

        Raises:
            RuntimeError: An operation has no correct second derivative.
        """
        twice = (
            self if self._chosen(params, hparams, *batch) == BACKENDS[0] else Products(self.loss)
        )
        if twice._chosen(params, hparams, *batch) != BACKENDS[0]:
            raise RuntimeError(
                "autograd cannot differentiate this loss twice: "
                f"{twice.refused[BACKENDS[0]]}. Use FiniteDifference, Forward or Unrolled"
            )

    def _plainly(self, params: Tensor, hparams: Values, *batch: Any) -> None:
        """Differentiate by autograd, which marks operations without a second derivative.

        torch.func silently uses 0 as the second derivative of such operations.
        """
        with torch.enable_grad():
            leaf = params.detach().clone().requires_grad_()
            loss = self._loss(leaf, hparams, *batch)
            if not loss.requires_grad:  # the loss does not depend on the weights
                return
            (slope,) = torch.autograd.grad(loss, leaf, create_graph=True, materialize_grads=True)
        if any(node.name() == "torch::autograd::Error" for node in nodes(slope)):
            raise RuntimeError("one of its operations can be differentiated only once")

    @staticmethod
    def _check_symmetry(product: Callable[[Tensor], Tensor], params: Tensor) -> None:
        """Check that ``uᵀ H v = vᵀ H u``, which fails if a second derivative is wrong."""
        u, v = (torch.randn_like(params) for _ in range(2))
        along, back = product(v), product(u)
        size = u.norm() * along.norm() + v.norm() * back.norm()
        if bool((u @ along - v @ back).abs() > 10 * torch.finfo(params.dtype).eps ** 0.5 * size):
            raise RuntimeError(UNEVEN)

    def _works(self, params: Tensor, hparams: Values, *batch: Any) -> bool:
        """Whether the current backend works with this loss; stores the reason otherwise."""
        ones = torch.ones_like(params)
        still = {n: torch.zeros_like(h) for n, h in hparams.items()}
        try:
            if self.backend == "double backward":
                self._plainly(params, hparams, *batch)
            pull = self.pull(params, hparams, *batch)
            curved, _ = pull(ones)
            self._push(params, hparams, *batch)(ones, still)
            if self.backend == "double backward":
                self._check_symmetry(lambda v: pull(v)[0], params)
            elif self.backend == "forward over reverse" and UNEVEN in self.refused.values():
                raise RuntimeError(UNEVEN)
        except (RuntimeError, NotImplementedError) as error:
            self.refused[self.backend] = str(error).strip().splitlines()[0]
            return False
        if self.backend == "differences":
            for name in hparams:
                try:
                    moves = self._moves(name, params, hparams, *batch)
                except (RuntimeError, ValueError):  # at the edge of its range
                    moves = False
                self.unmoved += [] if moves else [name]
            return True
        if bool(curved.any()):
            return True
        # For once-differentiable functions torch.func returns zeros where autograd would raise.
        seen, _ = Products(self.loss, "differences").pull(params, hparams, *batch)(ones)
        noise = torch.finfo(params.dtype).eps ** 0.5 * self.gradient(params, hparams, *batch).norm()
        if bool(seen.norm() > noise):
            self.refused[self.backend] = "the second derivative is silently 0"
            return False
        return True

    def _moves(self, name: str, params: Tensor, hparams: Values, *batch: Any) -> bool:
        """Whether differences in a hyperparameter agree with derivatives, of the loss and of ∇L."""
        moving = {n: torch.ones_like(h) * (n == name) for n, h in hparams.items()}
        along = self._push(params, hparams, *batch)(torch.zeros_like(params), moving)
        slope, size = self.gradient(params, hparams, *batch), along.norm()
        mixed = self.pull(params, hparams, *batch)(along)[1][name].sum()
        step = self._step(hparams[name], moving[name])
        up, down = (
            self._loss(params, {**hparams, name: hparams[name] + sign * step}, *batch)
            for sign in (1, -1)
        )
        leaf = grad(lambda h: self._loss(params, {**hparams, name: h}, *batch))(hparams[name]).sum()
        noise = torch.finfo(params.dtype).eps ** 0.5
        pairs = (
            (size**2, mixed, size * slope.norm()),
            ((up - down) / (2 * step), leaf, up.abs() + down.abs()),
        )
        return all(
            bool((a - b).abs() <= CLOSE * torch.maximum(a.abs(), b.abs()) + noise * unit)
            for a, b, unit in pairs
        )


def _detached(result: Any) -> Any:
    """Without the graph that torch 2.15 attaches to the second derivatives of BatchNorm."""
    return tree_map(Tensor.detach, result)
