"""What a recorder is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A number of the log."""

    tag: str
    value: float
    step: int


class AbstractRecorder(ABC):
    """Takes a run's log, block by block.

    To make another one only ``scalars`` must be written; the other methods then do nothing.
    Methods may raise OSError: logging then stops, with a warning, and training goes on.
    """

    def __str__(self) -> str:
        """Where it writes, for warnings."""
        return type(self).__name__

    @abstractmethod
    def scalars(self, rows: Sequence[Row]) -> None:
        """Take a block of numbers."""

    def begin(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:  # noqa: B027
        """Take the hyperparameters a run starts with, and which of them are tuned."""

    def text(self, tag: str, text: str, step: int) -> None:  # noqa: B027
        """Take a text in Markdown."""

    def figure(self, tag: str, figure: Any, step: int) -> None:  # noqa: B027
        """Take a matplotlib figure."""

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:  # noqa: B027
        """Take how values are spread, for example learning rates of layers."""

    def last(self, rows: Sequence[Row]) -> None:
        """Take the numbers of the end, which a run that is resumed writes anew."""
        self.scalars(rows)

    def resume(self, step: int) -> None:  # noqa: B027
        """Forget the end and what was written after a step: the run goes on from there."""

    def end(self, status: str) -> None:  # noqa: B027
        """Take note of the end: ``"finished"``, ``"stopped"``, ``"interrupted"``, ``"failed"``."""


class NoRecorder(AbstractRecorder):
    """Keeps nothing."""

    def scalars(self, rows: Sequence[Row]) -> None:
        """Nothing."""
