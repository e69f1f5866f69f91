"""Define-by-run search space of a trial, with parameter names prefixed by the family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from selftune.structure import Gate, Optional

UNLIKE = "other choices"
"""Attribute of a trial that failed because an earlier one had other choices of a name."""


class Space:
    """Suggests values under a prefix: ``depth`` in the family ``cnn`` becomes ``cnn.depth``.

    Args:
        trial: An Optuna trial, or any object with its three ``suggest`` methods.
        prefix: Prefix of every parameter name.
        inside: Whether the model starts at its largest sizes and is cut during the run
            (``structure="inside"`` of :func:`~selftune.search.select`).

    Attributes:
        trial: The underlying trial.
        inside: Whether units are removed during the run.

    Examples:
        >>> import optuna
        >>> space = Space(optuna.trial.FixedTrial({"mlp.depth": 3}), "mlp")
        >>> space.suggest_int("depth", 1, 4)
        3
        >>> space = Space(optuna.trial.FixedTrial({}), "mlp", inside=True)
        >>> width = space.suggest_width("width", (8, 32))
        >>> nn.Sequential(nn.Linear(4, width), nn.ReLU(), *space.gates(width))
        Sequential(
          (0): Linear(in_features=4, out_features=32, bias=True)
          (1): ReLU()
          (2): Gate(32, dim=1)
        )
    """

    def __init__(self, trial: Any, prefix: str = "", inside: bool = False) -> None:
        self.trial, self.inside = trial, inside
        self._prefix = f"{prefix}." if prefix else ""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Suggest one of several values.

        Studies store None, booleans, numbers and strings; other choices, such as tuples or classes,
        are stored as texts.
        """
        choices = list(choices)  # an array has no truth value
        if not choices:
            raise ValueError(f"choices of {self._prefix}{name} are empty: pass at least one")
        texts = _texts(choices)
        return choices[texts.index(self._suggest("categorical", name, texts))]

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """Suggest an integer between ``low`` and ``high``, both included."""
        return int(self._suggest("int", name, low, high, step=step, log=log))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Suggest a floating-point number."""
        return float(self._suggest("float", name, low, high, step=step, log=log))

    def _suggest(self, kind: str, name: str, *given: Any, **options: Any) -> Any:
        full = self._prefix + name
        try:
            return getattr(self.trial, f"suggest_{kind}")(full, *given, **options)
        except ValueError as error:
            study = getattr(self.trial, "study", None)
            earlier = [] if study is None else study.get_trials(deepcopy=False)
            first = next((t for t in earlier if full in t.distributions), None)
            if first is None or not _differ(first.distributions[full], kind, given):
                raise
            self.trial.set_user_attr(UNLIKE, True)
            raise ValueError(
                f"{full} has other choices than in trial {first.number} ({error}): if they have "
                "changed, pass another study= or storage=; if they depend on other choices, give "
                "each set of them its own name"
            ) from error

    def suggest_width(self, name: str, choices: Sequence[int]) -> int:
        """Suggest a number of units; the largest if units are removed during the run."""
        return max(choices) if self.inside else int(self.suggest_categorical(name, choices))

    def suggest_depth(self, name: str, low: int, high: int) -> int:
        """Suggest a number of optional blocks; ``high`` if blocks are removed during the run."""
        return high if self.inside else self.suggest_int(name, low, high)

    def gates(self, units: int, dim: int = 1) -> list[nn.Module]:
        """A :class:`~selftune.structure.Gate` if units are removed during the run, else nothing.

        Args:
            units: Number of units.
            dim: Dimension of the units.
        """
        return [Gate(units, dim)] if self.inside else []

    def residual(self, branch: nn.Module) -> nn.Module:
        """``x + branch(x)``, as an optional block if blocks are removed during the run.

        Args:
            branch: A module whose output has the shape of its input.
        """
        return Optional(branch) if self.inside else Residual(branch)


def _texts(choices: Sequence[Any]) -> list[Any]:
    """The choices as they are stored: the same in every process, and different from one another."""
    texts: list[Any] = []
    for place, choice in enumerate(choices):
        text = choice.item() if isinstance(choice, np.generic) else choice
        if not isinstance(text, (type(None), bool, int, float, str)):
            text = getattr(choice, "__name__", None) or repr(choice)
            text = type(choice).__name__ if " at 0x" in text else text
            text = f"{text} ({place})" if text in texts else text
        texts.append(text)
    return texts


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class GridPoint:
    """A trial that suggests one point of a grid; the first has the last value of each parameter.

    Args:
        path: Distance of each parameter from its last value, in the order of suggestion; 0 for
            further parameters.

    Attributes:
        sizes: Number of values of each parameter, by name.
        endless: Name of the first range without steps.
    """

    def __init__(self, path: Sequence[int] = ()) -> None:
        self.sizes: dict[str, int] = {}
        self.endless: str | None = None
        self._path = list(path)
        self._values: dict[str, Any] = {}

    def neighbours(self) -> Iterator[list[int]]:
        """The paths of the points that differ in one parameter."""
        for place, size in enumerate(self.sizes.values()):
            yield from ([0] * place + [back] for back in range(1, size))

    def next_path(self) -> list[int] | None:
        """The path of the next point in lexicographic order, or None after the last one."""
        sizes = list(self.sizes.values())
        path = self._path + [0] * (len(sizes) - len(self._path))
        while path and path[-1] + 1 == sizes[len(path) - 1]:
            path.pop()
        return [*path[:-1], path[-1] + 1] if path else None

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._value(name, len(choices), lambda at: choices[at])

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return int(self._value(name, (high - low) // step + 1, lambda at: low + at * step))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if step is None:
            self.endless = self.endless or name
            return self._value(name, 1, lambda at: high)
        count = math.floor((high - low) / step + 1e-9) + 1
        return float(self._value(name, count, lambda at: low + at * step))

    def _value(self, name: str, count: int, value: Callable[[int], Any]) -> Any:
        if name not in self._values:
            place = len(self.sizes)
            back = self._path[place] if place < len(self._path) else 0
            self.sizes[name] = count
            self._values[name] = value(count - 1 - back)
        return self._values[name]


def _differ(known: Any, kind: str, given: tuple[Any, ...]) -> bool:
    """Whether Optuna refuses the values because those of an earlier trial were others."""
    if type(known).__name__ != f"{kind.title()}Distribution":
        return True
    return kind == "categorical" and tuple(known.choices) != tuple(given[0])
