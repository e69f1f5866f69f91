"""The eligibility trace: forward mode without curvature, discounted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selftune._arguments import Number, Whole, check
from selftune.estimators._rows import AbstractRows
from selftune.update import Tangents, Transition


@dataclass(frozen=True)
class Trace(AbstractRows):
    """``J₊ = γ (∂U/∂(w,s)) J + ∂U/∂z``: forward mode with the Hessian dropped.

    The discount γ stands in for the contraction that the dropped Hessian brings, so J reaches
    back about 1/(1 − γ) steps. Cost: a few elementwise operations and one vector of the size
    of the weights for each hyperparameter; no second derivatives, so any model works.

    Args:
        discount: γ, from 0 (one step back) to 1 (exact where the loss has no curvature).
        stride: Steps from one that is observed to the next, which stands for all between.
        closed_forms: Take the sensitivities to the learning rate, to its decay and to a weight
            decay that shrinks weights from a closed form, with less noise and in less memory,
            instead of pushing them through each step.

    Raises:
        ValueError: A discount outside 0…1, or a stride below 1.

    Source: Sutton 1992 (IDBD); Donini et al. 2020 (MARTHE), eq. 8.
    """

    discount: float = 0.9
    stride: int = 1
    closed_forms: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        check({"discount": Number(least=0, most=1), "stride": Whole(least=1)}, vars(self))

    def push(
        self, tangents: Tangents, transition: Transition, slopes: Mapping[str, Any]
    ) -> Tangents:
        """Discount, push through the update, add what this step contributes."""
        return transition.push(tangents, slopes, self.discount, self.stride)
