"""Gradients of Δ-STN: weights at the unperturbed point, sensitivities on the linearised network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from selftune._modes import buffers_kept
from selftune.hypernet.conversion import SelfTuned
from selftune.nn import Stochastic


def delta_backward(
    net: SelfTuned, loss: Callable[[Any], Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    """Add the gradients of Δ-STN to ``.grad``, instead of ``loss(net(…)).backward()``.

    The weights get the gradients of the loss at the unperturbed point, ``∇L(f(x; w); z)``, and the
    sensitivities those of ``L(f(x; w) + ∂f/∂w J δ; z + δ)`` with w held constant. One pass in
    forward mode computes value and tangent. Layers without forward derivatives (LSTM on a CPU) use
    differences of outputs.

    Args:
        net: The converted model, in training mode.
        loss: Function of the model's output; may read ``net.value(name)``.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model.

    Returns:
        The loss at the unperturbed point, detached.

    Raises:
        ValueError: The model is in evaluation mode.
        RuntimeError: Examples are perturbed under autocast, in a model with norms or Softmax.

    Examples:
        >>> import torch, selftune as st
        >>> model = torch.nn.Sequential(st.nn.Dropout(0.2), torch.nn.Linear(4, 2))
        >>> net = st.hypernet.convert(model)
        >>> x, y = torch.randn(8, 4), torch.randn(8, 2)
        >>> loss = st.hypernet.delta_backward(net, lambda out: (out - y).square().mean(), x)
        >>> all(p.grad is not None for p in net.weights())
        True

    Source: Bae & Grosse 2020, equations 12 and 13.
    """
    if not net.training:
        raise ValueError("net is in evaluation mode: call net.train() before training passes")
    delta, net._present = net.perturbation(args, kwargs)  # first, while .grad takes no memory
    modules = (m for m in net.model.modules() if not isinstance(m, Stochastic))
    with buffers_kept(modules):  # BatchNorm's statistics are of one pass
        if net.report.per_example:
            _by_example(net, loss, delta, args, kwargs)
        else:
            _by_batch(net, loss, delta, args, kwargs)
    value = loss(net.centred(args, kwargs))
    value.backward()
    return value.detach()


def _by_example(net: SelfTuned, loss: Any, delta: Tensor, args: Any, kwargs: Any) -> None:
    """Reverse over forward through the hooks, at a primal of 0 with tangent δ."""
    response = list(net.response_parameters())
    with _explained(net), forward_ad.dual_level(), net.linearised(), sdpa_kernel(SDPBackend.MATH):
        out = net.at(forward_ad.make_dual(torch.zeros_like(delta), delta), args, kwargs)
        parts = tree_map(forward_ad.unpack_dual, out)
    value = loss(tree_map(_near, parts, is_leaf=lambda p: hasattr(p, "tangent")))
    with _explained(net):
        grads = torch.autograd.grad(value, response, allow_unused=True)
    _accumulate(response, grads)


@contextmanager
def _explained(net: SelfTuned) -> Iterator[None]:
    """Explains errors under autocast, where torch has no forward derivatives of some layers."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not torch.is_autocast_enabled(net.raw.device.type):
            raise
        raise RuntimeError(
            "delta_backward failed under torch.autocast, where torch cannot differentiate norms "
            f"and Softmax with respect to the perturbations of examples ({error}): call it "
            "outside of autocast, or convert the model with perturb='batch'"
        ) from error


def _near(part: Any) -> Tensor:
    value = part.primal.detach()
    return value if part.tangent is None else value + part.tangent


def _by_batch(net: SelfTuned, loss: Any, delta: Tensor, args: Any, kwargs: Any) -> None:
    """The gradient w.r.t. all weights of the linearised network, then w.r.t. sensitivities."""
    named = dict(net.model.named_parameters())
    moves = {p.name: net.along(p, delta).detach() for p in net._places}
    leaves = {n: named[n].detach().requires_grad_() for n in moves}
    draws = [m for m in net.model.modules() if isinstance(m, Stochastic)]
    counters = [m.key.clone() for m in draws]

    def rewind() -> None:
        for module, key in zip(draws, counters, strict=True):
            module.key.copy_(key)

    try:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            along = {n: forward_ad.make_dual(leaves[n], moves[n]) for n in leaves}
            out, tangent = forward_ad.unpack_dual(net.at(delta, args, kwargs, along))
            along.clear()
    except NotImplementedError:
        rewind()
        step = torch.finfo(delta.dtype).eps ** 0.5
        out = net.at(delta, args, kwargs, leaves)
        rewind()
        with torch.no_grad():
            beside = {n: w + step * moves[n] for n, w in leaves.items()}
            tangent = (net.at(delta, args, kwargs, beside) - out) / step
    there = (out.detach() if tangent is None else out.detach() + tangent.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(loss(there), there)
    moves.clear()  # free copies of the weights before the next ones
    del tangent
    grads = list(torch.autograd.grad(out, list(leaves.values()), slope, allow_unused=True))
    move = delta / net.unit
    for place in net._places:
        grad = grads.pop(0)
        if grad is None:
            continue
        gains = net.gains[place.key]
        if place.key not in net.rows:
            _accumulate([gains], [torch.outer(grad.reshape(-1), move)])
            continue
        rows = net.rows[place.key]
        grad = grad.reshape(rows.shape)
        lengths = (rows.detach() * grad).sum(1)
        across = grad.mul_((gains.detach() @ move)[:, None])
        _accumulate([gains, rows], [torch.outer(lengths, move), across])


def _accumulate(params: Any, grads: Any) -> None:
    for param, grad in zip(params, grads, strict=True):
        if grad is not None:
            param.grad = grad if param.grad is None else param.grad.add_(grad)
