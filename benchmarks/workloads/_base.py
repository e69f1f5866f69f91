"""What a training job is: a model, data in three parts, a loss and a length."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, three disjoint splits, a batch size and a number of steps.

    All randomness comes from the seed a caller passes, so that every method sees the same initial
    weights and the same batches.
    """

    name: str
    make_model: Callable[[], nn.Module]
    splits: dict[str, Batch]  # "train", "val", "test"
    batch_size: int
    steps: int
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def longer(self, times: int) -> Workload:
        """The same job with more steps."""
        return replace(self, name=f"{self.name}×{times}", steps=times * self.steps)

    def model(self, seed: int) -> nn.Module:
        """A freshly initialised model."""
        torch.manual_seed(seed)
        return self.make_model()

    def batches(self, split: str, seed: int, times: int = 1) -> Iterator[Batch]:
        """Endless shuffled batches of a split, an epoch at a time; perhaps several joined."""
        inputs, targets = self.splits[split]
        generator = torch.Generator().manual_seed(seed)
        size = min(times * self.batch_size, len(inputs))
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for start in range(0, len(order) - size + 1, size):
                index = order[start : start + size]
                yield inputs[index], targets[index]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        return self.criterion(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, split: str) -> float:
        """The mean loss over a whole split, in evaluation mode."""
        return self.scores(model, split)[0]

    @torch.no_grad()
    def scores(self, model: nn.Module, split: str) -> tuple[float, float | None]:
        """Loss and accuracy over a whole split, in evaluation mode; None where nothing is right."""
        training = model.training
        model.eval()
        inputs, targets = self.splits[split]
        loss, right = 0.0, 0.0
        for x, y in zip(inputs.split(500), targets.split(500), strict=True):
            outputs = model(x)
            loss += self.criterion(outputs, y).item() * len(x)
            if not y.is_floating_point():
                right += (outputs.argmax(1) == y).float().mean().item() * len(x)
        model.train(training)
        return loss / len(inputs), None if y.is_floating_point() else right / len(inputs)


def divided(x: Tensor, y: Tensor, sizes: Sequence[int]) -> dict[str, Batch]:
    """Random examples for training, validation and test; always the same ones."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = order[: sum(sizes)].split(list(sizes))
    return {n: (x[p], y[p]) for n, p in zip(("train", "val", "test"), parts, strict=True)}


def folder() -> Path:
    """The data folder.

    Raises:
        RuntimeError: ``SELFTUNE_DATA`` is not set.
    """
    if "SELFTUNE_DATA" not in os.environ:
        raise RuntimeError("set SELFTUNE_DATA to the folder of data files")
    return Path(os.environ["SELFTUNE_DATA"])
