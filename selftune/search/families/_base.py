"""Base class of families: functions from a search space to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from selftune.search._shape import Shape
from selftune.search._space import Space


def dropout(space: Space) -> nn.Module:
    """Dropout with a searched rate; tuning it within a run costs an extra gradient per step."""
    return nn.Dropout(space.suggest_categorical("dropout", (0.0, 0.1, 0.3)))


@dataclass(frozen=True)
class AbstractFamily(ABC):
    """Builds a model of one kind for a data set.

    Depth, width and dropout are searched; other hyperparameters are tuned within the run.

    Args:
        shape: Shape of the data.
    """

    shape: Shape

    @abstractmethod
    def __call__(self, space: Space) -> nn.Module:
        """A model.

        Raises:
            ValueError: The family does not support this kind of data.
        """


class Rows(nn.Module):
    """Converts inputs to sequences of vectors: word embeddings, image rows, or single numbers.

    Attributes:
        size: Length of each vector.
        length: Sequence length of the data set.
        dims: Number of dimensions of one example.
    """

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.words = None if shape.words is None else nn.Embedding(shape.words, width)
        inputs = shape.inputs
        self.dims = len(inputs)  # known before a batch, so that torch.fx can trace forward
        self.length = inputs[-2] if len(inputs) > 2 else inputs[0]
        if self.words is not None:
            self.size = width
        elif len(inputs) == 1:
            self.size = 1
        else:
            self.size = inputs[-1] * (inputs[0] if len(inputs) > 2 else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, length, size)."""
        if self.words is not None:
            return self.words(x)
        if self.dims == 1:
            return x.unsqueeze(-1)
        if self.dims == 3:
            return x.transpose(1, 2).flatten(2)  # rows, of all channels
        return x


class Closed(nn.Sequential):
    """A ``Sequential`` whose output has the shape of the target."""

    def __init__(self, shape: Shape, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self._shape.close(super().forward(x))
