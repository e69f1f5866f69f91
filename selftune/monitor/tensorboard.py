"""Event files for TensorBoard: scalars and their layout, texts, figures, the HParams dashboard."""

from __future__ import annotations

import logging
import math
import numbers
import os
import re
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selftune._arguments import FOLDER, That, checked
from selftune._processes import alive, younger
from selftune.monitor._base import OVER, AbstractRecorder, Row, is_final
from selftune.monitor.axes import WHEN
from selftune.monitor.layout import Chart, layout

log = logging.getLogger("selftune")

CODE = re.compile(r"([^/]+/)?verdict/")
"""Tags of verdicts' codes, possibly prefixed with the name of an optimizer."""
EVENT = re.compile(rf"([^/]+/)?{WHEN}/")
"""Tags of events."""
_begun: set[Path] = set()
"""Folders in which a run of this process has begun."""
END = ".end"
"""Suffix of the event file with the session's end."""


def writes_scalars(target: Any) -> bool:
    """Whether an object has a writer's ``add_scalar`` and ``flush``."""
    return hasattr(target, "add_scalar") and hasattr(target, "flush")


class TensorBoard(AbstractRecorder):
    """Writes event files: scalars, their layout, texts, figures and the HParams dashboard.

    Start and end of the session are written to the run's folder, without a description of the
    experiment, so the dashboard shows the union of all runs' columns. A run in the folder of a
    killed run replaces its curves; in the folder of a finished or running one it adds its own.

    Args:
        target: A folder, or its URL; or a ``SummaryWriter``, or an object with its ``add_scalar``
            and ``flush``.
        about: Additional columns of the HParams dashboard: numbers, strings or booleans by name.
    """

    @checked(
        target=FOLDER | That(writes_scalars, "a SummaryWriter, or with its add_scalar and flush"),
    )
    def __init__(self, target: str | Path | Any, about: Mapping[str, Any] | None = None) -> None:
        self._about = dict(about or {})
        if isinstance(target, str) and "://" in target:
            from torch.utils.tensorboard import SummaryWriter

            target = SummaryWriter(target)
        folder = Path(target) if isinstance(target, (str, Path)) else None
        self._folder = folder and folder.absolute()  # the process may change its directory
        self._writer = target if folder is None else None
        self._purge: int | None = None
        self._last: list[Row] = []
        self._texts: dict[str, tuple[str, int]] = {}
        self._tags: set[str] = set()
        self._parted: list[str] = []  # events whose separator a resume removes
        self._charts = False  # whether the layout is this recorder's
        self._close: Callable[[], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copied run continues to write to the same folder; an open writer is not copied."""
        return {**self.__dict__, "_writer": None, "_close": None}

    def __str__(self) -> str:
        return type(self).__name__ if self._folder is None else str(self._folder)

    @property
    def writer(self) -> Any:
        """The writer, opened on first use."""
        if self._writer is None:
            if self._folder is None:
                raise OSError("a copied run cannot use the writer of the original")
            from torch.utils.tensorboard import SummaryWriter

            if self._purge is None and _killed(self._folder):
                self._purge = 0
            elif self._purge is None and not self._tags and _used(self._folder):
                log.warning(
                    "log_dir=%r already contains a run, whose curves TensorBoard will draw "
                    "together with those of the new one: pass another folder, or resume the run "
                    "with load_state_dict", str(self._folder),
                )  # fmt: skip
            if self._purge is not None or self._tags:  # another file follows earlier ones
                _wait(self._folder)
            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge)
            for tag in self._parted:  # else a line joins the event to the next one
                self._writer.add_scalar(tag, math.nan, self._purge)
            self._purge, self._parted = None, []  # a writer opened later appends
            # The writer's thread ends with this recorder at the latest.
            self._close = weakref.finalize(self, self._writer.close)
        return self._writer

    def scalars(self, rows: Sequence[Row]) -> None:
        """Write rows, and the layout of the custom scalars when it has new charts."""
        _write(self.writer, rows)
        self._lay_out(row.tag for row in rows)
        self.writer.flush()

    def _lay_out(self, tags: Iterable[str]) -> None:
        before = layout(self._tags)
        self._tags.update(tags)
        now = layout(self._tags)
        if now != before and self._charts and self._whole():
            self.writer.file_writer.add_summary(_layout_summary(now))

    def last(self, rows: Sequence[Row]) -> None:
        """Store rows for the file with the session's end, which a resumed run removes."""
        if self._folder is None:
            self.scalars(rows)
        else:
            self._last += rows

    @property
    def begun(self) -> bool:
        """Whether the folder has event files; a writer's are the user's."""
        return self._folder is None or bool(_names_in(self._folder))

    def begin(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:
        """Write the session's start, and start tracking the layout of the custom scalars."""
        if not self._whole():
            return
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo

        start = SessionStartInfo(start_time_secs=time.time())
        for name, value in hparams.items():
            start.hparams[f"start/{name}"].number_value = value
        for name, value in self._about.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, numbers.Real):
                start.hparams[name].number_value = float(value)
            else:  # None, a tuple, a class, …
                start.hparams[name].string_value = str(value)
        _session(self.writer, metadata.SESSION_START_INFO_TAG, session_start_info=start)
        self.writer.flush()
        if self._folder is not None:
            _begun.add(self._folder.resolve())
        self._charts = True

    def text(self, tag: str, text: str, step: int) -> None:
        """Write the text; that of a run's end goes to the file with the session's end."""
        if self._folder is not None and is_final(tag):
            self._texts[tag] = (text, step)
        elif self._whole():
            self.writer.add_text(tag, text, step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write the figure as an image."""
        if self._whole():
            self.writer.add_figure(tag, figure, step)

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        """Write the histogram."""
        if self._whole():
            self.writer.add_histogram(tag, np.asarray(values), step)

    def resume(self, step: int) -> None:
        """Tell TensorBoard to drop later steps and the end."""
        self._purge = step + 1
        self._charts = True
        if self._folder is not None:
            self._shut()  # only a writer that is opened can purge
            for file in self._folder.glob(f"events.out.tfevents.*{END}"):
                file.unlink()
            steps = _steps_in(self._folder)
            self._tags.update(steps)
            self._parted = [tag for tag, at in steps.items() if EVENT.match(tag) and step in at]

    def end(self, status: str) -> None:
        """Write the session's end and the final numbers, and close the writer.

        They are in a separate file, which a resumed run removes, because the dashboard uses the
        first end in a folder.
        """
        if self._whole():
            self._end(status)
        self._shut()

    def _shut(self) -> None:
        """Close a writer of our own."""
        if self._close is not None:
            self._close()
            self._writer = self._close = None

    def _end(self, status: str) -> None:
        self.writer.flush()
        ending = self.writer if self._folder is None else _ending(self._folder)
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo

        code = api_pb2.STATUS_SUCCESS if status in OVER else api_pb2.STATUS_FAILURE
        end = SessionEndInfo(status=code, end_time_secs=time.time())
        _write(ending, self._last)
        self._lay_out(row.tag for row in self._last)
        for tag, (text, step) in self._texts.items():
            ending.add_text(tag, text, step)
        self._last, self._texts = [], {}
        _session(ending, metadata.SESSION_END_INFO_TAG, session_end_info=end)
        ending.flush()
        if ending is not self.writer:
            ending.close()

    def _whole(self) -> bool:
        """Whether the target is a SummaryWriter; a similar object only supports scalars."""
        return self._folder is not None or hasattr(self._writer, "file_writer")


def _write(writer: Any, rows: Iterable[Row]) -> None:
    """Write scalars.

    Codes of verdicts are not drawn as curves: in event files they are tensors without a dashboard.
    Each event is an isolated point, separated from the next by a NaN, which TensorBoard draws as a
    triangle.
    """
    files = hasattr(writer, "file_writer")
    for row in rows:
        tag, value, step = row
        if files and CODE.match(tag):
            writer.file_writer.add_summary(_code_summary(tag, value), step)
            continue
        when = {"walltime": row.time} if files and row.time else {}
        writer.add_scalar(tag, value, step, **when)
        if files and EVENT.match(tag):
            writer.add_scalar(tag, math.nan, step + 1, **when)


def _code_summary(tag: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.util.tensor_util import make_tensor_proto

    plugin = SummaryMetadata.PluginData(plugin_name="selftune")
    about = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
    tensor = make_tensor_proto(np.float32(value))
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=tensor)])


def _layout_summary(pages: Mapping[str, Sequence[Chart]]) -> Any:
    """The layout in the dashboard's format; torch's writer supports only one series in a chart."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    made = layout_pb2.Layout()
    for title, charts in pages.items():
        page = made.category.add(title=title)
        # TensorBoard draws line charts in order, and charts with margins in reverse order.
        for chart in reversed(charts) if charts[0].series else charts:
            drawn = page.chart.add(title=chart.title)
            drawn.multiline.tag.extend(f"^{re.escape(tag)}$" for tag in chart.lines)
            for value, lower, upper in chart.series:
                drawn.margin.series.add(value=value, lower=lower, upper=upper)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    tensor, about = make_tensor_proto(made.SerializeToString()), SummaryMetadata(plugin_data=plugin)
    tag = metadata.CONFIG_SUMMARY_TAG
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=tensor)])


