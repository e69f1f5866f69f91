"""The three verbs of an estimator: ``init``, ``observe``, ``estimate``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selftune.update import Tangents, Transition, zero_tangents


class AbstractEstimator(ABC):
    """Watches weight steps and tells how the weights respond to each hyperparameter.

    The estimators of this interface keep the response Jacobian J itself, one row a
    hyperparameter and one column a weight, and drop the curvature of the training loss: each
    weight then responds to its own hyperparameters only, which is why one row serves a
    learning rate shared by all weights as well as one of each layer.

    Attributes:
        stride: Steps from one that is observed to the next.
        discount: γ, what a step keeps of the response before it.
        closed_forms: Whether the tuner takes responses from a closed form where they have one.
    """

    stride: int
    discount: float
    closed_forms: bool

    def init(self, hparams: int, params: Tensor) -> Tangents:
        """No response yet: zeros of shape (hparams, weights)."""
        return zero_tangents(hparams, params)

    @abstractmethod
    def observe(
        self, tangents: Tangents, transition: Transition, slopes: Mapping[str, Any]
    ) -> Tangents:
        """The response after a step. The tensors of ``tangents`` are reused: drop the old."""

    def estimate(self, response: Tensor, outer_grads: Tensor) -> Tensor:
        """Hypergradients of single weights, ``J ∘ ∇w L_val``; sum them over what shares a z."""
        return response * outer_grads
