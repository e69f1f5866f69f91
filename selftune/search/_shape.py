"""Input and output shapes of a data set, inferred from its batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Input shape, number of outputs and task of a data set.

    Attributes:
        inputs: Shape of one example.
        outputs: Number of model outputs: classes, or regression targets.
        task: ``"classification"`` or ``"regression"``.
        words: Vocabulary size if inputs are integers, else None.
        each: Whether there is one target per position of a sequence.
        flat: Whether regression targets have shape (batch,), without a target dimension.
    """

    inputs: tuple[int, ...]
    outputs: int
    task: str
    words: int | None = None
    each: bool = False
    flat: bool = False

    @property
    def kind(self) -> str:
        """``"words"``, ``"table"``, ``"sequence"`` or ``"images"``."""
        if self.words is not None:
            return "words"
        return {1: "table", 2: "sequence"}.get(len(self.inputs), "images")

    def loss(self) -> nn.Module:
        """The standard loss for the task."""
        return Classes() if self.task == "classification" else nn.MSELoss()

    @classmethod
    def of(cls, batches: Iterable[Any]) -> Shape:
        """Infer the shape from all batches, which must be pairs (inputs, target).

        Raises:
            ValueError: There are no batches, or a batch is not a pair of tensors.
        """
        inputs: tuple[int, ...] | None = None
        words = classes = 0
        for batch in batches:
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise ValueError(
                    "candidates='auto' needs batches (inputs, target): for others, pass functions "
                    "that build a model"
                )
            x, y = batch
            if inputs is None:
                inputs = tuple(x.shape[1:])
            if not x.is_floating_point():
                words = max(words, int(x.max()) + 1)
            if y.is_floating_point():
                return cls(inputs, y[0].numel(), "regression", words or None, flat=y.ndim == 1)
            classes = max(classes, int(y.max()) + 1)
        if inputs is None:
            raise ValueError("train has no batches: its shapes cannot be inferred")
        if words:
            words = max(words, classes if y.ndim > 1 else 0)
        return cls(inputs, classes, "classification", words or None, each=y.ndim > 1)

    def close(self, output: Tensor) -> Tensor:
        """Reshape a model output to the shape of the target."""
        return output.squeeze(-1) if self.flat else output


class Classes(nn.CrossEntropyLoss):
    """Cross entropy with classes in the last dimension, over any number of positions."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean over all positions."""
        return super().forward(output.flatten(0, -2), target.flatten())


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The fraction of correct predictions."""
    return (output.argmax(-1) == target).to(torch.float32).mean()
