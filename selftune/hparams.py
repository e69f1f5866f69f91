"""Named, bounded hyperparameters: scale, bounds and role."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from selftune._arguments import SCALAR, check
from selftune.bijections import AbstractBijection, Identity, Log, Memory


@dataclass(frozen=True, kw_only=True)
class Hparam:
    """The definition of a hyperparameter.

    Args:
        name: Its name in ``tune``, in logs and in saved states.
        bijection: Its scale.
        lower: Lower bound of tuning.
        upper: Upper bound of tuning.
        from_zero: Starting value if it is 0 in every group, because its scale has no gradient at 0.
        option: Key of the parameter group, if it is not ``name``.
        index: Position within that option, if it is a tuple (``betas``).
        role: ``"rate"``, ``"decay"`` (of the rate), ``"momentum"`` (memory of gradients: reduced by
            a rewind and, if it averages, after the sweep), ``"regularizer"`` (tuned on validation
            losses only), ``"layer"`` (acts inside the model or the loss: steps are not scaled by
            noise) or ``""``.
        pace: Relative size of its steps.
        accumulates: Whether it is a heavy-ball momentum, which sums gradients instead of averaging
            them, so that the effective rate is lr/(1 − μ).
    """

    name: str
    bijection: AbstractBijection
    lower: float
    upper: float
    from_zero: float
    option: str = ""
    index: int | None = None
    role: str = ""
    pace: float = 1.0
    accumulates: bool = False

    @property
    def below_one(self) -> bool:
        """Whether values must be below 1: momenta and smoothing constants."""
        return isinstance(self.bijection, Memory)

    @property
    def least(self) -> float:
        """The smallest value that may be given, tuned or not."""
        return -math.inf if self.lower < 0 else 0.0

    @cached_property
    def raw_ends(self) -> tuple[float, float]:
        """The bounds as raw values."""
        ends = torch.tensor([self.lower, self.upper], dtype=torch.float64, device="cpu")
        low, high = self.bijection.inverse(ends).tolist()
        return low, high

    def read(self, group: dict[str, Any]) -> float:
        """The value in a parameter group."""
        value = group[self.option or self.name]
        return float(value if self.index is None else value[self.index])

    def write(self, group: dict[str, Any], value: float) -> None:
        """Set the value in a parameter group, keeping a tensor a tensor."""
        key = self.option or self.name
        if self.index is not None:
            group[key] = tuple(value if i == self.index else v for i, v in enumerate(group[key]))
        elif isinstance(group[key], Tensor):
            group[key].fill_(value)
        else:
            group[key] = value

    def moved(self, value: float, change: float) -> float:
        """The value after a change of its raw value, within the bounds."""
        raw = (
            self.bijection.inverse(torch.tensor(value, dtype=torch.float64, device="cpu")) + change
        )
        return min(max(float(self.bijection.forward(raw)), self.lower), self.upper)

    def check(self, argument: str, value: Any) -> None:
        """Raise an error for an initial value that is neither 0 nor within the bounds."""
        check({argument: SCALAR}, {argument: value})
        if not (value == 0 or self.lower <= value <= self.upper):
            raise ValueError(
                f"{argument}={float(value)!r} must be 0 or between {self.lower:g} and "
                f"{self.upper:g}"
            )

    def start(self, given: float) -> float:
        """The value at which tuning starts."""
        return self.from_zero if given == 0 else min(max(given, self.lower), self.upper)

    def bounded(self, lower: float, upper: float) -> Hparam:
        """The same hyperparameter within other bounds."""
        if not lower < upper:
            raise ValueError(f"bounds[{self.name!r}]=({lower}, {upper}): lower must be below upper")
        ends = self.bijection.inverse(
            torch.tensor([lower, upper], dtype=torch.float64, device="cpu")
        )
        negative = lower < 0 and not isinstance(self.bijection, Identity)
        if negative or not bool(torch.isfinite(ends).all()):
            raise ValueError(
                f"bounds[{self.name!r}]=({lower}, {upper}) do not fit its scale, "
                f"{type(self.bijection).__name__}: both must be {self.bijection.domain}"
            )
        return replace(self, lower=lower, upper=upper)


LR = Hparam(
    name="lr", bijection=Log(), lower=1e-8, upper=1e2, from_zero=1e-3, role="rate"
)  # fmt: skip
DECAY = Hparam(
    name="decay", bijection=Log(), lower=1e-8, upper=1.0, from_zero=1e-5, role="decay"
)  # fmt: skip
WEIGHT_DECAY = Hparam(
    name="weight_decay", bijection=Log(), lower=1e-9, upper=1e2, from_zero=1e-5, role="regularizer"
)  # fmt: skip
SLOW = 0.2
"""Relative step size of momenta (see docs/ablations.md)."""
MOMENTUM = Hparam(
    name="momentum", bijection=Memory(), lower=1e-3, upper=1 - 1e-6, from_zero=0.1,
    role="momentum", pace=SLOW, accumulates=True,
)  # fmt: skip
MEMORY = 20
"""The memory 1/(1 − μ) of a tuned momentum must fit this many times into the run."""
FAMILIES = {
    "Rates and momenta": ("lr", "decay", "momentum", "beta1", "beta2", "alpha", "dampening", "eps"),
    "Regularization": ("weight_decay", "l1", "l2", "elastic", "group", "gates"),
}
"""Pages of the log that show hyperparameters of the update together."""


def penalty_hparam(name: str) -> Hparam:
    """The strength λ of a penalty."""
    return Hparam(
        name=name, bijection=Log(), lower=1e-10, upper=1e2, from_zero=1e-6, role="regularizer"
    )


def as_layer(hparam: Hparam) -> Hparam:
    """A tuned layer hyperparameter, whose steps are twice as large."""
    return replace(hparam, role="layer", pace=2.0)


def choose(
    hparams: Mapping[str, Hparam],
    tune: Sequence[str],
    bounds: Mapping[str, tuple[float, float]] | None,
    horizon: int,
) -> dict[str, Hparam]:
    """The hyperparameters named in ``tune``, with bounds that depend on the length of the run.

    Raises:
        ValueError: A name in ``tune`` or ``bounds`` is unknown, or bounds do not fit a scale.
    """
    bounds = bounds or {}
    if isinstance(tune, str):
        raise ValueError(f"tune={tune!r} must be a sequence of names: ({tune!r},)")
    for argument, names in (("tune", tune), ("bounds", bounds)):
        for name in names:
            if name not in hparams:
                raise ValueError(f"{argument}={name!r} is unknown: use one of {list(hparams)}")
    chosen = {n: h for n, h in hparams.items() if n in tune}
    for name, hparam in chosen.items():
        if name in bounds:
            chosen[name] = hparam.bounded(*bounds[name])
        elif hparam.role == "momentum":
            fits = max(0.9, 1 - MEMORY / horizon)
            chosen[name] = replace(hparam, upper=min(hparam.upper, fits))
    return chosen
