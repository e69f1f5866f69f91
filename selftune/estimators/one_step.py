"""The response to the last step only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from selftune.estimators._rows import AbstractRows
from selftune.update import Tangents, Transition


@dataclass(frozen=True)
class OneStep(AbstractRows):
    """``J₊ = ∂U/∂z``: what this step's hyperparameters did to the weights, nothing older.

    Greedy: it sees no consequence beyond one step, so on its own it shrinks the learning rate
    too early (short-horizon bias, Wu et al. 2018).

    Args:
        stride: Steps from one that is observed to the next.
        closed_forms: As in :class:`~selftune.estimators.Trace`.

    Source: Baydin et al. 2018, eq. 5; Chandra et al. 2022.
    """

    stride: int = 1
    closed_forms: bool = True
    discount: float = field(default=0.0, init=False, repr=False)

    def push(
        self, tangents: Tangents, transition: Transition, slopes: Mapping[str, Any]
    ) -> Tangents:
        """Forget, then add what this step contributes."""
        return transition.push(tangents, slopes, 0.0)
