"""The step of the hyperparameters: Adam on raw values, scaled by the signal-to-noise ratio.

Raw values are stored as *shifts*: the raw value of a hyperparameter is an origin plus its shift.
With one value for each hyperparameter the origins are 0; parameter groups with different initial
values have different origins and a common shift.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune._gradient import plainly
from selftune.hparams import Hparam
from selftune.method.settings import HyperSettings
from selftune.method.weight_decay_floor import WeightDecayFloor


def signal_to_noise(mean: Tensor, square: Tensor) -> Tensor:
    """|mean| / root mean square of recent hypergradients: 0 (noise) … 1 (all equal)."""
    return mean.abs() / square.sqrt().clamp_min(1e-300)


def trust(mean: Tensor, square: Tensor, settings: HyperSettings) -> Tensor:
    """The factor of a proposed step: 1 where hypergradients agree.

    For pure noise the signal-to-noise ratio is about √((1 − β)/(1 + β)); below ``sure`` times that
    the step is scaled by the square of the ratio.
    """
    noise = math.sqrt((1 - settings.recent) / (1 + settings.recent))
    return (signal_to_noise(mean, square) / (settings.sure * noise)).square().clamp_max(1.0)


class HyperState(NamedTuple):
    """Shifts and their optimizer state, each of shape (shifts,), float64, if not stated otherwise.

    Attributes:
        raw: The shifts.
        first: Adam's first moment of the hypergradients.
        second: Adam's second moment.
        mean: Running mean of the hypergradients, for the signal-to-noise ratio.
        square: Running mean of their squares.
        taken: Steps taken, shape (1,).
        peak: The shifts at which the run last diverged; infinite if it has not.
        divergences: Their number, shape (1,).
    """

    raw: Tensor
    first: Tensor
    second: Tensor
    mean: Tensor
    square: Tensor
    taken: Tensor
    peak: Tensor
    divergences: Tensor

    @classmethod
    def begin(cls, raw: Tensor) -> HyperState:
        """The initial state at given shifts."""
        first, second, mean, square = (torch.zeros_like(raw) for _ in range(4))
        peak, none = torch.full_like(raw, math.inf), raw.new_zeros(1)
        return cls(raw, first, second, mean, square, none, peak, none.clone())

    def forget(self) -> HyperState:
        """The same shifts and divergences without past hypergradients."""
        begun = HyperState.begin(self.raw)
        return begun._replace(peak=self.peak, divergences=self.divergences)

    def diverged(self) -> HyperState:
        """The same state after a divergence at the present shifts."""
        return self._replace(peak=self.raw.clone(), divergences=self.divergences + 1)


class Frame(NamedTuple):
    """Origin and bounds of the shifts, each of shape (shifts,), float64.

    Attributes:
        origin: Raw values at a shift of 0; if several share a shift, the highest, and for weight
            decay the lowest.
        low: Lowest shifts.
        high: Highest shifts.
    """

    origin: Tensor
    low: Tensor
    high: Tensor


Propose = Callable[[Tensor, Tensor], Tensor]
"""Function from shifts and hypergradients to a proposed change."""


class HyperOptimizer:
    """The tuned hyperparameters and the step of their shifts, as pure functions of tensors.

    Args:
        hparams: The tuned hyperparameters by name.
        size: Size of a step in raw (log or log-odds) space.
        settings: Settings of the steps.
        floor: The weight decay floor, or None.
        shifts: Number of shifts of each hyperparameter; by default one.

    Attributes:
        hparams: The tuned hyperparameters by name, in the order of the shifts.
        floor: The weight decay floor, or None.
        slots: The slice of each hyperparameter's shifts, by name.
    """

    def __init__(
        self,
        hparams: Mapping[str, Hparam],
        *,
        size: float,
        settings: HyperSettings | None = None,
        floor: WeightDecayFloor | None = None,
        shifts: Sequence[int] | None = None,
    ) -> None:
        self.hparams = dict(hparams)
        self.size, self.settings = size, settings or HyperSettings()
        self.floor = floor if {"lr", "weight_decay"} <= set(hparams) else None
        counts = [1] * len(hparams) if shifts is None else list(shifts)
        ends = [0, *itertools.accumulate(counts)]
        self.slots = {n: slice(*e) for n, e in zip(hparams, itertools.pairwise(ends), strict=True)}
        self._ends = [[h.raw_ends[end] for h in self.hparams.values()] for end in (0, 1)]
        self._owners = [n for n, count in zip(hparams, counts, strict=True) for _ in range(count)]
        self._pace = [self.hparams[n].pace for n in self._owners]
        self._whole = [float(self.hparams[n].role == "layer") for n in self._owners]

    @property
    def names(self) -> list[str]:
        """Names of the tuned hyperparameters."""
        return list(self.hparams)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Each hyperparameter's part of a vector of shifts, by name."""
        return {n: vector[slots] for n, slots in self.slots.items()}

    def signals(self, mean: Tensor, square: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean hypergradient and signal-to-noise ratio of the shifts, by name."""
        ratios = self.split(signal_to_noise(mean, square))
        return {n: (own, ratios[n]) for n, own in self.split(mean).items()}

    def frame(self, device: torch.device | str = "cpu") -> Frame:
        """The frame with origin 0: shifts are raw values."""
        low, high = (torch.tensor(e, dtype=torch.float64, device=device) for e in self._ends)
        return Frame(torch.zeros_like(low), low, high)

    def begin(self, values: Mapping[str, float]) -> HyperState:
        """The initial state at these values; 0 is replaced by ``from_zero``."""
        raw = []
        for name, hparam in self.hparams.items():
            given = torch.tensor(
                values[name] or hparam.from_zero, dtype=torch.float64, device="cpu"
            )
            low, high = hparam.raw_ends
            raw.append(min(max(float(hparam.bijection.inverse(given)), low), high))
        return HyperState.begin(torch.tensor(raw, dtype=torch.float64, device="cpu"))

    def values(self, raw: Tensor) -> dict[str, Tensor]:
        """Map raw values to constrained scalars by name."""
        return {n: h.bijection.forward(raw[i]) for i, (n, h) in enumerate(self.hparams.items())}

    def slopes(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The derivative of each value w.r.t. its raw value."""
        return {n: h.bijection.slope(values[n]) for n, h in self.hparams.items()}

    def step(
        self,
        state: HyperState,
        signal: Tensor,
        frame: Frame,
        *,
        memory: Any = 1.0,
        lr_increase_scale: Any = 1.0,
        steps: int = 0,
        moving: Sequence[str] | None = None,
        propose: Propose | None = None,
    ) -> HyperState:
        """One step against the hypergradients; none is taken if any of them is not finite.

        Bounds do not saturate: a hyperparameter leaves a bound at the first step that points
        inward.

        Args:
            state: State before the step.
            signal: dL/d(raw), shape (shifts,).
            frame: Bounds of the shifts.
            memory: 1/(1 − μ) with heavy-ball momentum, else 1.
            lr_increase_scale: Factor of a step that raises the learning rate.
            steps: Training steps taken, for the floor if the horizon is unknown.
            moving: Names with a hypergradient; the others do not change. None: all.
            propose: An optimizer instead of Adam.
        """
        signal = signal.to(torch.float64)
        fine = torch.isfinite(signal).all()
        free: Any = 1.0
        if moving is not None and not set(self.hparams) <= set(moving):
            free = self._vector([float(n in moving) for n in self._owners], signal)
        stepped = self._adam(state, signal, free, propose)
        share = trust(stepped.mean, stepped.square, self.settings)
        if any(self._whole):
            share = share.maximum(self._vector(self._whole, signal))
        change = (stepped.raw - state.raw) * share * self._vector(self._pace, signal) * free
        change = self._shrunk(change)
        longest = self.settings.longest
        raw = (state.raw + change.clamp(-longest, longest)).maximum(frame.low).minimum(frame.high)
        if "lr" in self.hparams:
            rise = self._of(raw - state.raw, "lr").clamp_min(0.0)
            raw = self._added(raw, "lr", (lr_increase_scale * self._caution(state) - 1) * rise)
        raw = raw.maximum(self.lay_floor(raw, frame, memory, steps))
        if isinstance(free, Tensor):
            raw = torch.where(free > 0, raw, state.raw)
        stepped = stepped._replace(raw=raw)
        if plainly() and signal.device.type == "cpu":
            return stepped if bool(fine) else state
        return HyperState(*(torch.where(fine, a, b) for a, b in zip(stepped, state, strict=True)))

    def _caution(self, state: HyperState) -> Any:
        """The factor of an upward step of the learning rate near its peak at a divergence."""
        if self.settings.caution <= 1:
            return 1.0
        below = self._of(state.peak - state.raw, "lr") / math.log(self.settings.caution)
        return below.clamp_max(1.0).maximum(1 / (1 + state.divergences))

    def _shrunk(self, change: Tensor) -> Tensor:
        """Each shift of a hyperparameter takes the mean change plus a share of its deviation."""
        apart = self.settings.apart
        for name in self.hparams if apart < 1 else ():
            own = self._of(change, name)
            if len(own) > 1:
                change = self._put(change, name, own.mean().lerp(own, apart))
        return change

    def _adam(
        self, state: HyperState, signal: Tensor, free: Any, propose: Propose | None
    ) -> HyperState:
        """The state with updated moments, and shifts after the unscaled step."""
        settings, (beta1, beta2) = self.settings, self.settings.betas
        taken = state.taken + 1
        signal = signal * free
        weight = (1 - (1 - 1 / taken).clamp_max(settings.recent)) * free
        mean = torch.lerp(state.mean, signal, weight)
        square = torch.lerp(state.square, signal.square(), weight)
        first = torch.lerp(state.first, signal, 1 - beta1)
        second = torch.lerp(state.second, signal.square(), 1 - beta2)
        if propose is None:
            root = (second / (1 - beta2**taken)).sqrt() + settings.eps
            raw = state.raw - self.size * first / (1 - beta1**taken) / root
        else:
            raw = state.raw + propose(state.raw, signal)
        return state._replace(
            raw=raw, first=first, second=second, mean=mean, square=square, taken=taken
        )

    def move(self, raw: Tensor, name: str, change: float | Tensor, frame: Frame) -> Tensor:
        """Add to a hyperparameter's raw shifts, within their bounds, if it is tuned."""
        if name not in self.hparams:
            return raw
        return self._added(raw, name, change).maximum(frame.low).minimum(frame.high)

    def lay_floor(self, raw: Tensor, frame: Frame, memory: Any, steps: int) -> Tensor:
        """Lower bounds of the shifts, raised to the weight decay floor."""
        if self.floor is None:
            return frame.low
        floor, decay = self.floor, self.hparams["weight_decay"]
        rate = self._of(frame.origin + raw, "lr").exp().max() * memory
        highest = math.log(max(decay.lower, min(floor.settings.highest, decay.upper)))
        wanted = torch.log(floor.least(rate, steps)).where(rate > 0, -math.inf)
        least = wanted.clamp(math.log(decay.lower), highest)
        least = least - self._of(frame.origin, "weight_decay")
        return self._put(frame.low, "weight_decay", least).minimum(frame.high)

    def ends(
        self, raw: Tensor, frame: Frame, memory: Any, steps: int
    ) -> dict[str, tuple[float, float, bool]]:
        """Mean lowest and highest shift by name, and whether the floor raises the lowest."""
        least = self.split(self.lay_floor(raw, frame, memory, steps))
        low, high = self.split(frame.low), self.split(frame.high)
        return {
            n: (float(own.mean()), float(high[n].mean()), bool((own > low[n]).any()))
            for n, own in least.items()
        }

    def _of(self, vector: Tensor, name: str) -> Tensor:
        return vector[self.slots[name]]

    def _added(self, vector: Tensor, name: str, value: Any) -> Tensor:
        """Add ``value`` to the slots of a name; out of place, for vmap."""
        return self._put(vector, name, self._of(vector, name) + value)

    def _put(self, vector: Tensor, name: str, values: Tensor) -> Tensor:
        """Replace the slots of a name."""
        slots = self.slots[name]
        return torch.cat([vector[: slots.start], values, vector[slots.stop :]])

    @staticmethod
    def _vector(numbers: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=like.dtype, device=like.device)
