"""Recorders other than TensorBoard: memory, JSON lines, functions."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

from selftune._arguments import FUNCTION, PATH, Instance, ListOf, checked
from selftune._files import write_text
from selftune.monitor._base import OVER, AbstractRecorder, NoRecorder, Row, is_final
from selftune.monitor.tensorboard import EVENT, TensorBoard, writes_scalars

log = logging.getLogger("selftune")

RECORDERS = ListOf(Instance((AbstractRecorder,), "a recorder"), "recorders of selftune.monitor")


class InMemory(AbstractRecorder):
    """Stores the log in lists.

    Examples:
        >>> import selftune as st
        >>> recorder = st.monitor.InMemory()
        >>> recorder.scalars([st.monitor.Row("Loss/val", 0.5, 10)])
        >>> recorder.curve("Loss/val")
        ([10], [0.5])
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.texts: list[tuple[str, str, int]] = []
        self.hparams: dict[str, float] = {}
        self.status = ""
        self._last: list[Row] = []
        # Number of rows before the last run, and at the end of the last complete one.
        self._began = self._ended = 0

    def scalars(self, rows: Sequence[Row]) -> None:
        """Store the rows."""
        self.rows += rows

    @property
    def begun(self) -> bool:
        """Whether hyperparameters are stored."""
        return bool(self.hparams)

    def begin(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:
        """Store the hyperparameters."""
        self.hparams, self._began = dict(hparams), len(self.rows)

    def text(self, tag: str, text: str, step: int) -> None:
        """Store the text."""
        self.texts.append((tag, text, step))

    def last(self, rows: Sequence[Row]) -> None:
        """Store the rows."""
        self.rows += rows
        self._last += rows

    def resume(self, step: int, prefix: str = "") -> None:
        """Drop the last run's rows of later steps and its final rows.

        Args:
            step: The step; -1 if the run did not reach a checkpoint.
            prefix: First part of the tags to be dropped, if several optimizers share the recorder.
        """
        for row in [r for r in self._last if r.tag.startswith(prefix)]:
            # The last occurrence, if an equal row was logged before.
            del self.rows[len(self.rows) - 1 - self.rows[::-1].index(row)]
            self._last.remove(row)
        first = min(self._ended if step < 0 else self._began, len(self.rows))
        self.rows[first:] = [
            r for r in self.rows[first:] if r.step <= step or not r.tag.startswith(prefix)
        ]

    def end(self, status: str) -> None:
        """Store the status."""
        self.status = status
        self._ended = len(self.rows) if status in OVER else self._ended

    def curve(self, tag: str) -> tuple[list[int], list[float]]:
        """Steps and values of a tag."""
        rows = [r for r in self.rows if r.tag == tag]
        return [r.step for r in rows], [r.value for r in rows]


class JSONL(AbstractRecorder):
    """Appends a line ``{"tag": …, "value": …, "step": …}`` for each number to a file.

    Values that are not finite are written as ``null``. Several processes may write to one file,
    because each block is appended in one write.

    Args:
        path: Path of the file; its folder is created.
    """

    @checked(path=PATH)
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()  # as the process may change its directory

    def __str__(self) -> str:
        return str(self.path)

    def scalars(self, rows: Sequence[Row]) -> None:
        """Append the rows."""
        self._append([{"tag": t, "value": _finite(v), "step": s} for t, v, s in rows])

    def last(self, rows: Sequence[Row]) -> None:
        """Append the rows, with ``"end": true``."""
        lines = [{"tag": t, "value": _finite(v), "step": s, "end": True} for t, v, s in rows]
        self._append(lines)

    @property
    def begun(self) -> bool:
        """Whether the file has a line with hyperparameters."""
        return self.path.exists() and any("hparams" in row for row in read_jsonl(self.path))

    def begin(self, hparams: Mapping[str, float], tuned: Sequence[str]) -> None:
        """Append a line ``{"hparams": …, "tuned": …}``."""
        known = {n: _finite(v) for n, v in hparams.items()}
        self._append([{"hparams": known, "tuned": list(tuned)}])

    def text(self, tag: str, text: str, step: int) -> None:
        """Append the text; with ``"end": true`` if a resumed run writes it again."""
        end = {"end": True} if is_final(tag) else {}
        self._append([{"tag": tag, "text": text, "step": step} | end])

    def resume(self, step: int, prefix: str = "") -> None:
        """Drop the last run's lines of later steps, final lines, and a truncated last line.

        If the file has other contents, a copy is kept, with a warning.

        Args:
            step: The step; -1 if the run did not reach a checkpoint.
            prefix: First part of the tags to be dropped, if several optimizers share the file.
        """
        if not self.path.exists():
            return
        self._check()
        rows = read_jsonl(self.path)
        ends = [number for number, row in enumerate(rows, 1) if "status" in row]
        if ends and ends[-1] == len(rows) and (step >= 0 or rows[-1]["status"] not in OVER):
            del ends[-1]  # that of the run which goes on
        first = ends[-1] if ends and not prefix else 0
        kept = rows[:first] + [
            row
            for row in rows[first:]
            if not str(row.get("tag", "")).startswith(prefix)
            or (row.get("step", 0) <= step and not {"status", "end"} & row.keys())
        ]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def _check(self) -> None:
        """Keep a copy of a file that is truncated or has other contents."""
        content = self.path.read_bytes()
        lines = content.decode("utf-8", errors="replace").splitlines()
        if lines and len(read_jsonl(self.path)) == len(lines):
            return
        if not content:
            log.warning("%s is empty: its curves start here, and the run continues", self.path)
            return
        backup = self.path.with_name(f"{self.path.name}.cut")
        backup.write_bytes(content)
        log.warning(
            "%s contains invalid lines, perhaps from a killed process: they are dropped; a copy "
            "of the file is kept in %s", self.path, backup,
        )  # fmt: skip

    def end(self, status: str) -> None:
        """Append a line ``{"status": …}``."""
        self._append([{"status": status}])

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        block = "".join(json.dumps(line) + "\n" for line in lines)
        with self.path.open("ab", buffering=0) as file:  # one write, so that it stays whole
            file.write(block.encode())


@checked(path=PATH)
def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log, without truncated ones."""
    return [row for row in numbered_jsonl(path).values() if row is not None]


def numbered_jsonl(path: str | Path) -> dict[int, dict[str, Any] | None]:
    """The lines of a log by their number from 1; None for those that are no entries.

    The last line is left out if a process was killed while it wrote.
    """
    rows: dict[int, dict[str, Any] | None] = {}
    text = Path(path).read_text("utf-8-sig", errors="replace")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # also of numbers with thousands of digits
            if number == len(lines) and not text.endswith("\n"):
                break
            row = None
        rows[number] = row if isinstance(row, dict) else None
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Listener(AbstractRecorder):
    """Calls a function with the numbers of each step, for Weights & Biases, MLflow and others.

    Marks of events (``when/lr``) are left out: they are points of TensorBoard's charts, in another
    order than the steps.

    Args:
        function: ``function(values, step)``, values by tag.

    Examples:
        >>> import selftune as st
        >>> listener = st.monitor.Listener(lambda values, step: print(step, values))
        >>> rows = [st.monitor.Row("hyper/lr", 0.1, 5), st.monitor.Row("Loss/val", 2.0, 5)]
        >>> listener.scalars(rows)
        5 {'hyper/lr': 0.1, 'Loss/val': 2.0}
    """

    @checked(function=FUNCTION)
    def __init__(self, function: Callable[[dict[str, float], int], Any]) -> None:
        self.function = function

    def scalars(self, rows: Sequence[Row]) -> None:
        """Call the function once per step."""
        steps: dict[int, dict[str, float]] = {}
        for tag, value, step in rows:
            if not EVENT.match(tag):
                steps.setdefault(step, {})[tag] = value
        for step, values in steps.items():
            self.function(values, step)


class Named(AbstractRecorder):
    """Passes entries on with the name of an optimizer as a prefix: ``name/hyper/lr``.

    Beginning and end are those of one optimizer, not of the target that several share.
    """

    def __init__(self, recorder: AbstractRecorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def _rows(self, method: str, rows: Sequence[Row]) -> None:
        tagged = [row._replace(tag=f"{self.name}/{row.tag}").at(row.time) for row in rows]
        getattr(self.recorder, method)(tagged)

    def _entry(self, method: str, tag: str, *rest: Any, **named: Any) -> None:
        getattr(self.recorder, method)(f"{self.name}/{tag}", *rest, **named)

    scalars = partialmethod(_rows, "scalars")
    last = partialmethod(_rows, "last")
    text = partialmethod(_entry, "text")
    figure = partialmethod(_entry, "figure")
    histogram = partialmethod(_entry, "histogram")

    def resume(self, step: int) -> None:
        """Drop later entries of this optimizer; other targets than ours drop those of all."""
        if isinstance(self.recorder, (InMemory, JSONL)):
            self.recorder.resume(step, f"{self.name}/")
        else:
            self.recorder.resume(step)


def as_recorder(target: Any, name: str | None = None) -> AbstractRecorder:
    """Make a recorder from ``log_dir=`` or ``recorder=``.

    Args:
        target: None, a folder, a recorder, a ``SummaryWriter`` or a similar object, a function of
            values and step, or a sequence of these.
        name: Name of the optimizer if several share the target: used as a subfolder of a
            folder, and as a prefix of tags otherwise.

    Raises:
        TypeError: ``target`` is something else.
    """
    if target is None:
        return NoRecorder()
    if name is not None:
        if isinstance(target, (str, Path)):
            return TensorBoard(Path(target) / name)
        if isinstance(target, Sequence):
            return Several([as_recorder(one, name) for one in target])
        return Named(as_recorder(target), name)
    if isinstance(target, AbstractRecorder):
        return target
    if isinstance(target, (str, Path)) or writes_scalars(target):
        return TensorBoard(target)
    if isinstance(target, Sequence):
        return Several([as_recorder(one) for one in target])
    if callable(target):
        return Listener(target)
    raise TypeError(
        f"log_dir or recorder={target!r}: use a folder, a recorder of selftune.monitor, "
        "a SummaryWriter or an object with its add_scalar and flush, a function(values, step), "
        "or a list of these"
    )


class Several(AbstractRecorder):
    """Passes everything to several recorders, and drops those that fail."""

    @checked(recorders=RECORDERS)
    def __init__(self, recorders: Sequence[AbstractRecorder]) -> None:
        self.recorders = list(recorders)

    def __str__(self) -> str:
        return ", ".join(map(str, self.recorders))

    def _each(self, method: str, *args: Any, **named: Any) -> None:
        for recorder in list(self.recorders):
            try:
                getattr(recorder, method)(*args, **named)
            except OSError as error:
                if len(self.recorders) == 1:
                    raise
                self.recorders.remove(recorder)
                log.warning("%s no longer logs: %s", recorder, error)

    scalars = partialmethod(_each, "scalars")
    last = partialmethod(_each, "last")
    begin = partialmethod(_each, "begin")
    begin_anew = partialmethod(_each, "begin_anew")
    text = partialmethod(_each, "text")
    figure = partialmethod(_each, "figure")
    histogram = partialmethod(_each, "histogram")
    resume = partialmethod(_each, "resume")
    end = partialmethod(_each, "end")
