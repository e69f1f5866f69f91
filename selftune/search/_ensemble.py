"""Ensembles of the best trials of a search."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from selftune._arguments import MODULES, ListOf, Number, checked
from selftune.tuner._batch import size, to_device
from selftune.tuner._data import own_iterator
from selftune.tuner._objective import LossFn, Objective

ROUNDS = 25
"""Number of models that are added, counting repetitions."""


class Ensemble(nn.Module):
    """The weighted mean of the outputs of several models.

    Args:
        models: Models with outputs of the same shape.
        weights: The weight of each.

    Raises:
        ValueError: There are no models, or not as many weights.

    Examples:
        >>> double, triple = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(double.weight, 2), nn.init.constant_(triple.weight, 3)
        >>> Ensemble([double, triple], [0.5, 0.5])(torch.ones(1, 1)).item()
        2.5
    """

    @checked(models=MODULES, weights=ListOf(Number(), "finite numbers"))
    def __init__(self, models: Collection[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        if len(models) != len(weights) or not models:
            raise ValueError(
                f"weights={list(weights)} must be as many as models, {len(models)}, and at least 1"
            )
        self.models = nn.ModuleList(models)
        self.weights = list(weights)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The mean of the outputs: tensors, or any nesting of them."""
        return mean([model(*args, **kwargs) for model in self.models], self.weights)


def mean(outputs: Sequence[Any], weights: Sequence[float]) -> Any:
    """The weighted mean of outputs with the same structure."""

    def mixed(*parts: Any) -> Any:
        if not isinstance(parts[0], Tensor):
            if not any(isinstance(v, Tensor) for v in getattr(parts[0], "__dict__", {}).values()):
                return parts[0]
            raise TypeError(
                f"a model of the ensemble returned {type(parts[0]).__name__}, of which there is no "
                "mean: return tensors, or tuples, lists or dictionaries of tensors"
            )
        return torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum(0)

    return tree_map(mixed, *outputs)


@torch.no_grad()
def choose(
    models: Mapping[int, nn.Module], loss_fn: LossFn, val: Iterable[Any]
) -> dict[int, float]:
    """Weights of the models whose mean has a low validation loss, by trial number.

    Models are added to the mean one at a time, each time the one that lowers the loss most; the
    same one may be added again. The result is the mean with the lowest loss on the way. The outputs
    of all models for ``val`` are kept in memory.

    Source: Caruana et al. 2004, "Ensemble Selection from Libraries of Models".
    """
    device = next((p.device for m in models.values() for p in m.parameters()), torch.device("cpu"))
    batches = [to_device(batch, device) for batch in own_iterator(val)]
    sizes = [size(batch) for batch in batches]
    objectives = {n: Objective(model, loss_fn, None) for n, model in models.items()}
    predicted = {n: [o.predicted(b) for b in batches] for n, o in objectives.items()}
    objective = next(iter(objectives.values()))
    chosen: list[int] = []
    best, lowest, current = 0, math.inf, next(iter(predicted.values()))
    for count in range(1, ROUNDS + 1):
        losses, means = {}, {}
        for number, outputs in predicted.items():
            weights = [1 - 1 / count, 1 / count]
            pairs = zip(current, outputs, strict=True)
            # A weight of 0 would make outputs of -inf NaN.
            means[number] = outputs if count == 1 else [mean(pair, weights) for pair in pairs]
            each = map(objective.judged, means[number], batches)
            losses[number] = sum(n * float(loss) for n, loss in zip(sizes, each, strict=True))
        added = min(losses, key=losses.__getitem__)
        chosen.append(added)
        current = means[added]
        if losses[added] < lowest:
            best, lowest = count, losses[added]
    return {n: count / best for n, count in Counter(chosen[:best]).items()}
