"""The searched candidates by name, and the number of points of a grid over them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import nn

from selftune._arguments import FUNCTION, MAPPING, MODULE, NONE, REPEATABLE, check
from selftune.search._shape import Shape
from selftune.search._space import GridPoint, Space
from selftune.search.families import AbstractFamily, auto

log = logging.getLogger("selftune")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model with its own data, loss or tuner arguments; can be returned instead of a model.

    Args:
        model: The model.
        train: Training batches; by default those passed to ``select``.
        val: Validation batches; by default those passed to ``select``.
        loss_fn: Loss function; by default the one passed to ``select``.
        tuner: Additional arguments of :class:`~selftune.Tuner`, by name.
    """

    model: nn.Module
    train: Iterable[Any] | None = None
    val: Iterable[Any] | float | None = None
    loss_fn: Any = None
    tuner: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        data = {"train": REPEATABLE, "val": REPEATABLE}
        check({"model": MODULE, **data, "loss_fn": FUNCTION | NONE, "tuner": MAPPING}, vars(self))
        check_own("tuner", self.tuner, **SET)


SET = {
    "seed": "seed= of select", "loss_fn": "loss_fn= of select or of Candidate",
    "model": "a function that returns the model, as candidates= of select",
}  # fmt: skip
"""What to pass instead of arguments of the tuner that a search sets."""


def check_own(argument: str, given: Mapping[str, Any] | None, **instead: str) -> None:
    """Refuse entries of an argument that its receiver sets itself.

    ``instead`` says for each refused entry what to pass.
    """
    entries = given or {}
    for name in entries.keys() & instead.keys():
        raise ValueError(
            f"{argument}: {name}={entries[name]!r} is set by the search: pass {instead[name]}"
        )


Builder = Callable[[Space], Any]
Candidates = str | Builder | Sequence[Any] | Mapping[str, Any]

MOST = 1000
"""Largest number of grid points that are searched without ``force=True``."""


def builders_of(candidates: Candidates, train: Any, val: Any = None) -> dict[str, Builder]:
    """Builders of candidates by the name of their family.

    Families infer shapes from the batches; ``val`` may have other words and classes than ``train``.
    """
    if isinstance(candidates, str):
        if candidates != "auto":
            raise ValueError(f"candidates={candidates!r} must be 'auto', functions or families")
        return dict(auto(_shape_of(train, val)))
    if isinstance(candidates, Mapping):
        given = dict(candidates)
    elif isinstance(candidates, Sequence):
        given = {_name(c): c for c in candidates}
        if len(given) < len(candidates):
            raise ValueError(f"candidates={list(candidates)}: two have the same name, use a dict")
    else:
        given = {"model": candidates}
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"candidates: the name {name!r} must be a string")
    if not given:
        raise ValueError("candidates is empty: pass 'auto', a function, or several by name")
    kinds = [c for c in given.values() if isinstance(c, type) and issubclass(c, AbstractFamily)]
    shape = _shape_of(train, val) if kinds else None
    for name, candidate in given.items():
        if not callable(candidate):
            raise TypeError(
                f"candidates[{name!r}]={type(candidate).__name__} must be a function of a space "
                "that returns a model"
            )
        if candidate in kinds:
            given[name] = candidate(shape)
    return given


def _shape_of(train: Any, val: Any) -> Shape:
    """The shape of the data, for families."""
    if train is None:
        raise ValueError("train=None: families need data, select(candidates, train, val)")
    return Shape.of(train).with_words_and_classes_of(val)


def _name(candidate: Any) -> str:
    if isinstance(candidate, AbstractFamily):
        return type(candidate).__name__.lower()
    return str(getattr(candidate, "__name__", type(candidate).__name__)).lower()


def points_of(
    builders: Mapping[str, Callable[[Space], Any]], force: bool, inside: bool = False
) -> int:
    """The number of grid points, before the search.

    Parameters may depend on others. If no change of a single parameter changes the others, the
    number is the product of their sizes, else every point is built. A builder that returns the
    metric, or fails, is called once, and its parameters count as independent. The search itself
    ends when Optuna has tried every point, of which there may be more.

    ``force`` allows more than 1,000 points; ``inside``: widths are not searched.
    """
    total = 0
    for name, build in builders.items():
        prefix = name if len(builders) > 1 or name != "model" else ""
        point, is_model = _point(build, [], prefix, inside)
        if point.endless is not None:
            raise ValueError(
                f"sampler='grid': {point.endless} is a range without steps: give suggest_float "
                "a step=, let the run tune it, or use another sampler"
            )
        others = islice(point.neighbours() if is_model else (), MOST)
        if all(_point(build, p, prefix, inside)[0].sizes == point.sizes for p in others):
            total += math.prod(point.sizes.values())
            _check_points(total, force)
            continue
        path: list[int] | None = []
        while path is not None:
            path = _point(build, path, prefix, inside)[0].next_path()
            total += 1
            _check_points(total, force)
    return total


def _point(
    build: Callable[[Space], Any], path: Sequence[int], prefix: str, inside: bool
) -> tuple[GridPoint, bool]:
    """A point of the grid of a builder, and whether a model was built there."""
    point = GridPoint(path)
    try:
        built = build(Space(point, prefix, inside))
    except Exception as error:  # its trial will fail, and tell why
        log.info("sampler='grid': a builder failed: %s", error)
        return point, True
    return point, isinstance(built, (nn.Module, Candidate))


def _check_points(count: int, force: bool) -> None:
    if count > MOST and not force:
        raise ValueError(
            f"sampler='grid': {count:,} points or more, one run each; pass force=True to search "
            "them all, or sampler='tpe' with trials="
        )
