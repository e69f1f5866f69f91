"""Scores over the whole validation set, at the averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from selftune._binding import functional_call
from selftune._flat import local
from selftune._gathered import reshard
from selftune._modes import random_states, restore_random_states, seeded
from selftune._trees import unchanged
from selftune.control.final_weights import BACK, between
from selftune.tuner._batch import size, to_device
from selftune.tuner._data import Stream, end_workers, own_iterator
from selftune.tuner._objective import InMode, Objective, twin
from selftune.tuner._positions import position, read_from
from selftune.tuner._rank_batches import steady
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps

Metric = Callable[[Any, Any], Tensor | float]
Where = tuple[list[Tensor], list[Tensor]]
"""Weights and buffers."""
FEW = 20  # batches taken from an endless validation set
POSITIONS = *BACK, 0.5, 1.0  # from the last good weights via the average to the last


class _Scores(nn.Module):
    """An objective that returns the loss and the metrics."""

    def __init__(self, objective: Objective, metrics: Mapping[str, Metric]) -> None:
        super().__init__()
        self.objective = objective
        self.metrics = metrics

    def forward(self, batch: Any) -> dict[str, Any]:
        if not self.metrics:
            return {"loss": self.objective(batch)}
        loss, output, target = self.objective.outputs(batch)
        return {"loss": loss, **measured(self.metrics, output, target)}


class WithoutGradients:
    """Calls functions without gradients, or with them once one needs derivatives by its inputs."""

    def __init__(self) -> None:
        self._needed = False

    def __call__(self, function: Callable[[], Any]) -> Any:
        if not self._needed:
            try:
                with torch.no_grad():
                    return function()
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self._needed = True
        with torch.enable_grad():
            return function()


def measured(metrics: Mapping[str, Metric], output: Any, target: Any) -> dict[str, Any]:
    if torch.is_grad_enabled():  # metrics may convert outputs to NumPy
        output = tree_map_only(Tensor, Tensor.detach, output)
    with torch.no_grad():
        values = {name: metric(output, target) for name, metric in metrics.items()}
    for name, value in values.items():
        try:
            single = torch.as_tensor(value).numel() == 1
        except (TypeError, ValueError, RuntimeError):  # no numbers at all
            single = False
        if not single:
            what = f"shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
            raise ValueError(
                f"metrics[{name!r}] returned {what} for a batch: return one number, for example "
                "the mean over its examples"
            )
    return values


class Scorer:
    """Evaluates the model on all ranks, and puts averaged weights into it."""

    def __init__(
        self,
        objective: Objective,
        metrics: Mapping[str, Metric],
        batches: Any,
        steps: Steps,
        snapshots: Snapshots,
        device: torch.device,
    ) -> None:
        self.model, self._objective = objective.model, objective
        named, params = dict(objective.named_parameters()), steps.params
        self._views, self._group = steps.views, steps.group
        self._tensors = [local(named[n].detach()) for n in params] + list(objective.buffers())
        self._sharded, self._shards = steps.group.sharded, steps.shards
        self._mode = InMode(objective, None)
        self._module = _Scores(objective if self._sharded else twin(objective).eval(), metrics)
        self._names = [f"objective.{n}" for n in params]
        self._buffers = [f"objective.{n}" for n, _ in objective.named_buffers()]
        own = own_iterator(batches)
        self._batches: Iterable[Any] = steady(own) if steps.group.together else own
        self._own, self._start = own, position(own)
        self._few: list[Any] = []  # batches of an iterator that cannot restart
        self._snapshots, self._part, self._device = snapshots, snapshots.part, device
        self._autocast = steps.autocast
        self._without_gradients = WithoutGradients()

    def close(self) -> None:
        end_workers(self._own)

    def compared(self, stream: Stream, most: int, member: int) -> tuple[float, float]:
        """Losses at the average and at the good weights, over a limited number of batches."""
        now, then = self.score([self.at(0), self.at(-1)], stream, member, most)
        return now["loss"], then["loss"]

    @torch.no_grad()
    def score(
        self, points: Sequence[Where], stream: Stream, member: int, most: int | None = None
    ) -> list[dict[str, float]]:
        """Scores at several points, over the same batches: all, or the first ``most``."""
        there = []
        for weights, buffers in points:
            own = [b.clone() for b in buffers]  # a model may count passes in evaluation mode
            pairs = zip(self._tensors, [*self._views(weights), *own], strict=True)
            parts = [self._apart(self._part(t, member).to(target), target) for target, t in pairs]
            there.append(parts)
        return self._scores_at(there, stream, most)

    @torch.no_grad()
    def loss_of(self, saved: Mapping[str, Any], stream: Stream) -> float:
        """The loss of saved weights, which the model has only meanwhile."""
        with unchanged(self._tensors):
            self._load(saved)
            there = [t.clone() for t in self._tensors]
            return self._scores_at([there], stream, None)[0]["loss"]

    def _scores_at(
        self, points: Sequence[Sequence[Tensor]], stream: Stream, most: int | None
    ) -> list[dict[str, float]]:
        names = [*self._names, *self._buffers]
        there = [dict(zip(names, tensors, strict=True)) for tensors in points]
        group, total, randomness = self._group, 0, random_states()
        sums: list[dict[str, Tensor]] = [{} for _ in points]
        with self._evaluating(), read_from(self._own, self._start):
            batches = self._weighted(stream, most if stream.sized else FEW)
            for turn, (batch, weight) in enumerate(batches):
                total += weight
                for tensors, adding in zip(there, sums, strict=True):
                    scores = self._scores_of(tensors, batch, turn * group.size + group.rank)
                    for name, value in scores.items() if weight else ():
                        if not isinstance(value, Tensor):
                            value = torch.tensor(value, dtype=torch.float64, device="cpu")
                        value = value.detach().to(torch.float64) * weight
                        adding[name] = adding[name] + value if name in adding else value
        numbers = [{name: float(value) for name, value in s.items()} for s in sums]
        everywhere = group.gather((total, numbers))
        restore_random_states(randomness)  # loaders and metrics may have drawn some
        total = sum(count for count, _ in everywhere)
        known = dict.fromkeys(name for _, pairs in everywhere for name in pairs[0])
        return [
            {
                name: sum(pairs[i].get(name, 0.0) for _, pairs in everywhere) / total
                for name in known
            }
            for i in range(len(points))
        ]

    def _apart(self, tensor: Tensor, target: Tensor) -> Tensor:
        """A copy of a tensor of the model itself, if evaluation writes to it."""
        same = self._sharded and tensor.data_ptr() == target.data_ptr()
        return tensor.clone() if same else tensor

    def _scores_of(self, tensors: dict[str, Tensor], batch: Any, seed: int) -> dict[str, Any]:
        """The scores of a batch at given weights and buffers.

        Random losses get the same numbers in all evaluations, else luck decides.
        """
        return self._without_gradients(partial(self._passed, tensors, batch, seed))

    def _passed(self, tensors: dict[str, Tensor], batch: Any, seed: int) -> dict[str, Any]:
        with self._autocast(), seeded(self._device, seed):
            if not self._sharded:
                return functional_call(self._module, tensors, (batch,))
            for target, tensor in zip(self._tensors, tensors.values(), strict=True):
                target.copy_(tensor)
            reshard()
            with self._group.exchange(mixed=True):
                return self._module(batch)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode for a sharded model, whose tensors change within the block."""
        if not self._sharded:
            yield
            return
        with unchanged(self._tensors), self._mode.entered():
            yield
        reshard()

    def _weighted(self, stream: Stream, most: int | None) -> Iterator[tuple[Any, int]]:
        """This rank's batches and their numbers of examples.

        Passes of a sharded model are collective, so ranks take equal numbers of batches; a rank
        without a batch of its own in the last round repeats another's with weight 0.
        """
        group = self._group
        if stream.once:
            self._few = self._few or [stream.next() for _ in range(FEW)]
            yield from ((batch, size(batch)) for batch in self._few)
        elif not group.sharded:
            for batch in islice(self._batches, group.rank, most, group.size):
                batch = to_device(batch, self._device)
                yield batch, size(batch)
        else:
            batches = islice(self._batches, most)
            while some := list(islice(batches, group.size)):
                own = group.rank < len(some)
                batch = to_device(some[group.rank if own else 0], self._device)
                yield batch, size(batch) if own else 0

    @contextmanager
    def shown(self, member: int) -> Iterator[None]:
        """Put the averaged weights into the model within a block."""
        with unchanged(self._tensors):
            self.place(0, member)
            yield

    @torch.no_grad()
    def place(self, position: float, member: int) -> None:
        self._write(*self.at(position), member)

    def _write(self, weights: list[Tensor], buffers: list[Tensor], member: int) -> None:
        for tensor, source in zip(self._tensors, [*self._views(weights), *buffers], strict=True):
            tensor.copy_(self._part(source, member))

    def _load(self, saved: Mapping[str, Any]) -> None:
        for name, module in self._modules():
            self._shards.load(module, saved[name])

    def state(self) -> dict[str, Any]:
        return {name: self._shards.state_of(module) for name, module in self._modules()}

    def _modules(self) -> list[tuple[str, nn.Module]]:
        """The model, and a loss or objective that is a module."""
        named = self._objective.named_children()
        return [(n, m) for n, m in named if n in ("model", "loss_fn", "objective")]

    @torch.no_grad()
    def best(
        self,
        stream: Stream,
        member: int,
        saved: dict[str, Any] | None,
        positions: Sequence[float],
    ) -> dict[str, float]:
        """Put the best of the weights at these positions and the saved ones into the model.

        Returns the scores of the weights.
        """
        candidates = [self.at(position) for position in positions]
        scores = self.score(candidates, stream, member)
        losses = [s["loss"] if math.isfinite(s["loss"]) else math.inf for s in scores]
        lowest = min(losses)
        at = losses.index(lowest)
        self._write(*candidates[at], member)
        if saved is not None and saved["loss"] < lowest:
            self._load(saved)
            return {"loss": saved["loss"], **saved.get("scores", {})}
        return {**scores[at], "loss": lowest}

    def at(self, position: float) -> Where:
        """Weights at a position between the good ones (−1), the average (0) and the last (1)."""
        run = self._snapshots.run
        average = run.averages, run.average_buffers
        ends: dict[float, Where] = {
            -1: (self._snapshots.weights, self._snapshots.buffers), 0: average,
            1: (run.weights, run.buffers),
        }  # fmt: skip
        if position in ends:
            return ends[position]
        pairs = zip(average, ends[math.copysign(1, position)], strict=True)
        share = abs(position)
        weights, buffers = (
            [between(a, b, share) for a, b in zip(*pair, strict=True)] for pair in pairs
        )
        return weights, buffers
