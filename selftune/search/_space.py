"""Define-by-run search space of a trial, with parameter names prefixed by the family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from selftune.structure import Gate, Optional


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


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the input's shape."""
        return x + self.body(x)


class Counting:
    """A trial that counts grid points by suggesting the last or highest value of each parameter.

    If the number of parameters depends on a value (one width per layer), the highest value is
    assumed to have the most parameters, so the count is an upper bound.

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
