"""The numbers that make up the method, as frozen settings; an ablation passes others."""

from __future__ import annotations

from dataclasses import dataclass, field

from selftune.method.displacement import DisplacementLimit
from selftune.method.hyper_optimizer import HyperSettings
from selftune.method.stiff_directions import StiffSettings
from selftune.method.weight_decay_floor import FloorSettings


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What decides where a hyperparameter goes.

    Attributes:
        hyper: How often hyperparameters step, and how far.
        displacement: How far the learning rate may climb; None: anywhere.
        floor: Where the floor under weight decay lies; None: there is none.
        stiff: How stiff directions are found.
        unit_gradient: Whether hypergradients are taken along an outer gradient of length 1. The
            length shrinks by orders of magnitude as a run converges, and steps whose size follows
            the mean square of past hypergradients would all but end long before the run does.

    Examples:
        >>> from dataclasses import replace
        >>> free = replace(MethodSettings(), displacement=None)
    """

    hyper: HyperSettings = field(default_factory=HyperSettings)
    displacement: DisplacementLimit | None = field(default_factory=DisplacementLimit)
    floor: FloorSettings | None = field(default_factory=FloorSettings)
    stiff: StiffSettings = field(default_factory=StiffSettings)
    unit_gradient: bool = True
