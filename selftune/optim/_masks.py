"""Exact zeros and frozen parameters, which averages and snapshots follow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from selftune._flat import local
from selftune.optim._block import Block, Look

PRIME = 2**31 - 1


def apply_masks(
    block: Block, looks: dict[Tensor, Look], now: int, steps: float, *, thresholded: bool,
    kept: list[tuple[Tensor, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Apply masks and frozen parameters to the average and the snapshots of a block.

    A weight that is exactly 0, as under a mask that the user applies after every step, is 0 in them
    too (only in the average if a penalty thresholds weights). Frozen parameters are copied if
    others were trained since they were frozen.

    Args:
        block: The block.
        looks: The last look at each parameter with exact zeros.
        now: Steps of the run.
        steps: Updates of the parameter that has been updated most often.
        thresholded: Whether a penalty sets weights to 0.
        kept: Receives the changed tensors with their values before, or None.
    """
    params, ages, layout = block.params, block.ages(), block.layout
    least = [0.0] * len(params)
    if layout.native and all(layout.sizes):  # a GPU would synchronise
        least = torch.stack(torch._foreach_norm(params, -math.inf)).tolist()
    touched = [i for i, p in enumerate(params) if not (p.requires_grad and least[i] > 0)]
    there = {params[i] for i in touched}
    for param in (p for p in params if p in looks and p not in there):
        _before(looks, param, 0, now)
    flats = [block.part.average, *block.snapshots.values()]
    views = [layout.views(flat) for flat in flats] if touched else []
    for index in touched:
        param = params[index]
        if param.requires_grad:  # read here, not from the local shard
            zeros = local(param) == 0
            held = zeros if thresholded else _held(looks, param, zeros, now)
            for view in views[: 1 if thresholded else None]:
                _keep(kept, view[index]).masked_fill_(held.to(view[index].device), 0.0)
        elif ages[index] < steps:
            for view in views:
                _keep(kept, view[index]).copy_(local(param))


def _keep(kept: list[tuple[Tensor, Tensor]] | None, tensor: Tensor) -> Tensor:
    if kept is not None:
        kept.append((tensor, tensor.clone()))
    return tensor


def _held(looks: dict[Tensor, Look], param: Tensor, zeros: Tensor, now: int) -> Tensor:
    """The zeros of a parameter if they are those of the last look, or it never had any.

    Weights that only touch 0, as with ``clamp_(min=0)`` after every step, are not held there.
    """
    places = _hash(zeros)
    before = _before(looks, param, places, now)
    return zeros if before is None else zeros & (places == before)


def _hash(zeros: Tensor) -> Tensor:
    """A number of the places of zeros, 0 without any, from their counts by row and by column."""
    table = torch.atleast_1d(zeros)[:, None].flatten(1)
    counts = torch.cat([table.sum(0), table.sum(1)])
    order = torch.arange(1, len(counts) + 1, device=counts.device)
    return (counts * (order**3 % PRIME)).sum()  # two sums of cubes are seldom equal


def _before(looks: dict[Tensor, Look], param: Tensor, places: Any, now: int) -> Any:
    """Record the hash of the zeros of a parameter; return that at an earlier step."""
    look = looks.get(param)
    before = None if look is None else look.before if look.step == now else look.places
    looks[param] = Look(now, places, before)
    return before
