"""Where the last good weights are kept: a copy of the model for a rare event."""

from __future__ import annotations

import torch
from torch import Tensor

SNAPSHOTS = ("device", "host", "bf16")
SMALL = 2**16
"""Weights of a model below which a copy costs nothing, and is exact by default."""


def resolve(snapshots: str | None, weights: int) -> str:
    """Where copies are kept, by default: in bfloat16, and exactly those of a small model.

    Examples:
        >>> resolve(None, 1000), resolve(None, 10**6), resolve("host", 10**6)
        ('device', 'bf16', 'host')
    """
    return snapshots or ("device" if weights < SMALL else "bf16")


def copy(weights: Tensor, snapshots: str) -> Tensor:
    """A copy to keep, into which others can be written.

    Args:
        weights: Of which.
        snapshots: ``"device"``: beside them; ``"host"``: in the memory of the CPU; ``"bf16"``: in
            bfloat16, to three digits, where they are float32 or float64.
    """
    if snapshots == "host" and weights.device.type != "cpu":
        kept = torch.empty_like(weights, device="cpu", pin_memory=weights.is_cuda)
        return kept.copy_(weights)
    if snapshots == "bf16" and weights.dtype in (torch.float32, torch.float64):
        return weights.to(torch.bfloat16)
    return weights.clone()
