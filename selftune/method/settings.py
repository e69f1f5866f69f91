"""The numbers that make up the method, as frozen settings; an ablation passes others."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from selftune._arguments import Settings


@dataclass(frozen=True, kw_only=True)
class HyperSettings(Settings):
    """How often hyperparameters step, and how far.

    Attributes:
        rate: Size of a step in raw (log or odds) space for every training step since the last.
        betas: Adam's, of the hypergradients.
        eps: Adam's.
        often: Training steps from one hyperparameter step to the next, at least …
        rare: … and at most.
        fewest: Hyperparameter steps in a run of known length.
        short: Training steps in a run below which hyperparameter steps are larger …
        power: … with this power of the inverse length.
        recent: Memory of the signal-to-noise ratio: 0.8 is about five hypergradients.
        sure: How many times the ratio of pure noise makes a step whole.
        longest: Largest change of a raw value in one step.
        apart: Where a hyperparameter has a value for each group or tensor: the share of their
            changes beyond the mean one, in which all take part. Each has less data than all have.
    """

    rate: float = 0.01
    betas: tuple[float, float] = (0.8, 0.98)
    eps: float = 1e-8
    often: int = 5
    rare: int = 20
    fewest: int = 30
    short: int = 1000
    power: float = 0.5
    recent: float = 0.8
    sure: float = 2.0
    longest: float = 0.3
    apart: float = 0.1

    def every(self, total_steps: int | None) -> int:
        """Training steps from one hyperparameter step to the next: a thirtieth of the run.

        Examples:
            >>> settings = HyperSettings()
            >>> settings.every(None), settings.every(300), settings.every(10_000)
            (5, 10, 20)
        """
        if total_steps is None:
            return self.often
        return max(self.often, min(self.rare, total_steps // self.fewest))

    def size(self, every: int, total_steps: int | None = None) -> float:
        """The size of a step: rarer ones are larger, so that a run gets as far.

        In a run of T < 1000 steps they are √(1000/T) times as large: short runs have no time for
        small ones.

        Examples:
            >>> settings = HyperSettings()
            >>> settings.size(5), settings.size(1000), settings.size(10, 250)
            (0.05, 0.2, 0.2)
        """
        shorter = 1.0 if total_steps is None else max(1.0, self.short / max(1, total_steps))
        return self.rate * max(self.often, min(self.rare, every)) * shorter**self.power


@dataclass(frozen=True, kw_only=True)
class DisplacementLimit(Settings):
    """How far the learning rate may climb, by the squared displacement ratio S².

    Attributes:
        random_walk: S² up to which weights oscillate and the rate takes no step upwards …
        drift: … and from which it takes whole steps; in between a share of them.
        segment: Steps in a segment, at least: longer than the memory of a momentum.
        free_share: Share of the run in the beginning in which too little is known, and the rate
            may climb anywhere.
    """

    random_walk: float = 1.0
    drift: float = 1.5
    segment: int = 20
    free_share: float = 0.1

    def climb(self, square: Tensor) -> Tensor:
        """The share of a step upwards that is taken at S²; 1 where S² is not known (NaN).

        Examples:
            >>> import torch
            >>> DisplacementLimit().climb(torch.tensor([0.5, 1.25, 3.0, float("nan")]))
            tensor([0.0000, 0.5000, 1.0000, 1.0000])
        """
        share = (square - self.random_walk) / (self.drift - self.random_walk)
        return share.nan_to_num(nan=1.0).clamp(0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class FloorSettings(Settings):
    """Where the floor under weight decay lies.

    Attributes:
        decoupled: Least Σ η_t λ over a run where weight decay acts on the weights directly.
        l2: The same where it acts through the gradient, which momentum accumulates: η/(1 − μ)
            counts.
        highest_share: The floor is at most this share of the upper bound of weight decay.
    """

    decoupled: float = 0.3
    l2: float = 0.03
    highest_share: float = 0.1


@dataclass(frozen=True, kw_only=True)
class StiffSettings(Settings):
    """How stiff directions are found.

    Attributes:
        pairs: Secant pairs kept; 0: outer gradients stay as they are.
        weights: Weights there must be for each pair: of fewer, a few noisy pairs would leave
            nothing of a gradient.
        dependent: Share of a pair's squared length below which it counts as a combination of the
            others.
    """

    pairs: int = 4
    weights: int = 50
    dependent: float = 1e-5

    def slots(self, weights: int) -> int:
        """Pairs kept for so many weights in all."""
        return min(self.pairs, weights // self.weights)


@dataclass(frozen=True, kw_only=True)
class SliceSettings(Settings):
    """How few weights may stand for all where sensitivities are kept.

    Attributes:
        least: Of a whole model, at least.
        each: Of each tensor that has hyperparameters of its own, or of a parameter group.
    """

    least: int = 4096
    each: int = 16


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Settings):
    """What decides where a hyperparameter goes.

    Attributes:
        hyper: How often hyperparameters step, and how far.
        displacement: How far the learning rate may climb; None: anywhere.
        floor: Where the floor under weight decay lies; None: there is none.
        stiff: How stiff directions are found.
        slices: How few weights may stand for all where sensitivities are kept.
        unit_gradient: Whether hypergradients are taken along an outer gradient of length 1. The
            length shrinks by orders of magnitude as a run converges, and steps whose size follows
            the mean square of past hypergradients would all but end long before the run does.
        final_weights: Whether a run ends where its validation loss is lowest between the last good
            weights, the average and the last weights; False: at the average.

    Examples:
        >>> from dataclasses import replace
        >>> free = replace(MethodSettings(), displacement=None)
    """

    hyper: HyperSettings = field(default_factory=HyperSettings)
    displacement: DisplacementLimit | None = field(default_factory=DisplacementLimit)
    floor: FloorSettings | None = field(default_factory=FloorSettings)
    stiff: StiffSettings = field(default_factory=StiffSettings)
    slices: SliceSettings = field(default_factory=SliceSettings)
    unit_gradient: bool = True
    final_weights: bool = True