def _steps_in(folder: Path) -> dict[str, set[int]]:
    """Steps of the scalars in a folder's event files, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not _names_in(folder):
        return {}
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return {tag: {e.step for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def _wait(folder: Path) -> None:
    """Wait until a new file sorts after the existing ones; names contain the time in seconds."""
    names = [name.split(".")[3:4] for name in _names_in(folder)]
    newest = max((int(n[0]) for n in names if n and n[0].isdigit()), default=0)
    while newest == int(time.time()):
        time.sleep(0.05)


def _ending(folder: Path) -> Any:
    """A writer whose file sorts after the others; names of one second end in a counter."""
    from torch.utils.tensorboard import SummaryWriter

    before = {*_names_in(folder)}
    writer = SummaryWriter(str(folder), filename_suffix=END)
    (made,) = {*_names_in(folder)} - before
    if made > max(before):
        return writer
    writer.close()  # the tenth sorts before the ninth
    (folder / made).unlink()
    _wait(folder)
    return SummaryWriter(str(folder), filename_suffix=END)


def _names_in(folder: Path) -> list[str]:
    """Names of the event files in a folder."""
    return [file.name for file in folder.glob("events.out.tfevents.*")]


def _used(folder: Path) -> bool:
    """Whether a folder has files of another process, or of a run that has begun in this one."""
    names = _names_in(folder)
    if names and folder.resolve() in _begun:
        return True
    own = socket.gethostname(), os.getpid()
    return any(
        of is None or of[1:] != own or younger(of[2], of[0]) for of in map(_writer_of, names)
    )


def _killed(folder: Path) -> bool:
    """Whether a folder contains only the log of a killed run.

    All its files belong to dead processes of this machine, and none contains a session's end.
    """
    names = _names_in(folder)
    here = socket.gethostname()
    return bool(names) and all(
        of is not None and of[1] == here and (not alive(of[2]) or younger(of[2], of[0]))
        for of in map(_writer_of, names)
    )


def _writer_of(name: str) -> tuple[int, str, int] | None:
    """Time of an event file, as of ``time.time()``, host and process; None of an end."""
    found = re.fullmatch(r"events\.out\.tfevents\.(\d+)\.(.+?)\.(\d+)\.\d+(.*)", name)
    return None if found is None or found[4] == END else (int(found[1]), found[2], int(found[3]))


def _session(writer: Any, tag: str, **info: Any) -> None:
    """Write the data of the HParams dashboard, whose own writer needs TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    about = metadata.create_summary_metadata(HParamsPluginData(**info))
    value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
    writer.file_writer.add_summary(Summary(value=[value]))
