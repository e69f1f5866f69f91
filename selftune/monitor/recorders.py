"""Where a run's log goes: TensorBoard, memory, a file of JSON lines, a function."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selftune.monitor.layout import layout


class Row(NamedTuple):
    """A number of the log."""

    tag: str
    value: float
    step: int


class AbstractRecorder(ABC):
    """Takes a run's log, block by block.

    To make another one only ``scalars`` must be written; what else it is told is left alone then.
    Methods may raise OSError: logging then stops, with a warning, and training goes on.
    """

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

    def resume(self, step: int) -> None:  # noqa: B027
        """Forget what was written after a step: the run goes on from there."""

    def end(self, status: str) -> None:  # noqa: B027
        """Take note of the end: ``"finished"``, ``"stopped"``, ``"interrupted"``, ``"failed"``."""


class NoRecorder(AbstractRecorder):
    """Keeps nothing."""

    def scalars(self, rows: Sequence[Row]) -> None:
        """Nothing."""


class InMemory(AbstractRecorder):
    """Keeps everything in lists.

    Example:
        >>> import selftune as st
        >>> recorder = st.monitor.InMemory()
        >>> recorder.scalars([st.monitor.Row("val/loss", 0.5, 10)])
        >>> recorder.curve("val/loss")
        ([10], [0.5])
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.texts: list[tuple[str, str, int]] = []
        self.hparams: dict[str, float] = {}
        self.status = ""

    def scalars(self, rows: Sequence[Row]) -> None:
        """Keep them."""
        self.rows += rows

    def begin(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:
        """Keep them."""
        self.hparams = dict(hparams)

    def text(self, tag: str, text: str, step: int) -> None:
        """Keep it."""
        self.texts.append((tag, text, step))

    def resume(self, step: int) -> None:
        """Forget later rows."""
        self.rows = [r for r in self.rows if r.step <= step]

    def end(self, status: str) -> None:
        """Keep it."""
        self.status = status

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        """Steps and values of a tag."""
        rows = [r for r in self.rows if r.tag == tag]
        return [r.step for r in rows], [r.value for r in rows]


class JSONL(AbstractRecorder):
    """Appends a line ``{"tag": …, "value": …, "step": …}`` for each number to a file.

    What is not finite is written as ``null``. Several processes may write to one file: a block
    is appended whole.

    Args:
        path: Of the file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def scalars(self, rows: Sequence[Row]) -> None:
        """Append them."""
        self._append([{"tag": t, "value": _finite(v), "step": s} for t, v, s in rows])

    def begin(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:
        """Append a line ``{"hparams": …, "tuned": …}``."""
        known = {n: _finite(v) for n, v in hparams.items()}
        self._append([{"hparams": known, "tuned": list(tuned)}])

    def text(self, tag: str, text: str, step: int) -> None:
        """Append it."""
        self._append([{"tag": tag, "text": text, "step": step}])

    def resume(self, step: int) -> None:
        """Leave out lines of later steps, and a last one that a kill cut short."""
        if not self.path.exists():
            return
        kept = [row for row in read_jsonl(self.path) if row.get("step", 0) <= step]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        fresh.replace(self.path)

    def end(self, status: str) -> None:
        """Append a line ``{"status": …}``."""
        self._append([{"status": status}])

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was cut short is left out."""
    found = []
    for line in Path(path).read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # a process was killed while it wrote
            continue
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Listener(AbstractRecorder):
    """Calls a function with the numbers of each step, for Weights & Biases, MLflow and others.

    Args:
        function: ``function(values, step)``, values by tag.

    Example:
        >>> import selftune as st
        >>> listener = st.monitor.Listener(lambda values, step: print(step, values))
        >>> rows = [st.monitor.Row("hyper/lr", 0.1, 5), st.monitor.Row("val/loss", 2.0, 5)]
        >>> listener.scalars(rows)
        5 {'hyper/lr': 0.1, 'val/loss': 2.0}
    """

    def __init__(self, function: Callable[[dict[str, float], int], Any]) -> None:
        self.function = function

    def scalars(self, rows: Sequence[Row]) -> None:
        """Call it, once a step."""
        steps: dict[int, dict[str, float]] = {}
        for tag, value, step in rows:
            steps.setdefault(step, {})[tag] = value
        for step, values in steps.items():
            self.function(values, step)


class TensorBoard(AbstractRecorder):
    """Writes event files: scalars, their layout, texts, figures and the HParams dashboard.

    The session's start is written at the beginning and its end at the end, in the run's own
    folder, without a description of the experiment: the dashboard then shows the union of all
    runs' columns.

    Args:
        target: A folder; or a ``SummaryWriter``, or anything with its ``add_scalar`` and ``flush``.
    """

    def __init__(self, target: str | Path | Any) -> None:
        self._folder = target if isinstance(target, (str, Path)) else None
        self._writer = None if self._folder is not None else target
        self._purge: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied run goes on writing to the same folder; an open writer is not copied."""
        return {**self.__dict__, "_writer": None}

    @property
    def writer(self) -> Any:
        """Opened when something is first written."""
        if self._writer is None:
            if self._folder is None:
                raise OSError("a copied run does not keep the writer it was given")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge)
        return self._writer

    def scalars(self, rows: Sequence[Row]) -> None:
        """Write them."""
        for tag, value, step in rows:
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def begin(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:
        """Write the session's start and the layout of the custom scalars."""
        if not self._whole():
            return
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo

        start = SessionStartInfo(start_time_secs=time.time())
        for name, value in hparams.items():
            start.hparams[f"start/{name}"].number_value = value
        self._session(metadata.SESSION_START_INFO_TAG, session_start_info=start)
        self.writer.add_custom_scalars(layout(tuned))
        self.writer.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """Write it."""
        if self._whole():
            self.writer.add_text(tag, text, step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write it as an image."""
        if self._whole():
            self.writer.add_figure(tag, figure, step)

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        """Write it."""
        if self._whole():
            self.writer.add_histogram(tag, np.asarray(values), step)

    def resume(self, step: int) -> None:
        """Tell TensorBoard to drop what it knows of later steps."""
        self._purge = step + 1

    def end(self, status: str) -> None:
        """Write the session's end."""
        if not self._whole():
            return
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo

        well = status in ("finished", "stopped")
        code = api_pb2.STATUS_SUCCESS if well else api_pb2.STATUS_FAILURE
        end = SessionEndInfo(status=code, end_time_secs=time.time())
        self._session(metadata.SESSION_END_INFO_TAG, session_end_info=end)
        self.writer.flush()

    def _session(self, tag: str, **info: Any) -> None:
        """Write what the HParams dashboard reads, whose own writer needs TensorFlow."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        about = metadata.create_summary_metadata(HParamsPluginData(**info))
        value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
        self.writer.file_writer.add_summary(Summary(value=[value]))

    def _whole(self) -> bool:
        """Whether it is a SummaryWriter; something like one takes scalars only."""
        return self._folder is not None or hasattr(self._writer, "file_writer")


def as_recorder(target: Any) -> AbstractRecorder:
    """A recorder of whatever was given as ``log_dir=`` or ``recorder=``.

    Args:
        target: None, a folder, a recorder, a ``SummaryWriter`` or what is like one, a function
            of values and step, or a sequence of these.

    Raises:
        TypeError: Something else.
    """
    if target is None:
        return NoRecorder()
    if isinstance(target, AbstractRecorder):
        return target
    if isinstance(target, (str, Path)) or hasattr(target, "add_scalar"):
        return TensorBoard(target)
    if isinstance(target, Sequence):
        return Several([as_recorder(one) for one in target])
    if callable(target):
        return Listener(target)
    raise TypeError(
        f"recorder={target!r}: use a folder, a recorder of selftune.monitor, a SummaryWriter, a "
        "function(values, step), or a list of these"
    )


class Several(AbstractRecorder):
    """Hands everything to several recorders."""

    def __init__(self, recorders: Sequence[AbstractRecorder]) -> None:
        self.recorders = list(recorders)

    def scalars(self, rows: Sequence[Row]) -> None:
        """To all."""
        for recorder in self.recorders:
            recorder.scalars(rows)

    def begin(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:
        """To all."""
        for recorder in self.recorders:
            recorder.begin(hparams, tuned)

    def text(self, tag: str, text: str, step: int) -> None:
        """To all."""
        for recorder in self.recorders:
            recorder.text(tag, text, step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """To all."""
        for recorder in self.recorders:
            recorder.figure(tag, figure, step)

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        """To all."""
        for recorder in self.recorders:
            recorder.histogram(tag, values, step)

    def resume(self, step: int) -> None:
        """To all."""
        for recorder in self.recorders:
            recorder.resume(step)

    def end(self, status: str) -> None:
        """To all."""
        for recorder in self.recorders:
            recorder.end(status)
