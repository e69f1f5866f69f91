"""Event files for TensorBoard: scalars and their layout, texts, figures, the HParams dashboard."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selftune.monitor._base import AbstractRecorder, Row
from selftune.monitor.layout import layout

END = ".end"
"""Suffix of the event file that holds a session's end."""


class TensorBoard(AbstractRecorder):
    """Writes event files: scalars, their layout, texts, figures and the HParams dashboard.

    The session's start is written at the beginning and its end at the end, in the run's own
    folder, without a description of the experiment: the dashboard then shows the union of all
    runs' columns.

    Args:
        target: A folder; or a ``SummaryWriter``, or anything with its ``add_scalar`` and ``flush``.
        about: Further columns of the HParams dashboard: numbers, texts, true or false by name.
    """

    def __init__(self, target: str | Path | Any, about: Mapping[str, Any] | None = None) -> None:
        self._about = dict(about or {})
        self._folder = target if isinstance(target, (str, Path)) else None
        self._writer = None if self._folder is not None else target
        self._purge: int | None = None
        self._close: Callable[[], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied run goes on writing to the same folder; an open writer is not copied."""
        return {**self.__dict__, "_writer": None, "_close": None}

    @property
    def writer(self) -> Any:
        """Opened when something is first written."""
        if self._writer is None:
            if self._folder is None:
                raise OSError("a copied run does not keep the writer it was given")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge)
            self._purge = None  # one that is opened after this one goes on behind it
            # Each writer has a thread: it ends with this recorder at the latest.
            self._close = weakref.finalize(self, self._writer.close)
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
        for name, value in self._about.items():
            kind = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
            setattr(start.hparams[name], kind, value)
        _session(self.writer, metadata.SESSION_START_INFO_TAG, session_start_info=start)
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
        """Tell TensorBoard to drop what it knows of later steps, and of the end."""
        self._purge = step + 1
        if self._folder is not None:
            for file in Path(self._folder).glob(f"events.out.tfevents.*{END}"):
                file.unlink()

    def end(self, status: str) -> None:
        """Write the session's end, and close what was opened here.

        In a file of its own: the first end that the dashboard finds counts, and that of a run that
        goes on must be taken back.
        """
        if self._whole():
            self._end(status)
        if self._close is not None:
            self._close()
            self._writer = self._close = None

    def _end(self, status: str) -> None:
        self.writer.flush()
        from torch.utils.tensorboard import SummaryWriter

        ending = self.writer
        if self._folder is not None:
            ending = SummaryWriter(str(self._folder), filename_suffix=END)
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo

        well = status in ("finished", "stopped")
        code = api_pb2.STATUS_SUCCESS if well else api_pb2.STATUS_FAILURE
        end = SessionEndInfo(status=code, end_time_secs=time.time())
        _session(ending, metadata.SESSION_END_INFO_TAG, session_end_info=end)
        ending.flush()
        if ending is not self.writer:
            ending.close()

    def _whole(self) -> bool:
        """Whether it is a SummaryWriter; something like one takes scalars only."""
        return self._folder is not None or hasattr(self._writer, "file_writer")


def _session(writer: Any, tag: str, **info: Any) -> None:
    """Write what the HParams dashboard reads, whose own writer needs TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    about = metadata.create_summary_metadata(HParamsPluginData(**info))
    value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
    writer.file_writer.add_summary(Summary(value=[value]))
