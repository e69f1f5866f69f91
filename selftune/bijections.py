"""Maps between an unconstrained *raw* value and a constrained hyperparameter.

Gradient steps are taken on raw values, where equal steps are equal ratios of a learning rate
(``Log``), of the odds of a dropout rate (``Logit``), or of the memory of a momentum in steps
(``Memory``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class AbstractBijection(ABC):
    """An increasing map from raw to constrained values, with its inverse and slope.

    Attributes:
        domain: Valid values in words, for error messages.
    """

    domain: ClassVar[str]

    def __eq__(self, other: object) -> bool:
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

    domain = "finite"

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

    domain = "above 0"

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
    """``value = 1/(1 + exp(-raw))``, for values between 0 and 1, such as dropout rates."""

    domain = "above 0 and below 1"

    def forward(self, raw: Tensor) -> Tensor:
        """The logistic function."""
        return raw.sigmoid()

    def inverse(self, value: Tensor) -> Tensor:
        """The log-odds ``log(value / (1 - value))``."""
        return value.logit()

    def slope(self, value: Tensor) -> Tensor:
        """``value · (1 - value)``."""
        return value * (1 - value)


class Memory(AbstractBijection):
    """``value = 1 - exp(-raw)``, for momenta and betas: the raw value is the memory's logarithm.

    The memory is 1/(1 − μ), about the number of gradients in a running mean with momentum μ. The
    odds μ/(1 − μ) are not suitable, because their log diverges as μ goes to 0: a change
    from 0.02 to 0.04 would take as many steps as one from 0.9 to 0.95.
    """

    domain = "at least 0 and below 1"

    def forward(self, raw: Tensor) -> Tensor:
        """``1 - exp(-raw)``; raw values are 0 or more."""
        return -torch.expm1(-raw)

    def inverse(self, value: Tensor) -> Tensor:
        """``-log(1 - value)``."""
        return -torch.log1p(-value)

    def slope(self, value: Tensor) -> Tensor:
        """``1 - value``."""
        return 1 - value


class Softplus(AbstractBijection):
    """``value = log(1 + exp(raw))``: positive, and linear for large values."""

    domain = "above 0"

    def forward(self, raw: Tensor) -> Tensor:
        """The softplus, without overflow for large raw values."""
        return torch.nn.functional.softplus(raw)

    def inverse(self, value: Tensor) -> Tensor:
        """``value + log(1 - exp(-value))``."""
        return value + (-torch.expm1(-value)).log()

    def slope(self, value: Tensor) -> Tensor:
        """The logistic function of the raw value, ``1 - exp(-value)``."""
        return -torch.expm1(-value)
