"""Directions in the space of hyperparameters, and tangents of weights along them."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from selftune.problem import Hparams, Point, Problem
from selftune.rules._base import State


class Tangent(NamedTuple):
    """Sensitivities of weights and state along each direction.

    Attributes:
        params: Shape (directions, N).
        state: State of the rule, each of shape (directions, N).
        moving: The directions, by hyperparameter, each of shape (directions, …).
    """

    params: Tensor
    state: State
    moving: dict[str, Tensor]


Bend = Callable[[Tensor, Hparams], Tensor]
"""Derivative of the training gradient along a direction of weights and hyperparameters."""


def basis(hparams: Hparams) -> dict[str, Tensor]:
    """One direction for each entry of each hyperparameter."""
    sizes = [h.numel() for h in hparams.values()]
    like = next(iter(hparams.values()))
    parts = torch.eye(sum(sizes), dtype=like.dtype, device=like.device).split(sizes, dim=1)
    return {
        n: part.reshape(len(part), *h.shape)
        for (n, h), part in zip(hparams.items(), parts, strict=True)
    }


def entries(rows: Tensor, hparams: Hparams) -> dict[str, Tensor]:
    """A value for each direction of ``basis``, in the shapes of the hyperparameters."""
    parts = rows.split([h.numel() for h in hparams.values()])
    return {n: p.reshape(h.shape) for (n, h), p in zip(hparams.items(), parts, strict=True)}


def still(point: Point, moving: dict[str, Tensor]) -> Tangent:
    """Zero tangents."""
    count = len(next(iter(moving.values())))

    def zeros(tensor: Tensor) -> Tensor:
        return tensor.new_zeros((count, *tensor.shape))

    return Tangent(zeros(point.params), {k: zeros(v) for k, v in point.state.items()}, moving)


def pushed(
    problem: Problem, tangent: Tangent, point: Point, hparams: Hparams, bend: Bend, discount: float
) -> Tangent:
    """Tangents after the step from ``point``: ``γ ∂U/∂(w,s) · J + ∂U/∂h``."""

    def push(params: Tensor, state: State, moving: Hparams) -> tuple[Tensor, State]:
        params, state = discount * params, {k: discount * v for k, v in state.items()}
        bent = bend(params, moving)
        return problem.push_update(point, hparams, (params, state), bent, moving)

    rows = (tangent.params, tangent.state, tangent.moving)
    params, state = over_rows(problem, push, rows)
    return Tangent(params, state, tangent.moving)


def over_rows(problem: Problem, push: Callable[..., Any], rows: tuple[Any, ...]) -> Any:
    """Map a function over directions, by vmap or, if torch cannot map the model, by a loop."""
    products = problem.products
    if products.mapped:
        try:
            return vmap(push, randomness="same")(*rows)
        except (RuntimeError, NotImplementedError) as error:
            products.mapped = False
            products.refused["vmap"] = str(error).strip().splitlines()[0]
    count = len(rows[0])
    parts = tree_map(lambda t: list(t.unbind()), rows)
    moved = [push(*tree_map(itemgetter(i), parts, is_leaf=_listed)) for i in range(count)]
    return tree_map(lambda *t: torch.stack(t), *moved)


def _listed(part: Any) -> bool:
    return isinstance(part, list)
