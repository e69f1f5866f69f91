"""Embedding of the features of a table."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from selftune._arguments import COUNT, Number, checked
from selftune.search._shape import Shape
from selftune.search._space import Space

FREQUENCIES = 16
"""Number of sines per feature."""

DIMS = 12
"""Embedding dimension of a feature."""

MOST = 128
"""Largest number of features that are embedded: the first layer has ``DIMS`` inputs for each."""


class Periodic(nn.Module):
    """Embeds each feature separately, by a linear map of its sines and cosines.

    ``eᵢ = ReLU(Wᵢ [sin 2πcᵢxᵢ, cos 2πcᵢxᵢ] + bᵢ)`` with trained frequencies c, initially
    normal. A network of such features fits functions that vary steeply in one feature, as trees do.

    Args:
        features: Number of features n.
        scale: Standard deviation of the initial frequencies, for features of variance 1; larger
            values fit steeper functions.
        frequencies: Number of frequencies per feature.
        dims: Embedding dimension d of a feature.

    Examples:
        >>> Periodic(4, 0.3)(torch.randn(8, 4)).shape
        torch.Size([8, 48])

    Source: Gorishniy et al. 2022, "On Embeddings for Numerical Features in Tabular Deep Learning".
    """

    @checked(features=COUNT, scale=Number(above=0), frequencies=COUNT, dims=COUNT)
    def __init__(
        self, features: int, scale: float = 0.3, frequencies: int = FREQUENCIES, dims: int = DIMS
    ) -> None:
        super().__init__()
        width = 2 * frequencies
        self.frequency = nn.Parameter(scale * torch.randn(features, frequencies).clamp(-3, 3))
        limit = 1 / math.sqrt(width)  # as in torch.nn.Linear
        self.weight = nn.Parameter(torch.empty(features, width, dims).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.empty(features, dims).uniform_(-limit, limit))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, n) → (batch, n d)."""
        angle = 2 * math.pi * self.frequency * x.unsqueeze(-1)
        waves = torch.cat([angle.sin(), angle.cos()], -1)
        return (torch.einsum("bnk,nkd->bnd", waves, self.weight) + self.bias).relu().flatten(1)


def first_layer(shape: Shape, frequency: float) -> tuple[nn.Module, int]:
    """The first layer of a network for vectors, and its number of outputs.

    With ``frequency`` 0 the features themselves, which larger tables and other data always keep.
    """
    size = math.prod(shape.inputs)
    if not frequency or shape.kind != "table" or size > MOST:
        return nn.Flatten(), size
    return Periodic(size, frequency), size * DIMS


def inputs(space: Space, shape: Shape) -> tuple[nn.Module, int]:
    """The first layer, with a searched frequency for tables."""
    frequency = 0.0
    if shape.kind == "table" and math.prod(shape.inputs) <= MOST:
        frequency = space.suggest_categorical("frequency", (0.0, 0.1, 0.3, 1.0))
    return first_layer(shape, frequency)
