"""A model's training as a bilevel problem."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from selftune._arguments import FUNCTION, MODULE, NONE, Instance, checked
from selftune._binding import functional_call
from selftune._flat import Layout
from selftune.problem import Hparams, Problem
from selftune.rules._base import concatenated
from selftune.update import Update

UPDATE = Instance((Update,), "a selftune.Update, such as st.Update(st.rules.SGD())")


def flat(model: nn.Module, buffers: bool = True) -> tuple[Tensor, Callable[[Tensor, Any], Any]]:
    """Convert a model to a vector of its trained parameters and a pure function of it.

    Args:
        model: Any module. Buffers are read, but changes to them are discarded.
        buffers: Whether to copy buffers at each call, as needed for modules in training mode.

    Returns:
        The parameters, shape (N,), and ``call(params, *inputs)``.

    Raises:
        ValueError: The model has no trained parameters, or complex ones.

    Examples:
        >>> import torch
        >>> weights, call = flat(torch.nn.Linear(3, 2))
        >>> weights.shape, call(weights, torch.ones(5, 3)).shape
        (torch.Size([8]), torch.Size([5, 2]))
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("model has no parameters that require a gradient")
    whole = next((n for n, p in named.items() if p.is_complex()), None)
    if whole is not None:
        raise ValueError(
            f"model: {whole} is complex: store it as real numbers, with torch.view_as_real"
        )
    layout = Layout(list(named.values()))
    kept = dict(model.named_buffers())
    hollow = _hollow(model)

    def call(params: Tensor, *inputs: Any) -> Any:
        views = zip(named.items(), layout.views(params), strict=True)
        tensors = {n: v.to(p.dtype) for (n, p), v in views}
        buffers_now = {n: b.clone() if buffers else b for n, b in kept.items()}
        return functional_call(hollow, {**tensors, **buffers_now}, inputs)

    with torch.no_grad():
        return layout.flatten(list(named.values())).clone(), call


def _hollow(model: nn.Module) -> nn.Module:
    """The model without its trained weights, so that they are stored only once."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo |= {id(p): nn.Parameter(p.new_empty(0)) for p in model.parameters() if p.requires_grad}
    try:
        return copy.deepcopy(model, memo)
    except RuntimeError:  # it stores non-leaf tensors, which torch does not copy
        return model


@checked(model=MODULE, loss_fn=FUNCTION, update=UPDATE, outer_loss_fn=FUNCTION | NONE)
def as_problem(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    update: Update,
    *,
    outer_loss_fn: Callable[..., Tensor] | None = None,
    by_tensor: bool = False,
    **options: Any,
) -> tuple[Problem, Tensor]:
    """Convert a model's training to a bilevel problem, and its weights to a vector.

    Batches are pairs ``(inputs, target)``. Hyperparameters that the update does not read are passed
    to ``loss_fn(output, target, name=…)`` by name.

    Args:
        model: The model, already in training or evaluation mode.
        loss_fn: Training loss of output and target.
        update: The update rule.
        outer_loss_fn: Validation loss of output and target; by default ``loss_fn``.
        by_tensor: Whether hyperparameters of the update may have a value for each parameter tensor.
        options: Options of :class:`Problem`.

    Raises:
        ValueError: ``options=`` has an entry that the update does not know.

    Examples:
        >>> import torch, selftune as st
        >>> problem, weights = as_problem(
        ...     torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, Update(st.rules.SGD())
        ... )
        >>> weights.shape
        torch.Size([4])
    """
    known = {*update.hparams, *update.rule.defaults, "maximize"}
    for name in options.get("options", {}).keys() - known:
        raise ValueError(f"options: {name!r} is unknown to the update: use some of {sorted(known)}")
    weights, call = flat(model)
    outer = outer_loss_fn or loss_fn

    def outputs(params: Tensor, hparams: Hparams, batch: Any) -> Any:
        return call(params, batch[0])

    def criterion(output: Any, hparams: Hparams, batch: Any) -> Tensor:
        others = {n: h for n, h in hparams.items() if n not in update.hparams}
        return loss_fn(output, batch[1], **others)

    trained = [p for p in model.parameters() if p.requires_grad]
    layout, rate = Layout(trained), options.pop("rate", lambda step: 1.0)
    own, rates = concatenated(update.rule.by_parameter(model, trained), layout)
    if own:
        options["options"] = {**options.get("options", {}), **own}
    if by_tensor:
        sizes = layout.sizes
        index = torch.arange(len(sizes), device=weights.device)
        options["segments"] = index.repeat_interleave(torch.tensor(sizes, device=weights.device))
    problem = Problem(
        update=update.joined(layout),
        inner_loss=lambda w, h, batch: criterion(outputs(w, h, batch), h, batch),
        outer_loss=lambda w, batch: outer(call(w, batch[0]), batch[1]),
        split=(outputs, criterion),
        shapes=layout.shapes,
        rate=(lambda step: rate(step) * rates) if own else rate,
        **options,
    )
    return problem, weights
