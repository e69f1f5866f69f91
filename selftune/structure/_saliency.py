"""The increase of the loss without each unit, estimated from one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selftune._trees import unchanged
from selftune.structure.gates import AbstractGated, gated

Closure = Callable[[], Tensor]


def saliency(
    model: nn.Module, closure: Closure, needed: Collection[str] | None = None
) -> dict[str, Tensor]:  # fmt: skip
    """Second-order estimate of the increase of the loss without each gated unit, by module.

    With ``c_n = g ∂ℓ_n/∂g`` of example n, the Gauss-Newton estimate of the Hessian by the Fisher
    information gives ``½ mean_n c_n²``. The first-order term is omitted: it is 0 at a minimum, and
    mostly noise before.

    Args:
        model: A model with gates, used by the closure.
        closure: Returns a mean loss over examples, dimension ``batch_dim`` of the gates' inputs.
        needed: Names of modules whose gates the loss must depend on; None: all.
    """
    rows: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    modules = dict(gated(model))
    with ExitStack() as hooks:
        for name, module in modules.items():
            hook = partial(_watch, rows, sizes, name)
            hooks.enter_context(module.register_forward_hook(hook))
        with torch.enable_grad():
            tuned = {n: m.gates for n, m in modules.items() if m.gates.requires_grad}
            loss = loss_of(closure)
            inputs = list(tuned.values())
            grads = torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else ()
    for name, grad in zip(tuned, grads, strict=True):
        # Without per-example gradients: ½ N (mean c_n)², which has the same mean if E c_n = 0.
        if grad is not None and name in sizes:
            rows[name] = (modules[name].gates.detach() * grad).flatten()[None]
    missed = sorted(set(modules if needed is None else needed) - set(rows))
    if missed:
        raise ValueError(
            f"closure: its loss does not depend on the gates of {', '.join(missed)}: it must run "
            "the model that the goal was made for, with gates that require a gradient; of a "
            "compiled model, the original one, because hooks do not run in compiled code"
        )
    saliencies = {n: 0.5 * len(c) * c.square().sum(0) for n, c in rows.items()}
    return {n: s * sizes.get(n, 1) for n, s in saliencies.items()}


def loss_of(closure: Closure) -> Tensor:
    loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"closure returned {what}: return the validation loss, a scalar tensor")
    if not loss.requires_grad:
        raise ValueError(
            "closure: its loss has no gradient: compute it without torch.no_grad(), by the model "
            "that has the gates or choices, with gates that require a gradient"
        )
    return loss


def _watch(
    rows: dict[str, Tensor], sizes: dict[str, int], name: str, module: AbstractGated, args: Any,
    output: Any,
) -> None:  # fmt: skip
    """Accumulate ``c_n / N`` of a module, shape (examples, units), in the backward pass.

    If ``passed`` of the module returns None, store its number of examples instead.
    """
    value = module.passed(args[0].detach(), output)
    if value is None:
        sizes[name] = args[0].shape[module.batch_dim]
        return
    # A copy of the output itself, which later operations may change in place.
    value = value.detach().clone() if value is output else value.detach()

    def add(grad: Tensor) -> None:
        slopes = module.per_unit(grad * value)
        known = rows.get(name)
        rows[name] = slopes if known is None or known.shape != slopes.shape else known + slopes

    if output.requires_grad:
        output.register_hook(add)


def buffers_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Restore buffers, such as running statistics, after the block; masks may change."""
    masks = {id(module.mask) for _, module in gated(model)}
    return unchanged(b for b in model.buffers() if id(b) not in masks)
