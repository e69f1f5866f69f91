"""Gradients of pure functions, by the fastest method in each context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def gradient(
    function: Callable[[list[Tensor]], tuple[Tensor, Any]], params: list[Tensor]
) -> tuple[list[Tensor], Tensor, Any]:
    """Gradients, value and auxiliary outputs of a function.

    Uses :func:`torch.func.grad` when compiling, inside function transforms, and if the result may
    be differentiated. Otherwise uses plain autograd, with the same kernels as the user's own loop:
    under torch.func, the kernels of an LSTM are less than half as fast on a CPU.
    """
    if not plainly():
        grads, (value, rest) = torch.func.grad_and_value(function, has_aux=True)(params)
        return grads, value, rest
    leaves = [p.detach().requires_grad_() for p in params]
    with torch.enable_grad():
        value, rest = function(leaves)
        if value.requires_grad:
            grads = list(torch.autograd.grad(value, leaves, materialize_grads=True))
        else:
            grads = [torch.zeros_like(p) for p in leaves]
    return grads, value.detach(), tree_map_only(Tensor, Tensor.detach, rest)


def pulling(
    function: Callable[[Tensor], Any], params: Tensor
) -> tuple[Any, Callable[[Any], Tensor]]:
    """The outputs of a function, and its vector-Jacobian product."""
    if not plainly():
        value_and_pull: Any = torch.func.vjp(function, params)
        return value_and_pull[0], lambda cotangent: value_and_pull[1](cotangent)[0]
    leaf = params.detach().requires_grad_()
    with torch.enable_grad():
        out = function(leaf)
    ends = [t for t in tree_leaves(out) if t.requires_grad]

    def pulled(cotangent: Any) -> Tensor:
        pairs = zip(tree_leaves(out), tree_leaves(cotangent), strict=True)
        given = [c for t, c in pairs if t.requires_grad]
        return torch.autograd.grad(ends, leaf, given, materialize_grads=True)[0]

    return tree_map_only(Tensor, Tensor.detach, out), pulled


def nodes(tensor: Tensor) -> Iterator[Any]:
    """The nodes of a tensor's graph."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def plainly() -> bool:
    """Whether plain autograd suffices: under ``no_grad``, not transformed or compiled."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return not (transformed or torch.is_grad_enabled() or torch.compiler.is_compiling())
