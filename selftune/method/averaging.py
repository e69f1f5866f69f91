"""The outer point, at which the validation loss is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selftune._arguments import Number, check
from selftune._gradient import plainly


@dataclass(frozen=True)
class Average:
    """A running average of the iterates, ``w̄₊ = ρ w̄ + (1 − ρ) w``.

    Measured at the last iterate, a greedy hypergradient always lowers the learning rate, to
    reduce gradient noise at once. In the average the noise is already averaged out, so the
    hypergradient measures progress. The first iterates have equal weights: at step t, ρ is at most
    1 − 1/(t + 2).

    Args:
        rho: ρ; the average covers about 1/(1 − ρ) steps; 0 for the last iterate.

    Raises:
        ValueError: ρ is outside [0, 1).

    Source: Polyak & Juditsky 1992; use as outer point: this library.
    """

    rho: float = 0.98

    def __post_init__(self) -> None:
        check({"rho": Number(least=0, below=1)}, vars(self))

    @property
    def stride(self) -> int:
        """Steps between two iterates that enter the average, at most 4.

        Examples:
            >>> Average().stride, Average(0.0).stride
            (4, 1)
        """
        return max(1, min(4, round(0.08 / (1 - self.rho))))

    def weight(self, step: int, stride: int = 1) -> float:
        """The weight ``1 − ρᵏ`` of the newest iterate; at first, that of a plain mean.

        Args:
            step: Steps so far, including this one; the initial weights count twice.
            stride: k, steps between two averaged iterates.

        Examples:
            >>> Average().weight(0), round(Average().weight(1000), 2)
            (0.5, 0.02)
        """
        return 1 - min(self.rho**stride, max(0.0, 1 - stride / (step + 2)))


def statistics_momentum(momentum: float | None, every: int) -> float | None:
    """The momentum of BatchNorm's statistics of the averaged weights: 1 − (1 − m)^(every/2).

    Passes at the averaged weights are ``every`` times less frequent than training passes, and
    these weights change more slowly.
    """
    return momentum and 1 - (1 - momentum) ** max(1.0, every / 2)


def move_towards(average: Tensor, newest: Tensor, share: float | Tensor) -> Tensor:
    """``average += share · (newest − average)``, in place, computed in the wider dtype."""
    if not isinstance(share, Tensor) and average.dtype == newest.dtype and plainly():
        return average.lerp_(newest, share)
    wide = torch.promote_types(average.dtype, newest.dtype)
    share = share.to(wide) if isinstance(share, Tensor) else share
    # vmap has no rule for lerp_
    return average.copy_(torch.lerp(average.to(wide), newest.to(wide), share))
