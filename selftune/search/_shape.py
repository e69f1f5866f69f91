"""Input and output shapes of a data set, inferred from its batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AUTO = "candidates='auto'"


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
        """``"words"``, ``"table"``, ``"sequence"``, ``"images"`` or ``"volumes"``."""
        if self.words is not None:
            return "words"
        return {1: "table", 2: "sequence", 3: "images"}.get(len(self.inputs), "volumes")

    def loss(self) -> nn.Module:
        """The standard loss for the task."""
        return Classes() if self.task == "classification" else Squared()

    @classmethod
    def of(cls, batches: Iterable[Any], use: str = AUTO) -> Shape:
        """Infer the shape from all batches, which must be pairs (inputs, target).

        Of batches without a length the first hundred are read.

        Args:
            batches: The batches.
            use: What needs the shape, for the error.

        Raises:
            TypeError: Inputs or targets are not tensors.
            ValueError: There are no batches, a batch is not a pair, or a family cannot learn it.
        """
        inputs: tuple[int, ...] | None = None
        words = classes = 0
        for x, y in _pairs(batches, use):
            if use == AUTO:
                _check_inputs(x)
                _check_targets(y, x)
            inputs = tuple(map(max, inputs or x.shape[1:], x.shape[1:]))
            if not x.is_floating_point():
                words = max(words, int(x.max()) + 1)
            if not y.is_floating_point():
                classes = max(classes, int(y.max()) + 1)
        if inputs is None:
            raise ValueError("train has no batches: its shapes cannot be inferred")
        if use == AUTO and classes == 1:
            raise ValueError("train has targets of class 0 only: there is nothing to learn")
        if y.is_floating_point():
            return cls(inputs, y[0].numel(), "regression", words or None, flat=y.ndim == 1)
        if words:
            words = max(words, classes if y.ndim > 1 else 0)
        return cls(inputs, classes, "classification", words or None, each=y.ndim > 1)

    def with_words_and_classes_of(self, val: Any) -> Shape:
        """The shape with as many words and classes as validation batches need, too.

        Args:
            val: Validation batches; others, such as a share of the training data, have no more.
        """
        if not isinstance(val, Iterable):
            return self
        words, outputs = self.words, self.outputs
        for x, y in _pairs(val, AUTO):
            if words is not None:
                words = max(words, int(x.max()) + 1)
            if self.task == "classification":
                outputs = max(outputs, int(y.max()) + 1)
        if words is not None and self.each:
            words = max(words, outputs)
        return replace(self, words=words, outputs=outputs)

    def close(self, output: Tensor) -> Tensor:
        """Reshape a model output to the shape of the target."""
        return output.squeeze(-1) if self.flat else output


def size_of(batches: Any) -> int | None:
    """The number of batches; None for a stream, also one in a DataLoader."""
    with suppress(TypeError, NotImplementedError):
        return len(batches)
    return None


def some(batches: Iterable[Any]) -> Iterable[Any]:
    """All batches, or the first hundred of those without a length, which may have no end."""
    return islice(batches, 100) if size_of(batches) is None else batches


def _pairs(batches: Iterable[Any], use: str) -> Iterator[tuple[Any, Any]]:
    """Inputs and targets of each batch; an error for other batches names what needs them."""
    for batch in some(batches):
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(
                f"{use} needs batches (inputs, target), not {type(batch).__name__}: for "
                "others, omit it, and pass functions that build a model"
            )
        yield batch[0], batch[1]


def _check_inputs(x: Any) -> None:
    """Raise an error for inputs that no family takes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"train has inputs of type {type(x).__name__}: convert them to tensors")
    dtype, shape = torch.get_default_dtype(), tuple(x.shape)
    if x.is_floating_point() or x.is_complex():
        if x.dtype != dtype:
            raise ValueError(
                f"train has inputs of {x.dtype}: families are {dtype}, convert with x.to({dtype})"
            )
        if x.ndim < 2 or 0 in shape:
            raise ValueError(
                f"train has inputs of shape {shape}: families take (batch, features) or more "
                "dimensions, none of them 0"
            )
        if not bool(x.isfinite().all()):
            raise ValueError("train has inputs that are missing or infinite: replace them first")
    elif x.dtype == torch.bool:
        raise ValueError("train has inputs of torch.bool: convert them with x.float()")
    elif int(x.min()) < 0:
        raise ValueError(f"train has the word index {int(x.min())}: number words from 0")
    elif x.ndim != 2:
        raise ValueError(
            f"train has inputs of {x.dtype} and shape {shape}: integers are word indices of shape "
            "(batch, length); convert images to float first"
        )


def _check_targets(y: Any, x: Tensor) -> None:
    """Raise an error for targets that no family predicts from these inputs."""
    if not isinstance(y, Tensor):
        raise TypeError(f"train has targets of type {type(y).__name__}: convert them to tensors")
    each = not y.is_floating_point() and x.ndim == (3 if x.is_floating_point() else 2)
    if y.ndim not in (1, 2) or not (y.ndim == 1 or y.is_floating_point() or each):
        raise ValueError(
            f"train has targets of {y.dtype} and shape {tuple(y.shape)} for inputs of shape "
            f"{tuple(x.shape)}: families predict numbers, as floats of shape (batch,) or "
            "(batch, outputs), and classes, as integers of shape (batch,) or, for sequences, "
            "(batch, length)"
        )
    if y.ndim == 1 and not y.is_floating_point() and int(y.min()) < 0:
        raise ValueError(f"train has the class {int(y.min())}: number them from 0")


def _check_output(output: Any) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returned a {type(output).__name__}: return one tensor")


class Classes(nn.CrossEntropyLoss):
    """Cross entropy with classes in the last dimension, over any number of positions.

    Args:
        weight: The weight of each class; None for equal weights.
        count: Number of classes; None for any.
    """

    def __init__(self, weight: Tensor | None = None, count: int | None = None) -> None:
        super().__init__(weight)
        self.count = count

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        _check_output(output)
        positions = output.shape[:-1].numel() if output.ndim > 1 else 0
        if positions != target.numel() or self.count not in (None, output.shape[-1]):
            raise ValueError(
                f"the model returned shape {tuple(output.shape)} for targets of shape "
                f"{tuple(target.shape)}: return one score for each "
                f"{'class' if self.count is None else f'of the {self.count} classes'}"
            )
        output, target = output.flatten(0, -2), target.flatten().long()
        if self.weight is None:
            return super().forward(output, target)
        losses = F.cross_entropy(output, target, self.weight, reduction="none")
        return losses.mean()  # not over the batch's weights, which would undo them


class Squared(nn.MSELoss):
    """Squared error; outputs of shape (batch, 1) also fit targets of shape (batch,)."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        _check_output(output)
        if output.shape not in (target.shape, (*target.shape, 1)):
            raise ValueError(
                f"the model returned shape {tuple(output.shape)} for targets of shape "
                f"{tuple(target.shape)}: return one value for each"
            )
        return super().forward(output.reshape(target.shape), target)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The fraction of correct predictions.

    Raises:
        ValueError: There is not one target for each vector of class scores.
    """
    if output.shape[:-1] != target.shape:
        raise ValueError(
            f"accuracy: outputs of shape {tuple(output.shape)} need targets of shape "
            f"{tuple(output.shape[:-1])}, not {tuple(target.shape)}"
        )
    return (output.argmax(-1) == target).to(torch.float32).mean()
