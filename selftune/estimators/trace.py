"""The eligibility trace: forward mode without curvature, discounted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selftune._arguments import COUNT, FLAG, SHARE, check
from selftune.estimators._rows import AbstractRows
from selftune.update import Tangents, Transition


@dataclass(frozen=True)
class Trace(AbstractRows):
    """``J₊ = γ (∂U/∂(w,s)) J + ∂U/∂z``: forward mode without the Hessian.

    The discount γ replaces the contraction by the Hessian, so J covers about 1/(1 − γ) steps. Cost:
    a few elementwise operations and one vector of the size of the weights for each hyperparameter.
    It needs no second derivatives, so it works with any model.

    Args:
        discount: γ, from 0 (horizon of one step) to 1 (exact for a loss without curvature).
        stride: Steps between two tracked steps; each represents all steps since the last one.
        closed_forms: Use closed forms of the sensitivities to the learning rate, its decay and a
            weight decay that shrinks weights, with less noise and memory, instead of propagating
            them through each step.

    Raises:
        ValueError: The discount is outside 0…1, or the stride is below 1.

    Source: Sutton 1992 (IDBD); Donini et al. 2020 (MARTHE), eq. 8.
    """

    discount: float = 0.9
    stride: int = 1
    closed_forms: bool = True

    def __post_init__(self) -> None:
        check({"discount": SHARE, "stride": COUNT, "closed_forms": FLAG}, vars(self))

    def push(
        self, tangents: Tangents, transition: Transition, slopes: Mapping[str, Any]
    ) -> Tangents:
        """Discount, propagate through the update, and add the contribution of this step."""
        return transition.push(tangents, slopes, self.discount, self.stride)
