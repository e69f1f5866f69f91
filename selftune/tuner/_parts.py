"""The parts of a tuner's run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selftune.tuner._compiled import Fused
from selftune.tuner._data import Stream
from selftune.tuner._group import Group
from selftune.tuner._plan import Plan
from selftune.tuner._population import Population
from selftune.tuner._scoring import Scorer
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps
from selftune.tuner._watch import Watch


@dataclass(kw_only=True)
class Joining:
    """The join of a run: its step, the batches after it, and its state.

    Attributes:
        joined: The step at which they joined, or None.
        scores: Scores on the held-out examples at the join.
        back: Whether the run had overfitted, so that it returns to its last good weights.
        loss: Loss on the held-out examples: at the join, or at the last good weights if ``back``.
    """

    step: int
    batches: Stream
    joined: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    back: bool = False
    loss: float = math.nan

    def state_dict(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("joined", "scores", "back", "loss")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


@dataclass(kw_only=True)
class Parts:
    """The parts of one run."""

    steps: Steps
    fused: Fused
    plan: Plan
    train: Stream
    val: Stream
    scorer: Scorer
    snapshots: Snapshots
    watch: Watch
    population: Population | None
    identity: dict[str, Any]
    joining: Joining | None = None
    folder: Path | None = None
    callbacks: Sequence[Any] = ()
    step: int = 0
    best: float = math.inf
    waited: int = 0
    ended: str = "finished"
    longer: bool = False  # whether it extends a finished run
    saved_best: dict[str, Any] | None = None
    storable: bool | None = None  # whether best.pt can be read again; None before it was tried

    @property
    def group(self) -> Group:
        return self.steps.group

    @property
    def joined(self) -> bool:
        return self.joining is not None and self.joining.joined is not None

    @property
    def writes(self) -> Path | None:
        return self.folder if self.group.first else None
