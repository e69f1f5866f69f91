"""Maps between an unconstrained *raw* value and a constrained hyperparameter.

Gradient steps are taken on raw values, in which equal steps mean equal changes of what
matters: ratios for a learning rate (``Log``), odds for a momentum (``Logit``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class AbstractBijection(ABC):
    """An increasing map from raw to constrained values, with its inverse and slope."""

    def __eq__(self, other: object) -> bool:
        """Maps of one kind are equal."""
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @abstractmethod
    def forward(self, raw: Tensor) -> Tensor:
        """The constrained value."""

    @abstractmethod
    def inverse(self, value: Tensor) -> Tensor:
        """The raw value."""

    @abstractmethod
    def slope(self, value: Tensor) -> Tensor:
        """The derivative of ``forward`` at the constrained ``value``."""


class Identity(AbstractBijection):
    """``value = raw``, for hyperparameters that may take any sign."""

    def forward(self, raw: Tensor) -> Tensor:
        """The value itself."""
        return raw

    def inverse(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def slope(self, value: Tensor) -> Tensor:
        """One everywhere."""
        return torch.ones_like(value)


class Log(AbstractBijection):
    """``value = exp(raw)``, for positive values that span decades: rates and penalties."""

    def forward(self, raw: Tensor) -> Tensor:
        """``exp(raw)``."""
        return raw.exp()

    def inverse(self, value: Tensor) -> Tensor:
        """``log(value)``."""
        return value.log()

    def slope(self, value: Tensor) -> Tensor:
        """``exp(raw)``, which is the value."""
        return value


class Logit(AbstractBijection):
    """``value = 1/(1 + exp(-raw))``, for values between 0 and 1: momentum, betas, dropout."""

    def forward(self, raw: Tensor) -> Tensor:
        """The logistic function."""
        return raw.sigmoid()

    def inverse(self, value: Tensor) -> Tensor:
        """The log-odds ``log(value / (1 - value))``."""
        return value.logit()

    def slope(self, value: Tensor) -> Tensor:
        """``value · (1 - value)``."""
        return value * (1 - value)


class Softplus(AbstractBijection):
    """``value = log(1 + exp(raw))``: positive, and linear where it is large."""

    def forward(self, raw: Tensor) -> Tensor:
        """The softplus, without overflow for large raw values."""
        return torch.nn.functional.softplus(raw)

    def inverse(self, value: Tensor) -> Tensor:
        """``value + log(1 - exp(-value))``."""
        return value + (-torch.expm1(-value)).log()

    def slope(self, value: Tensor) -> Tensor:
        """The logistic function of the raw value, ``1 - exp(-value)``."""
        return -torch.expm1(-value)
