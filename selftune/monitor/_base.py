"""The interface of recorders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Row(NamedTuple("Row", [("tag", str), ("value", float), ("step", int)])):
    """One number of the log: tag, value and step.

    Attributes:
        time: When it was logged, in seconds since 1970; 0 if unknown. Not an element of the tuple.
    """

    time: float = 0.0

    def at(self, time: float) -> Row:
        """The row with a time; changes it."""
        self.time = time
        return self


OVER = ("finished", "stopped")
"""Ends of runs that are complete."""


def is_final(tag: str) -> bool:
    """Whether a text with this tag is written at the end of a run, and again after a resume."""
    return tag.rpartition("/")[2] in ("verdicts", "why")


class AbstractRecorder(ABC):
    """Receives a run's log in blocks.

    A subclass only needs ``scalars``; the other methods do nothing by default. If a method raises
    OSError, logging stops with a warning, and training continues.
    """

    def __str__(self) -> str:
        """The target, for warnings."""
        return type(self).__name__

    @abstractmethod
    def scalars(self, rows: Sequence[Row]) -> None:
        """Receive a block of numbers."""

    def begin(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:  # noqa: B027
        """Receive the initial hyperparameters and the names of the tuned ones."""

    def begin_anew(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:
        """Begin, unless the target has a start: a run resumes in another folder."""
        if not self.begun:
            self.begin(hparams, tuned)

    @property
    def begun(self) -> bool:
        """Whether the target has the start of a run."""
        return True

    def text(self, tag: str, text: str, step: int) -> None:  # noqa: B027
        """Receive a text in Markdown."""

    def figure(self, tag: str, figure: Any, step: int) -> None:  # noqa: B027
        """Receive a matplotlib figure."""

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:  # noqa: B027
        """Receive a distribution of values, such as learning rates of layers."""

    def last(self, rows: Sequence[Row]) -> None:
        """Receive the final numbers, which a resumed run writes again."""
        self.scalars(rows)

    def resume(self, step: int) -> None:  # noqa: B027
        """Drop entries after a step and the final numbers, when a run resumes at that step."""

    def end(self, status: str) -> None:  # noqa: B027
        """Record the end: ``"finished"``, ``"stopped"``, ``"interrupted"`` or ``"failed"``."""


class NoRecorder(AbstractRecorder):
    """A recorder that discards everything."""

    def scalars(self, rows: Sequence[Row]) -> None:
        """Discard the rows."""
