"""The tuned hyperparameters of a run as one vector of tensors, stepped by pure functions.

What :class:`selftune.tuning.Tuning` does on the host, with any torch optimizer and a shift for
every layer, this does on the device with one value for the whole run: it compiles into the
training step and maps over a population.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune.floor import Floor
from selftune.hparams import Hparam
from selftune.hyperstep import BETAS, EPS, LONGEST, OFTEN, RECENT, step_size, trust
from selftune.tuning import PACE, choose

STRENGTHS = 2.0
"""Relative step size of strengths of layers and losses, which have further to go."""


class HyperState(NamedTuple):
    """Raw values and what their steps remember, each of shape (hyperparameters,), float64.

    Attributes:
        raw: The unconstrained values.
        first: Adam's first moment of the hypergradients.
        second: Adam's second moment.
        mean: Running mean of the hypergradients, for the signal-to-noise ratio.
        square: Running mean of their squares.
        taken: Steps taken, shape (1,).
    """

    raw: Tensor
    first: Tensor
    second: Tensor
    mean: Tensor
    square: Tensor
    taken: Tensor


class HyperVector:
    """Which hyperparameters are tuned, between which bounds, and how they step.

    Args:
        known: Every hyperparameter of the update by name.
        tune: Names of the tuned ones.
        bounds: Narrower or wider bounds by name.
        horizon: Steps in the whole run.
        floor: Under weight decay, where the user sets no bounds; None: there is none.
        rate: Size of a hyper step in raw (log or odds) space.
        strengths: Names that act inside the model or the loss. Their steps are not scaled down
            where hypergradients disagree: near its best the loss is flat in them, and far off a
            slow drift beneath the noise is all there is to follow.

    Attributes:
        hparams: The tuned ones by name, in the order of the vector.
    """

    def __init__(
        self,
        known: Mapping[str, Hparam],
        tune: Sequence[str],
        bounds: Mapping[str, tuple[float, float]] | None = None,
        *,
        horizon: int,
        floor: Floor | None = None,
        rate: float = step_size(OFTEN),
        strengths: Collection[str] = (),
    ) -> None:
        self.hparams = choose(known, tune, bounds or {}, horizon)
        self.names = list(self.hparams)
        self.rate = rate
        self.horizon = horizon
        self._low = [self._raw(n, h.lower) for n, h in self.hparams.items()]
        self._high = [self._raw(n, h.upper) for n, h in self.hparams.items()]
        self._pace = [STRENGTHS if n in strengths else PACE.get(n, 1.0) for n in self.names]
        self._whole = [float(n in strengths) for n in self.names]
        floored = {"lr", "weight_decay"} <= set(self.names)
        self._floor = floor if floored and "weight_decay" not in (bounds or {}) else None
        self._coupled = {"lr", "momentum"} <= set(self.names)

    def _raw(self, name: str, value: float) -> float:
        raw = self.hparams[name].bijection.inverse(torch.tensor(value, dtype=torch.float64))
        return float(raw)

    def init(self, values: Mapping[str, float]) -> HyperState:
        """Start from constrained values; exactly 0 starts from ``from_zero``."""
        raw = [
            min(max(self._raw(n, values[n] or h.from_zero), low), high)
            for (n, h), low, high in zip(self.hparams.items(), self._low, self._high, strict=True)
        ]
        zeros = torch.zeros(len(raw), dtype=torch.float64)
        start = torch.tensor(raw, dtype=torch.float64)
        return HyperState(
            start, zeros, zeros.clone(), zeros.clone(), zeros.clone(), zeros.new_zeros(1)
        )

    def values(self, raw: Tensor) -> dict[str, Tensor]:
        """Constrained values by name, scalars."""
        return {n: h.bijection.forward(raw[i]) for i, (n, h) in enumerate(self.hparams.items())}

    def slopes(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The derivative of each value in its raw value."""
        return {n: h.bijection.slope(values[n]) for n, h in self.hparams.items()}

    def step(
        self, state: HyperState, signal: Tensor, memory: Any, climb: Tensor | None = None
    ) -> HyperState:
        """One step against hypergradients; if any is not finite, none moves anything.

        Args:
            state: Before the step.
            signal: dL/d(raw), shape (hyperparameters,).
            memory: 1/(1 − μ) of heavy-ball momentum, 1 without.
            climb: How much of a step of the learning rate is taken where it rises, shape (); None:
                all of it.
        """
        values = self.values(state.raw)
        low, high = (self._vector(end, state.raw) for end in (self._low, self._high))
        low, tied = self._lay_floor(state.raw, low, values, memory)
        given = signal = signal.to(torch.float64)
        if self._coupled:  # at constant lr/(1 − μ), as in Tuning.step
            signal = self._added(signal, "momentum", -self._of(given, "lr"))
        if tied is not None:  # and on the floor at constant η λ
            signal = self._added(signal, "lr", -tied * self._of(given, "weight_decay"))
        fine = torch.isfinite(signal).all()
        taken = state.taken + 1
        weight = 1 - (1 - 1 / taken).clamp_max(RECENT)
        mean = torch.lerp(state.mean, signal, weight)
        square = torch.lerp(state.square, signal.square(), weight)
        first = torch.lerp(state.first, signal, 1 - BETAS[0])
        second = torch.lerp(state.second, signal.square(), 1 - BETAS[1])
        root = (second / (1 - BETAS[1] ** taken)).sqrt() + EPS
        proposed = -self.rate * first / (1 - BETAS[0] ** taken) / root
        share = trust(mean, square).maximum(self._vector(self._whole, signal))
        proposed = proposed * share * self._vector(self._pace, signal)
        raw = (state.raw + proposed.clamp(-LONGEST, LONGEST)).maximum(low).minimum(high)
        if climb is not None:
            rise = self._of(raw - state.raw, "lr").clamp_min(0.0)
            raw = self._added(raw, "lr", (climb - 1) * rise)
        if tied is not None:
            low = self._vector(self._low, raw)  # the floor goes where the rate leads it
            along = -tied * self._of(raw - state.raw, "lr")
            raw = self._added(raw, "weight_decay", along).maximum(low).minimum(high)
        if self._coupled:
            after = self.values(raw)["momentum"]
            drift = torch.log((1 - after) / (1 - values["momentum"]))
            raw = self._added(raw, "lr", drift).maximum(low).minimum(high)
        stepped = HyperState(raw, first, second, mean, square, taken)
        return HyperState(*(torch.where(fine, a, b) for a, b in zip(stepped, state, strict=True)))

    def move(self, state: HyperState, name: str, raw: float | Tensor) -> HyperState:
        """Add to one raw value, within its bounds, if it is tuned."""
        if name not in self.hparams:
            return state
        moved = self._added(state.raw, name, raw)
        low, high = (self._vector(end, moved) for end in (self._low, self._high))
        return state._replace(raw=moved.maximum(low).minimum(high))

    def _lay_floor(
        self, raw: Tensor, low: Tensor, values: Mapping[str, Tensor], memory: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Lower bounds with the floor, and whether weight decay lies on it (1 or 0)."""
        if self._floor is None:
            return low, None
        least = self._floor.least(values["lr"] * memory)
        highest = self._floor.highest(self.hparams["weight_decay"])
        floor = torch.log(least).clamp_max(math.log(highest))
        low = self._added(low, "weight_decay", floor - self._of(low, "weight_decay"))
        above = self._of(raw, "weight_decay") - floor
        return low, (self._floor.touched(above) & (least < highest)).to(raw.dtype)

    def _of(self, vector: Tensor, name: str) -> Tensor:
        return vector[self.names.index(name)]

    def _added(self, vector: Tensor, name: str, value: Any) -> Tensor:
        """``vector`` with ``value`` added at a name; nothing in place, so that it maps."""
        place = [float(other == name) for other in self.names]
        return vector + self._vector(place, vector) * value

    @staticmethod
    def _vector(numbers: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=like.dtype, device=like.device)
