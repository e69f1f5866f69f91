"""Define-by-run search space of a trial, with parameter names prefixed by the family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class Space:
    """Suggests values under a prefix: ``depth`` in the family ``cnn`` becomes ``cnn.depth``.

    Args:
        trial: An Optuna trial, or any object with its three ``suggest`` methods.
        prefix: Prefix of every parameter name.

    Attributes:
        trial: The underlying trial.

    Examples:
        >>> import optuna
        >>> space = Space(optuna.trial.FixedTrial({"mlp.depth": 3}), "mlp")
        >>> space.suggest_int("depth", 1, 4)
        3
    """

    def __init__(self, trial: Any, prefix: str = "") -> None:
        self.trial = trial
        self._prefix = f"{prefix}." if prefix else ""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Suggest one of several values."""
        if not choices:
            raise ValueError(f"choices of {self._prefix}{name} are empty: pass at least one")
        return self.trial.suggest_categorical(self._prefix + name, list(choices))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """Suggest an integer between ``low`` and ``high``, both included."""
        return int(self.trial.suggest_int(self._prefix + name, low, high, step=step, log=log))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Suggest a floating-point number."""
        found = self.trial.suggest_float(self._prefix + name, low, high, step=step, log=log)
        return float(found)


class Counting:
    """A trial that counts grid points by suggesting the last or highest value of each parameter.

    If the number of parameters depends on a value (widths by depth), the highest has the most, so
    the count is an upper bound.

    Attributes:
        count: Points of the grid so far.
        endless: Name of the first range without steps.
    """

    def __init__(self) -> None:
        self.count = 1
        self.endless: str | None = None
        self._known: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Suggest the last choice."""
        return self._last(name, len(choices), choices[-1])

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """Suggest the highest value."""
        count = (high - low) // step + 1
        return int(self._last(name, count, low + (count - 1) * step))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Suggest the highest value."""
        if step is None:
            self.endless = self.endless or name
        count = 1 if step is None else math.floor((high - low) / step + 1e-9) + 1
        return float(self._last(name, count, high))

    def _last(self, name: str, count: int, value: Any) -> Any:
        if name not in self._known:
            self.count *= count
            self._known[name] = value
        return self._known[name]
