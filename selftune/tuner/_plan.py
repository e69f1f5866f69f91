"""The length of a run, and the intervals of its events."""

from __future__ import annotations

from dataclasses import dataclass

from selftune.tuner._data import Stream

LOG, REST, ENTRIES = 50, 0.1, 20
"""Steps and minimum seconds between two log entries; number of entries in short runs."""


def length(train: Stream, whole: Stream, epochs: int | None, steps: int | None) -> int:
    """Steps in the run.

    ``whole`` are the training batches that are counted, with held-out examples.
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs={epochs}, steps={steps}: pass one of the two")
    if steps is not None:
        return steps
    assert epochs is not None
    if not whole.sized:
        raise ValueError(f"epochs={epochs} needs train to have a length: pass steps= instead")
    if len(whole) == 0:
        raise ValueError("train has no batches: is it empty, or too short for drop_last=True?")
    train.expected, whole.expected = len(train), len(whole)
    return epochs * whole.expected


def between_evaluations(train: Stream, total: int) -> int:
    """Steps between evaluations: one or more epochs; if ``train`` is unsized, 1/10 of the run."""
    score = max(1, train.initial_length or total // 10)
    return score * max(1, -(-total // (50 * score)))


def between_entries(total: int, given: int | None) -> tuple[int, float]:
    """Steps between log entries, and the minimum number of seconds.

    Examples:
        >>> between_entries(10_000, None), between_entries(60, None), between_entries(60, 10)
        ((50, 0.1), (3, 0.0), (10, 0.0))
    """
    if given is not None:
        return given, 0.0
    if total < ENTRIES * LOG:
        return max(1, total // ENTRIES), 0.0
    return LOG, REST


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a run after an evaluation, for callbacks.

    Attributes:
        step: Training steps taken.
        total: Steps in the whole run.
        epoch: Index of the current epoch, from 0.
        train_loss: Mean training loss since the last evaluation.
        scores: ``loss`` and other metrics over the whole validation set, at the average.
        hparams: Current hyperparameters.
        joined: Whether held-out examples have become training data (``val=None``); ``scores`` are
            then those at the join.
    """

    step: int
    total: int
    epoch: int
    train_loss: float
    scores: dict[str, float]
    hparams: dict[str, float]
    joined: bool = False


@dataclass(kw_only=True)
class Plan:
    """The length of a run and the intervals of its events, in steps.

    Held-out examples, if any, join after step ``join``, where all events are due. ``share`` is the
    part of the training data that was split off with ``seed``.
    """

    total: int
    every: int
    score: int
    save: int
    log: int
    rest: float
    picture: int | None
    patience: int | None
    compile: bool | str
    exploit: int
    join: int | None = None
    share: float | None = None
    seed: int = 0

    def due(self, step: int) -> bool:
        return step % self.log < self.every

    def falls(self, every: int, step: int) -> bool:
        """Whether a periodic event is due after a step; at the join and the end, it always is."""
        return step % every == 0 or step in (self.total, self.join)

    def pictured(self, step: int) -> bool:
        return self.picture is not None and self.falls(self.picture, step)
