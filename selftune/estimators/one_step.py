"""Sensitivity to the last step only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from selftune._arguments import COUNT, FLAG, check
from selftune.estimators._rows import AbstractRows
from selftune.update import Tangents, Transition


@dataclass(frozen=True)
class OneStep(AbstractRows):
    """``J₊ = ∂U/∂z``: the effect of the last step's hyperparameters on the weights.

    Greedy: with a horizon of one step it lowers the learning rate too early (short-horizon bias,
    Wu et al. 2018).

    Args:
        stride: Steps between two tracked steps.
        closed_forms: As in :class:`~selftune.estimators.Trace`.

    Raises:
        ValueError: The stride is below 1.

    Source: Baydin et al. 2018, eq. 5; Chandra et al. 2022.
    """

    stride: int = 1
    closed_forms: bool = True
    discount: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        check({"stride": COUNT, "closed_forms": FLAG}, vars(self))

    def push(
        self, tangents: Tangents, transition: Transition, slopes: Mapping[str, Any]
    ) -> Tangents:
        """Replace the sensitivities by the contribution of this step."""
        return transition.push(tangents, slopes, 0.0)
