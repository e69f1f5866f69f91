"""Records of a run, which drivers pass to the controller, and the action it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple


class Saved:
    """A dataclass of plain numbers and of such dataclasses, saved without its settings."""

    def state_dict(self) -> dict[str, Any]:
        """The numbers to save."""
        numbers = asdict(self)  # type: ignore[call-overload]
        return {n: v for n, v in numbers.items() if n not in ("policy", "settings")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name, value in state.items():
            part = getattr(self, name)
            if is_dataclass(part):
                vars(part).update(value)
            else:
                setattr(self, name, value)


class SweepSlope(NamedTuple):
    """Slopes of the loss along the last step of the sweep.

    Attributes:
        slope: The slope at the end of the step.
        values: Current hyperparameters.
        start: The slope at the start of the step.
        gain: Factor of the step because running means start at 0.
    """

    slope: float
    values: Mapping[str, float]
    start: float = 0.0
    gain: float = 1.0


class Gradient(NamedTuple):
    """Whether a training gradient, and the weights after its step, are finite."""

    finite: bool


class Activity(NamedTuple):
    """The numbers of live units: rows of weights with a non-zero gradient.

    Attributes:
        alive: Number of live units of each layer; NaN if it is frozen or unused.
        age: Steps since the last restart.
        climb: Log of the ratio of the learning rate to the given one.
    """

    alive: Sequence[float]
    age: int = 0
    climb: float = 0.0


class TrainingLoss(NamedTuple):
    """The loss of a training batch."""

    loss: float


class ValidationLoss(NamedTuple):
    """The loss of a validation batch at the outer point.

    Attributes:
        loss: The loss of one batch.
        compare: Returns mean losses at the outer point and at the good weights over many
            batches, optionally with the standard error of their difference.
    """

    loss: float
    compare: Callable[[], tuple[float, ...]]


class Hypergradient(NamedTuple):
    """Whether a hypergradient is finite."""

    finite: bool


Record = SweepSlope | Gradient | Activity | TrainingLoss | ValidationLoss | Hypergradient


class Action(NamedTuple):
    """The action of a driver; nothing by default.

    Attributes:
        skip: Skip the current step.
        snapshot: Weights to store first: ``"iterate"`` the current weights as the average, in the
            sweep; ``"average"`` the averaged ones as the last good ones, ``"candidate"`` as the
            candidate, ``"promote"`` the candidate as the last good ones.
        rewind: Then return to the good weights and restart, with these changes of raw values.
        reason: The reason for the log; empty if the rewind belongs to the sweep.
        diverged: Whether the learning rate was too high after a confirmed sweep: later it rises
            more slowly near its present value.
    """

    skip: bool = False
    snapshot: str = ""
    rewind: Mapping[str, float] | None = None
    reason: str = ""
    diverged: bool = False

    @property
    def planned(self) -> bool:
        """Whether a rewind belongs to the sweep.

        During the sweep the average is the best iterate so far, to which it returns. The initial
        weights remain the last good ones until later losses confirm the sweep.
        """
        return self.rewind is not None and not self.reason
