"""Tracks units through attention and recurrent layers: heads, chunks and states."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from selftune.structure._operations import ATTENTION
from selftune.structure._units import Channels, Tracked, Units
from selftune.structure.recurrent import Recurrent


def split(units: Units, axis: int, given: Channels, count: int) -> Channels:
    """Split the units into ``count`` consecutive runs, each joined into one unit."""
    size = len(given.ids) // count
    runs = [given.ids[i * size : (i + 1) * size] for i in range(count)]
    for run in runs:
        units.join(run[1:], run[:1] * (size - 1))
    return Channels(axis, [run[0] for run in runs], given.zero.view(count, size).all(1))


def transposed(follower: Tracked, node: fx.Node, given: Channels, value: Tensor) -> Channels:
    """Two axes exchanged."""
    a, b = _dims(node, value.ndim)
    axis = {a: b, b: a}.get(given.axis, given.axis)
    return Channels(axis, given.ids, given.zero)


def permuted(follower: Tracked, node: fx.Node, given: Channels, value: Tensor) -> Channels:
    """Axes in another order."""
    return Channels(_dims(node, value.ndim).index(given.axis), given.ids, given.zero)


def _dims(node: fx.Node, ndim: int) -> list[int]:
    rest: Any = [*node.args[1:], *node.kwargs.values()]
    listed = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    return [d % ndim for d in listed]


def softmax(
    follower: Tracked, node: fx.Node, given: Channels, value: Tensor
) -> Channels | None:  # fmt: skip
    """Softmax over another axis, which does not keep 0 at 0."""
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(dim, int) or dim % value.ndim == given.axis:
        return follower.unknown(node)
    return given.shifted()


def attended(follower: Tracked, node: fx.Node, value: Tensor) -> Channels | None:
    """Matrix products of each head, which is one unit; 0 where the values are 0."""
    count = 3 if node.target in ATTENTION else 2
    parts = [follower.channels[a] for a in node.args[:count] if isinstance(a, fx.Node)]
    known = [c for c in parts if c is not None]
    if (
        len(known) < count
        or known[0].axis >= value.ndim - 2
        or _by_head(follower, node, known[0], value)
    ):
        return follower.unknown(node)
    return follower.join(node, known, operator.or_ if count == 2 else lambda _, last: last)


def _by_head(follower: Tracked, node: fx.Node, heads: Channels, value: Tensor) -> bool:
    """Whether an attention mask has an entry for each head, which would have to be removed."""
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    if not isinstance(mask, fx.Node):
        return False
    shape = follower.values[mask].shape
    axis = len(shape) - value.ndim + heads.axis
    return axis >= 0 and shape[axis] != 1


def chunks(follower: Tracked, node: fx.Node, given: Channels) -> None:
    """Parts of the units, or the same units in all parts."""
    args: dict[str, Any] = dict(zip(("input", "chunks", "dim"), node.args, strict=False))
    args |= node.kwargs
    values: tuple[Tensor, ...] = follower.values[node]
    if args.get("dim", 0) % values[0].ndim != given.axis:
        follower.pieces[node] = [given] * len(values)
        return
    sizes, made, at = [v.shape[given.axis] for v in values], [], 0
    for size in sizes:
        zero = given.zero[at : at + size]
        made.append(Channels(given.axis, given.ids[at : at + size], zero))
        at += size
    # torch.chunk splits the remaining units equally, so the same number is removed from each part.
    for part in made[1:]:
        if len(part.ids) == len(made[0].ids):
            follower.units.join(made[0].ids, part.ids)
        else:
            follower.units.need(given)
    follower.pieces[node] = made


def item(follower: Tracked, node: fx.Node) -> Channels | None:
    """One part of a tuple."""
    source, at = node.args
    assert isinstance(source, fx.Node)
    piece = follower.pieces[source][at]  # type: ignore[index]
    if isinstance(piece, list):
        follower.pieces[node] = piece
        return None
    known: Channels | None = piece
    return known


def indexed(follower: Tracked, node: fx.Node, given: Channels) -> Channels | None:
    """Positions of other axes, such as the last step of a sequence, ``x[:, -1]``."""
    index: Any = node.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    before = follower.values[node.all_input_nodes[0]].ndim
    if any(p is Ellipsis for p in parts):
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        named = sum(p is not None for p in parts) - 1
        parts[at : at + 1] = [slice(None)] * (before - named)
    if not all(p is None or isinstance(p, (int, slice)) for p in parts):
        return follower.unknown(node)
    axes = [i for i, p in enumerate(parts) if p is not None]  # None adds an axis
    place = axes[given.axis] if given.axis < len(axes) else len(parts)
    if place < len(parts) and parts[place] != slice(None):
        return follower.unknown(node)
    kept = sum(not isinstance(p, int) for p in parts[:place]) + max(0, given.axis - len(axes))
    return Channels(kept, given.ids, given.zero)


def squeezed(follower: Tracked, node: fx.Node, given: Channels, value: Tensor) -> Channels | None:
    """An axis of size 1 added or removed, other than that of the units."""
    dims = [*node.args[1:], *node.kwargs.values()]
    before = follower.values[node.all_input_nodes[0]].ndim
    if len(dims) != 1 or not isinstance(dims[0], int):  # all axes of size 1, perhaps the units'
        return follower.unknown(node)
    moved = value.ndim - before
    axis = dims[0] % max(before, value.ndim)
    if moved <= 0 and axis == given.axis:
        return follower.unknown(node)
    before_units = axis <= given.axis if moved > 0 else axis < given.axis
    return Channels(given.axis + (moved if before_units else 0), given.ids, given.zero)


def recurrent(
    follower: Tracked, node: fx.Node, module: Recurrent, given: Channels | None
) -> None:  # fmt: skip
    """A recurrent layer: rows and columns of its units, in a block for each of its own gates."""
    units, cell, path = follower.units, module.cell, str(node.target)
    inner, size = f"{path}.cell", len(module.gates)
    if given is not None and given.axis == follower.values[node][0].ndim - 1:
        units.cut(inner, cell, "weight_ih_l0", 1, given.ids, ["input_size"])
        units.use(given)
    else:
        follower.unknown(node)
        follower.keep(inner, cell, "weight_ih_l0", 1)
    ids, times = units.new(size), 4 if isinstance(cell, nn.LSTM) else 3
    zero = module.closed(follower.threshold).cpu()
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        if hasattr(cell, name):
            units.cut(inner, cell, name, 0, ids * times)
    units.cut(inner, cell, "weight_hh_l0", 1, ids, ["hidden_size"])
    for name in ("gates", "mask"):
        units.cut(path, module, name, 0, ids)
    axis = follower.values[node][0].ndim - 1
    output, h = Channels(axis, ids, zero), Channels(2, ids, zero)
    units.use(output)
    state: Any = h
    if times == 4:  # c of a closed unit is not 0
        state = [h, h.shifted()]
    follower.pieces[node] = [output, state]
