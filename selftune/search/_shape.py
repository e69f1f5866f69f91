"""What a data set looks like, read off its batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """What models of a data set take and give.

    Attributes:
        inputs: Of one example.
        outputs: How many numbers a model returns: classes, or targets of a regression.
        task: ``"classification"`` or ``"regression"``.
        words: Size of the vocabulary where inputs are integers, or None.
        each: Whether each position of a sequence has a target of its own.
        flat: Whether targets of a regression have no dimension of their own.
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
        """The usual loss of the task."""
        return Classes() if self.task == "classification" else nn.MSELoss()

    @classmethod
    def of(cls, batches: Iterable[Any]) -> Shape:
        """Read off all batches, whose last part is the target.

        Raises:
            ValueError: There is no batch, or it has no inputs and target as tensors.
        """
        inputs: tuple[int, ...] | None = None
        words = classes = 0
        for batch in batches:
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise ValueError(
                    "families='auto' needs batches (inputs, target): pass functions that build a "
                    "model for others"
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
            raise ValueError("train holds no batch: its shapes cannot be read")
        if words:
            words = max(words, classes if y.ndim > 1 else 0)
        return cls(inputs, classes, "classification", words or None, each=y.ndim > 1)

    def close(self, output: Tensor) -> Tensor:
        """An output as the target has it."""
        return output.squeeze(-1) if self.flat else output


class Classes(nn.CrossEntropyLoss):
    """Cross entropy with classes in the last dimension, however many positions there are."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Their mean."""
        return super().forward(output.flatten(0, -2), target.flatten())


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The share that is right."""
    return (output.argmax(-1) == target).to(torch.float32).mean()
