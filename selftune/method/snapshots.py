"""Storage of the last good weights."""

from __future__ import annotations

import torch
from torch import Tensor

SNAPSHOTS = ("device", "host", "bf16")
SMALL = 2**16
"""Models with fewer weights have exact snapshots by default, and a candidate."""


def kinds(weights: int) -> tuple[str, ...]:
    """The snapshots of a model: the last good weights and, if it is small, a candidate.

    The candidate will be good if later losses confirm it; a large model has none, to save memory.

    Examples:
        >>> kinds(1000), kinds(10**6)
        (('good', 'candidate'), ('good',))
    """
    return ("good", "candidate") if weights < SMALL else ("good",)


def resolve(snapshots: str | None, weights: int) -> str:
    """The storage, by default bfloat16, or exact for a small model.

    Examples:
        >>> resolve(None, 1000), resolve(None, 10**6), resolve("host", 10**6)
        ('device', 'bf16', 'host')
    """
    return snapshots or ("device" if weights < SMALL else "bf16")


def copy(weights: Tensor, snapshots: str) -> Tensor:
    """A copy, into which later snapshots can be written.

    Args:
        weights: The weights to copy.
        snapshots: ``"device"`` for an exact copy on the device, ``"host"`` for an exact copy in the
            CPU's memory, ``"bf16"`` for bfloat16 (three digits) if they are float32 or float64.
    """
    if snapshots == "host" and weights.device.type != "cpu":
        kept = torch.empty_like(weights, device="cpu", pin_memory=weights.is_cuda)
        return kept.copy_(weights)
    if snapshots == "bf16" and weights.dtype in (torch.float32, torch.float64):
        return weights.to(torch.bfloat16)
    return weights.clone()
