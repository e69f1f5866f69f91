"""One run of one method: the same model, batches and evaluations for every method."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workloads import Batch, Workload

RHO = 0.98
CHECKPOINTS = 10


class Contender(ABC):
    """A method in training: it takes weight steps and says at which weights it is judged.

    Attributes:
        gradients: Gradient evaluations so far; one of a validation batch counts like any other.
    """

    gradients = 0
    averages = False
    """Whether ``showing`` is an average already, so that the common one is no alternative."""

    @abstractmethod
    def step(self, batch: Batch) -> None:
        """Train on a batch."""

    def showing(self) -> AbstractContextManager[Any]:
        """The method's own weights to judge, in place for a while."""
        return nullcontext()

    def ends(self) -> dict[str, float]:
        """What is worth keeping of the run, such as tuned values."""
        return {}


Make = Callable[[Workload, nn.Module, int], Contender]


class RunningAverage:
    """The average ρ w̄ + (1 − ρ) w of weights and BatchNorm statistics, one for all methods."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self.means = [t.detach().clone() for t in self.tensors]
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        share = 1 - min(RHO, 1 - 1 / (self.count + 2))
        self.count += 1
        torch._foreach_lerp_(self.means, self.tensors, share)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """The average in place of the weights."""
        kept = [t.detach().clone() for t in self.tensors]
        self._write(self.means)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)


@dataclass
class Record:
    """What a run came to.

    Attributes:
        own: Losses and accuracies at the method's own weights: the averaged ones where it averages,
            else the better on validation of the last and of the common average.
        average: The same at the common running average.
        curve: (share of the steps, validation loss at the method's own weights).
        gradients: Gradient evaluations, validation's included.
        seconds: Of training, evaluations left out.
        ends: Tuned or chosen values.
    """

    workload: str
    method: str
    seed: int
    own: dict[str, float]
    average: dict[str, float]
    curve: list[tuple[float, float]] = field(default_factory=list)
    gradients: int = 0
    seconds: float = 0.0
    ends: dict[str, float] = field(default_factory=dict)


def judge(workload: Workload, model: nn.Module) -> dict[str, float]:
    """Loss and accuracy on validation and test; a loss that is not finite is infinite."""
    found: dict[str, float] = {}
    for split in ("val", "test"):
        loss, accuracy = workload.scores(model, split)
        found[split] = loss if math.isfinite(loss) else math.inf
        if accuracy is not None:
            found[f"{split}_accuracy"] = accuracy
    return found


def train(
    workload: Workload,
    method: str,
    make: Make,
    seed: int,
    checkpoints: int = CHECKPOINTS,
    heard: Callable[[int, float], None] | None = None,
) -> Record:
    """One run from a seed.

    Args:
        workload: What is trained.
        method: The name to record.
        make: Builds the method over a model.
        seed: Of weights and batches.
        checkpoints: Evaluations during the run.
        heard: Told each of them as (number, validation loss); what it raises ends the run.
    """
    model = workload.model(seed)
    contender = make(workload, model, seed)
    average, curve, seconds = RunningAverage(model), [], 0.0
    batches = workload.batches("train", seed)
    every = max(1, workload.steps // max(1, checkpoints))
    begun = time.perf_counter()
    for step in range(1, workload.steps + 1):
        contender.step(next(batches))
        average.update()
        if checkpoints and step % every == 0 and step < workload.steps:
            seconds += time.perf_counter() - begun
            with contender.showing():
                loss = workload.evaluate(model, "val")
            curve.append((step / workload.steps, loss if math.isfinite(loss) else math.inf))
            if heard is not None:
                heard(len(curve), curve[-1][1])
            begun = time.perf_counter()
    seconds += time.perf_counter() - begun
    with contender.showing():
        own = judge(workload, model)
    with average.showing():
        common = judge(workload, model)
    if not contender.averages and common["val"] < own["val"]:
        own = common
    curve.append((1.0, own["val"]))
    return Record(
        workload.name, method, seed, own, common, curve, contender.gradients, seconds,
        contender.ends(),
    )  # fmt: skip
