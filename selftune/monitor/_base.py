"""What a run tells while it trains, gathered on the device and written in blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger("selftune")


class Writer(Protocol):
    """What is needed of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Write one number."""

    def flush(self) -> object:
        """Bring what is written to disk."""


class Monitor:
    """Buffers scalars and hands them to a writer in blocks.

    Tensors stay on their device until a block is written, so logging makes no step wait. If
    writing fails (a full disk), training goes on after one warning.

    Args:
        target: A folder for TensorBoard, a ``SummaryWriter`` or anything like it, or None.
    """

    block = 100

    def __init__(self, target: str | Path | Writer | None) -> None:
        """Nothing is opened before the first block is written."""
        self._target = target
        self._folder = target if isinstance(target, (str, Path)) else None
        self._rows: list[tuple[str, Any, int]] = []

    @property
    def on(self) -> bool:
        """Whether anyone listens."""
        return self._target is not None

    def scalar(self, tag: str, value: float | Tensor, step: int) -> None:
        """Note a number; a tensor is read only when the block is written."""
        if self._target is None:
            return
        if isinstance(value, Tensor):
            value = value.detach().reshape(()).float()
        self._rows.append((tag, value, step))
        if len(self._rows) >= self.block:
            self.flush()

    def __getstate__(self) -> dict[str, Any]:
        """A copied run goes on writing to the same folder; an open writer is not copied."""
        return {**self.__dict__, "_target": self._folder}

    def scalars(self, rows: Iterable[tuple[str, float | Tensor]], step: int) -> None:
        """Note several numbers of one step."""
        for tag, value in rows:
            self.scalar(tag, value, step)

    def flush(self) -> None:
        """Write what is buffered."""
        rows, self._rows = self._rows, []
        if self._target is None or not rows:
            return
        waiting: dict[torch.device, list[int]] = {}
        for at, (_, value, _) in enumerate(rows):
            if isinstance(value, Tensor):
                waiting.setdefault(value.device, []).append(at)
        for places in waiting.values():  # one transfer a device
            numbers = torch.stack([rows[at][1] for at in places]).tolist()
            for at, number in zip(places, numbers, strict=True):
                rows[at] = (rows[at][0], number, rows[at][2])
        try:
            writer = self._writer()
            for tag, value, step in rows:
                writer.add_scalar(tag, float(value), step)
            writer.flush()
        except OSError as error:
            log.warning("logging stopped, training goes on: %s", error)
            self._target = None

    def _writer(self) -> Writer:
        if isinstance(self._target, (str, Path)):
            from torch.utils.tensorboard import SummaryWriter

            self._target = SummaryWriter(str(self._target))
        assert self._target is not None
        return self._target


def named(prefix: str, name: str, values: Any) -> list[tuple[str, float]]:
    """Tags and numbers of a hyperparameter: one, or its range where tensors differ."""
    if not isinstance(values, list):
        return [(f"{prefix}/{name}", float(values))]
    distinct = list(dict.fromkeys(values))
    if len(distinct) <= 8:
        return [(f"{prefix}/{name}/{i}", float(v)) for i, v in enumerate(distinct)]
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    ends = {"lowest": ordered[0], "median": middle, "highest": ordered[-1]}
    return [(f"{prefix}/{name}/{end}", float(v)) for end, v in ends.items()]


def hyper_rows(
    loss: float | Tensor, values: Mapping[str, Any], signals: Mapping[str, tuple[Any, Any]]
) -> list[tuple[str, float | Tensor]]:
    """Everything one hyperparameter step has to tell.

    Args:
        loss: The outer loss.
        values: Present hyperparameters.
        signals: For each tuned one, its mean hypergradient and signal-to-noise ratio.
    """
    rows: list[tuple[str, float | Tensor]] = [("val/loss", loss)]
    for name, value in values.items():
        rows += named("hyper", name, value)
    for name, (mean, snr) in signals.items():
        rows.append((f"hypergrad/{name}/norm", float(mean.norm())))
        rows.append((f"hypergrad/{name}/snr", float(snr.mean())))
        if len(mean) == 1:
            rows.append((f"hypergrad/{name}/value", float(mean)))
    return rows
