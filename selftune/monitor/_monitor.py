"""The log of a run, buffered on the device and written in blocks."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selftune.monitor._base import AbstractRecorder, NoRecorder, Row
from selftune.monitor.recorders import as_recorder

log = logging.getLogger("selftune")

Buffered = tuple[str, Any, int, float]
"""Tag, value (a number, or a tensor on its device), step and time."""
DISTINCT = 8
"""Maximum number of values of a hyperparameter logged one by one, instead of their range."""


class Monitor:
    """Buffers scalars and passes them to a recorder in blocks.

    Tensors stay on their device until a block is written, so logging does not synchronise. The
    last block is written when the process exits or the monitor is deleted. If writing fails (a full
    disk), training continues after one warning.

    Args:
        target: The receiver of the log, see :func:`~selftune.monitor.as_recorder`.
        name: Name of the run, if several share a target; or None.
    """

    block = 100

    def __init__(self, target: Any, name: str | None = None) -> None:
        """Files are opened when the first block is written."""
        self.recorder = as_recorder(target, name)
        self._rows: list[Buffered] = []
        self._rest: weakref.finalize[..., Monitor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy writes its own rest."""
        return {**self.__dict__, "_rows": list(self._rows), "_rest": None}

    @property
    def on(self) -> bool:
        """Whether there is a recorder."""
        return not isinstance(self.recorder, NoRecorder)

    def scalar(self, tag: str, value: float | Tensor, step: int) -> None:
        """Log a number; a tensor is read when the block is written."""
        if not self.on:
            return
        if isinstance(value, Tensor):
            value = value.detach().reshape(()).float()
        self._rows.append((tag, value, step, time.time()))
        if self._rest is None:
            self._rest = weakref.finalize(self, _write_rest, self.recorder, self._rows)
        if len(self._rows) >= self.block:
            self.flush()

    def scalars(self, rows: Iterable[tuple[str, float | Tensor]], step: int) -> None:
        """Log several numbers of one step."""
        for tag, value in rows:
            self.scalar(tag, value, step)

    def last(self, rows: Iterable[tuple[str, float]], step: int) -> None:
        """Write final numbers, which a resumed run writes again."""
        block = [Row(tag, float(value), step) for tag, value in rows]
        if self.on and block:
            self.flush()
            self._try(lambda: self.recorder.last(block))

    def flush(self) -> None:
        """Write buffered entries."""
        rows, self._rows = self._rows, []
        if self._rest is not None:  # the next one runs before the recorder closes its files
            self._rest.detach()
            self._rest = None
        if self.on and rows:
            self._try(lambda: self.recorder.scalars(_read(rows)))

    def begin(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:
        """Log the initial hyperparameters."""
        self._try(lambda: self.recorder.begin(hparams, tuned))

    def resume(self, step: int) -> None:
        """Resume the run at a step, and drop later rows."""
        self.flush()  # else undone rows would follow
        self._try(lambda: self.recorder.resume(step))

    def begin_anew(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:
        """Log the initial hyperparameters of a resumed run, if the target has none."""
        self._try(lambda: self.recorder.begin_anew(hparams, tuned))

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text."""
        self.flush()
        self._try(lambda: self.recorder.text(tag, text, step))

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure."""
        self.flush()
        self._try(lambda: self.recorder.figure(tag, figure, step))

    def histograms(self, values: Mapping[str, Any], step: int) -> None:
        """Write histograms of hyperparameters that differ between many tensors."""
        for name, some in values.items():
            if isinstance(some, list) and len(set(some)) > DISTINCT:
                self._try(partial(self.recorder.histogram, f"layers/{name}", some, step))

    def end(self, status: str) -> None:
        """Write buffered entries and the end of the run."""
        self.flush()
        self._try(lambda: self.recorder.end(status))

    def _try(self, write: Callable[[], object]) -> None:
        """Write, or stop logging after a failure."""
        try:
            write()
        except OSError as error:
            log.warning("%s: logging stopped, training continues: %s", self.recorder, error)
            self.recorder = NoRecorder()


def _read(rows: Sequence[Buffered]) -> list[Row]:
    """Buffered rows as numbers, with one transfer for each device."""
    numbers = {at: value for at, (_, value, *_) in enumerate(rows)}
    waiting: dict[torch.device, list[int]] = {}
    for at, value in numbers.items():
        if isinstance(value, Tensor):
            waiting.setdefault(value.device, []).append(at)
    for places in waiting.values():
        flat = torch.stack([rows[at][1] for at in places]).tolist()
        numbers.update(zip(places, flat, strict=True))
    return [
        Row(tag, float(numbers[at]), step).at(when) for at, (tag, _, step, when) in enumerate(rows)
    ]


def _write_rest(recorder: AbstractRecorder, rows: Sequence[Buffered]) -> None:
    """Write what is left when a run was not finished: it ends with its process."""
    try:
        recorder.scalars(_read(rows))
    except OSError as error:
        log.warning("%s: the last %d entries are lost: %s", recorder, len(rows), error)


def named(tag: str, values: Any) -> list[tuple[str, float]]:
    """Tags and numbers of a hyperparameter: one, or several or their range if tensors differ."""
    if not isinstance(values, list):
        return [(tag, float(values))]
    if len(values) <= DISTINCT:
        return [(f"{tag}/{i}", float(v)) for i, v in enumerate(values)]
    ordered = sorted(values)  # with the upper median
    ends = {"lowest": ordered[0], "median": ordered[len(ordered) // 2], "highest": ordered[-1]}
    return [(f"{tag}/{end}", float(v)) for end, v in ends.items()]


def plain_rows(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Names and numbers of hyperparameters, summarised if many tensors differ."""
    return [row for name, value in values.items() for row in named(name, value)]


def hyper_rows(
    loss: float | Tensor, values: Mapping[str, Any], signals: Mapping[str, tuple[Any, Any]]
) -> list[tuple[str, float | Tensor]]:
    """All rows of one hyperparameter step.

    Args:
        loss: The outer loss.
        values: Current hyperparameters.
        signals: Mean hypergradient and signal-to-noise ratio of each tuned one.
    """
    rows: list[tuple[str, float | Tensor]] = [("Loss/val", loss)]
    for name, value in values.items():
        rows += named(f"hyper/{name}", value)
    for name, (mean, snr) in signals.items():
        rows.append((f"hypergrad/{name}/norm", float(mean.norm())))
        rows.append((f"hypergrad/{name}/snr", float(snr.mean())))
        if len(mean) == 1:
            rows.append((f"hypergrad/{name}/value", float(mean)))
    return rows
