"""Constants of the method as frozen settings, which ablations vary."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from selftune._arguments import Settings


@dataclass(frozen=True, kw_only=True)
class HyperSettings(Settings):
    """Interval and size of the hyperparameter steps.

    Attributes:
        rate: Step size in raw (log or log-odds) space for each training step since the last
            hyperparameter step.
        betas: β₁ and β₂ of Adam on the hypergradients.
        eps: ε of Adam.
        often: Minimum number of training steps between two hyperparameter steps.
        rare: Maximum number of training steps between two hyperparameter steps.
        fewest: Hyperparameter steps in a run, unless ``often`` or ``rare`` limits the interval.
        short: In runs with fewer training steps, hyperparameter steps are larger.
        power: Exponent of the factor ``(short / length) ** power``.
        recent: Decay of the running means of the signal-to-noise ratio: 0.8 covers about five
            hypergradients.
        sure: Steps are scaled down if the signal-to-noise ratio is below this multiple of that of
            pure noise.
        longest: Largest change of a raw value in one step.
        caution: After n divergences, steps that raise the learning rate are scaled down from this
            factor below its last peak on, to 1/(1 + n) at and above the peak; 1 for no change.
        apart: If a hyperparameter has a value for each group or tensor, each value takes the mean
            change plus this share of its deviation, as single hypergradients are noisier.
    """

    positive = ("fewest",)

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
    caution: float = 3.0
    apart: float = 0.1

    def every(self, total_steps: int | None, given: int | None = None) -> int:
        """Training steps between two hyperparameter steps: a thirtieth of the run, within 5…20.

        Args:
            total_steps: Steps in the run, or None.
            given: The interval passed by the user, which is returned, or None.

        Examples:
            >>> settings = HyperSettings()
            >>> settings.every(None), settings.every(300), settings.every(10_000)
            (5, 10, 20)
        """
        if total_steps is None or given is not None:
            return given or self.often
        return max(self.often, min(self.rare, total_steps // self.fewest))

    def size(self, every: int, total_steps: int | None = None) -> float:
        """The size of a step, proportional to the interval between steps.

        In a run of T < 1000 steps it is multiplied by √(1000/T).

        Examples:
            >>> settings = HyperSettings()
            >>> settings.size(5), settings.size(1000), settings.size(10, 250)
            (0.05, 0.2, 0.2)
        """
        shorter = 1.0 if total_steps is None else max(1.0, self.short / max(1, total_steps))
        return self.rate * max(self.often, min(self.rare, every)) * shorter**self.power


@dataclass(frozen=True, kw_only=True)
class DisplacementLimit(Settings):
    """The limit on increases of the learning rate, by the squared displacement ratio S².

    Attributes:
        random_walk: Up to this S² weights oscillate, and the rate does not rise.
        drift: From this S² on, upward steps are not scaled; in between they are scaled down.
        segment: Minimum number of steps in a segment; longer than the memory of typical momenta.
        free_share: Initial share of the run in which the rate is not limited.
    """

    random_walk: float = 1.0
    drift: float = 1.5
    segment: int = 20
    free_share: float = 0.1

    def climb(self, square: Tensor) -> Tensor:
        """The factor of an upward step at S²; 1 if S² is unknown (NaN).

        Examples:
            >>> import torch
            >>> DisplacementLimit().climb(torch.tensor([0.5, 1.25, 3.0, float("nan")]))
            tensor([0.0000, 0.5000, 1.0000, 1.0000])
        """
        share = (square - self.random_walk) / (self.drift - self.random_walk)
        return share.nan_to_num(nan=1.0).clamp(0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class FloorSettings(Settings):
    """The weight decay floor.

    Attributes:
        decoupled: Minimum Σ η_t λ over a run if weight decay is decoupled.
        l2: The same if it acts through the gradient; with momentum η/(1 − μ) replaces η.
        highest: Maximum of the floor. Without it, a run that starts at a low learning rate would
            get a large weight decay, far too strong once the rate rises.
    """

    decoupled: float = 0.3
    l2: float = 0.03
    highest: float = 0.1


@dataclass(frozen=True, kw_only=True)
class StiffSettings(Settings):
    """Estimation of stiff directions.

    Attributes:
        pairs: Number of secant pairs; 0 for no deflation.
        weights: Minimum number of weights for each pair: with fewer, noisy pairs would remove the
            whole gradient.
        dependent: A pair whose squared residual is below this share of its squared length counts
            as linearly dependent.
    """

    positive = ("weights",)

    pairs: int = 4
    weights: int = 50
    dependent: float = 1e-5

    def slots(self, weights: int) -> int:
        """Number of pairs for a total number of weights."""
        return min(self.pairs, weights // self.weights)


@dataclass(frozen=True, kw_only=True)
class SliceSettings(Settings):
    """Sizes of the slice of weights with sensitivities.

    Attributes:
        least: Minimum size in the whole model.
        most: Maximum size in the whole model with the default share. The relative
            error of an inner product estimated from n weights falls as 1/√n.
        each: Minimum size in a parameter group, or in a tensor with its own hyperparameters.
    """

    positive = ("least", "each")

    least: int = 4096
    most: int = 2**20
    each: int = 16


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Settings):
    """The settings of the method.

    Attributes:
        hyper: Interval and size of the hyperparameter steps.
        displacement: The limit on increases of the learning rate, or None.
        floor: The weight decay floor, or None.
        stiff: Estimation of stiff directions.
        slices: Sizes of the slice of weights with sensitivities.
        unit_gradient: Whether the outer gradient is divided by its length. The length shrinks by
            orders of magnitude as a run converges, and without the division Adam's steps would
            nearly stop.
        final_weights: Whether the final weights are selected by the validation loss, between the
            last good weights, the average and the last iterate; False for the average.

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
