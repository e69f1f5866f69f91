"""Memory of a self-tuned optimizer besides the weights: names, sizes and reasons."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from selftune._trees import leaves
from selftune.optim._block import Block


class Entry(NamedTuple):
    """One row of the memory table.

    Attributes:
        name: Name of the state.
        size: Bytes.
        why: Its use.
    """

    name: str
    size: int
    why: str


class Memory(NamedTuple):
    """The memory of an optimizer as a printable table.

    Attributes:
        weights: Bytes of the trained parameters.
        entries: The state besides them.
    """

    weights: int
    entries: list[Entry]

    @property
    def total(self) -> int:
        """Bytes of all entries."""
        return sum(e.size for e in self.entries)

    def __str__(self) -> str:
        rows = [("kept", "MB", "÷ weights", "why")]
        every = [*self.entries, Entry("total", self.total, "besides the weights")]
        for name, size, why in every:
            rows.append((name, f"{size / 1e6:.2f}", f"{size / self.weights:.2f}", why))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            f"{name:<{widths[0]}}  {size:>{widths[1]}}  {share:>{widths[2]}}  {why}"
            for name, size, share, why in rows
        )


def memory_of(blocks: list[Block], inner: object) -> Memory:
    rules = tree_leaves([*(b.part.rule for b in blocks), inner])
    rows = [[p.averaged, p.recent, p.tangents] for p in (b.part for b in blocks)]
    kinds = {
        "rule state": ((t for t in rules if isinstance(t, Tensor)), "as in torch's optimizer"),
        "average": ((b.part.average for b in blocks), "where the validation loss is measured"),
        "sensitivities": (leaves(rows), f"of {_share(blocks)} of the weights, to hyperparameters"),
        "displacement": ((t for b in blocks for t in (b.centre, b.mark)), "limits the rate"),
        "stiff directions": (
            (t for b in blocks for s in b.secants for t in s), "for weight decay and penalties"
        ),
        "last good weights": (
            (b.good for b in blocks), "restored when a run diverges or worsens"
        ),
        "candidate": (
            (b.snapshots[kind] for b in blocks for kind in b.snapshots if kind != "good"),
            "good if later losses confirm it; small models only",
        ),
        "step": (
            (t for b in blocks for t in b.scratch.values()),
            "weights and gradients as vectors, where steps are pure",
        ),
    }  # fmt: skip
    entries = [Entry(name, sum(map(_size, tensors)), why) for name, (tensors, why) in kinds.items()]
    weights = sum(_size(p) for b in blocks for p in b.params)
    return Memory(weights, [e for e in entries if e.size])


def _size(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) is Tensor:
        return tensor.numel() * tensor.element_size()
    return sum(_size(getattr(tensor, name)) for name in flatten()[0])  # 8-bit state, say


def _share(blocks: list[Block]) -> str:
    kept, weights = sum(sum(b.pieces) for b in blocks), sum(b.layout.numel for b in blocks)
    return "all" if kept == weights else f"1/{weights / kept:.0f}"
