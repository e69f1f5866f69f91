"""Reading the log of a finished, running or killed run from its folder."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from selftune.monitor.axes import LOG10, WHEN
from selftune.monitor.recorders import numbered_jsonl
from selftune.monitor.report import Curve, Line, line
from selftune.monitor.tensorboard import CODE
from selftune.monitor.verdicts import KINDS, in_words

log = logging.getLogger("selftune")
T = TypeVar("T")
TEXT = "/text_summary"
"""Last part of the tag of a text."""
PARTS = ("0", "median")
"""Last part of the first tag of a hyperparameter whose groups or layers differ."""


@dataclass
class Log:
    """The log of a run so far.

    Attributes:
        curves: Steps and values by tag.
        texts: Texts by tag: at the end of the run ``verdicts`` and ``why``, as lists in Markdown.
        given: Initial hyperparameters.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    given: dict[str, float] = field(default_factory=dict)

    def by_optimizer(self) -> dict[str, Log]:
        """One log for each optimizer by its name, which is the first part of its tags.

        The rest, under ``""``, is left out if it has no hyperparameters.
        """
        matched = (re.fullmatch("(.+?)/hyper/.+", tag) for tag in self.curves)
        names = sorted({m[1] for m in matched if m})
        parts = {n: Log(_below(n, self.curves), _below(n, self.texts)) for n in names}
        return parts if parts and not self.lines() else {"": self, **parts}

    @property
    def why(self) -> str:
        """Explanations of the values, one line each; empty before the end."""
        return "\n".join(_items(self.texts.get("why", "")))

    @property
    def sentences(self) -> dict[str, str]:
        """Verdicts at the end of the run in words, by name."""
        names = [t.removeprefix("verdict/") for t in self.curves if t.startswith("verdict/")]
        return {  # names may contain spaces
            max((n for n in names if one.startswith(f"{n} ")), key=len, default=""): one
            for one in _items(self.texts.get("verdicts", ""))
        }

    def lines(self) -> list[Line]:
        """Rows of the report, one for each hyperparameter."""
        lines, sentences = [], self.sentences
        for tag, curve in sorted(self.curves.items()):
            if tag.startswith("hyper/"):
                name = tag.removeprefix("hyper/")
                whole = name.rpartition("/")[0]
                if any(f"hyper/{whole}/{part}" in self.curves for part in PARTS):
                    lines.append(line(name, curve, f"{whole} of a group or layer"))
                    continue
                kind = self._verdict(name)
                known = "no verdict yet" if kind is None else in_words(name, kind, curve[1][-1])
                lines.append(line(name, curve, sentences.get(name) or known))
        return lines

    def _verdict(self, name: str) -> str | None:
        """The kind of the last verdict; None if there is none, or one of another version."""
        codes = self.curves.get(f"verdict/{name}", ((), ()))[1]
        return KINDS[int(codes[-1])] if codes and codes[-1] in range(len(KINDS)) else None

    def reasons(self) -> str:
        """Explanations of the values: as logged at the end, or derived from the log."""
        matched = (re.fullmatch("margin/(.+)/low", tag) for tag in self.curves)
        names = [m[1] for m in matched if m and f"hyper/{m[1]}" in self.curves]
        return self.why or "\n".join(map(self._reasons, names))

    def _reasons(self, name: str) -> str:
        value, reasons = self.curves[f"hyper/{name}"][1][-1], []
        if name in self.given:
            reasons.append(f"given {self.given[name]:.3g}")
        rewinds = self.curves.get("weights/rewinds", ((), ()))[0]
        first = self.curves[f"hyper/{name}"][0][0]
        for step, height in zip(*self.curves.get(f"{WHEN}/{name}", ((), ())), strict=True):
            if step and math.isfinite(height):
                power = 10.0 ** min(height, sys.float_info.max_10_exp)
                set_to = power if f"{LOG10}/{name}" in self.curves else height
                event = "sweep" if step <= first else "extension"
                reasons.append(f"{'rewind' if step in rewinds else event} {set_to:.3g}")
        if self._verdict(name) == "at bound":
            return f"{name}: " + " → ".join([*reasons, f"{value:.3g}, its bound or floor"])
        ratio = self.curves.get(f"hypergrad/{name}/snr", ((), (math.nan,)))[1][-1]
        known = f" (signal-to-noise {ratio:.1f})" if math.isfinite(ratio) else ""
        return f"{name}: " + " → ".join([*reasons, f"{value:.3g} by hypergradients so far{known}"])

    def loss(self) -> float | None:
        """The last validation loss: over the whole set, or of the last batch."""
        for tag in ("Loss/final", "Loss/val"):
            if self.curves.get(tag):
                return self.curves[tag][1][-1]
        return None


def read(folder: str | Path) -> Log:
    """Read the log in a folder.

    Args:
        folder: A folder with TensorBoard's event files, an event file, or a JSON-lines file.

    Raises:
        FileNotFoundError: There is no log.
    """
    path = Path(folder)
    events_file = path.is_file() and "tfevents" in path.name
    if path.is_file() and not events_file:
        found = _read_lines(path)
        if found.curves:
            return found
    if not events_file and not list(path.glob("events.out.tfevents.*")):
        raise FileNotFoundError(
            f"{path}: no log of a run: pass a log_dir, or a file written by JSONL"
        )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    for file in [path] if events_file else sorted(path.glob("events.out.tfevents.*")):
        _check(file)
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    numbers: dict[str, Curve] = {
        t: ([e.step for e in es], [e.value for e in es]) for t, es in curves.items()
    }
    tensors = {t: events.Tensors(t)[-1].tensor_proto for t in events.Tags()["tensors"]}
    for tag, code in tensors.items():
        if CODE.match(tag):
            numbers[tag] = ([events.Tensors(tag)[-1].step], [float(make_ndarray(code))])
    texts = {
        t.removesuffix(TEXT): p.string_val[0].decode()
        for t, p in tensors.items()
        if t.endswith(TEXT)
    }
    return Log(numbers, texts, _given(events))


def _read_lines(path: Path) -> Log:
    """The log in a JSON-lines file."""
    found, left_out = Log(), []
    points: dict[str, tuple[list[Any], list[Any]]] = {}
    for number, row in numbered_jsonl(path).items():
        if row is None:
            left_out.append(number)
            continue
        tag, value, step = row.get("tag"), _number(row.get("value")), _number(row.get("step"))
        if isinstance(row.get("hparams"), dict):  # of several runs, the last one is read
            if points:
                log.warning("%s, line %d: another run begins; it alone is shown", path, number)
            points.clear()
            found.texts.clear()
            given = {n: _number(v) for n, v in row["hparams"].items()}
            found.given = {n: v for n, v in given.items() if v is not None}
        if isinstance(row.get("text"), str) and isinstance(tag, str):
            found.texts[tag] = row["text"]
        elif row.get("value") is None:  # not finite, or another kind of line
            continue
        elif isinstance(tag, str) and value is not None and step is not None:
            steps, values = points.setdefault(tag, ([], []))
            steps.append(step)
            values.append(value)
        else:
            left_out.append(number)
    found.curves |= points
    if left_out:
        log.warning(
            "%s, line %d: no tag with numbers as value and step; %d such lines are left out",
            path, left_out[0], len(left_out),
        )  # fmt: skip
    return found


def _number(entry: Any) -> float | None:
    """A finite number that a float can hold, or None."""
    fits = isinstance(entry, (int, float)) and abs(entry) <= sys.float_info.max
    return entry if fits else None


def _given(events: Any) -> dict[str, float]:
    """Initial hyperparameters, from the HParams data."""
    from tensorboard.plugins.hparams import metadata

    try:
        texts = events.PluginTagToContent(metadata.PLUGIN_NAME)
    except KeyError:  # a log without the beginning of a run
        return {}
    content = texts.get(metadata.SESSION_START_INFO_TAG)
    if content is None:
        return {}
    start = metadata.parse_session_start_info_plugin_data(content).hparams
    values = {n.removeprefix("start/"): v for n, v in start.items() if n.startswith("start/")}
    return {n: v.number_value for n, v in values.items()}


def runs_in(folder: str | Path) -> list[Path]:
    """Folders with event files, in a folder and below it, sorted by name."""
    return sorted({path.parent for path in Path(folder).rglob("events.out.tfevents.*")})


def _below(name: str, entries: Mapping[str, T]) -> dict[str, T]:
    """The entries with tags that begin with a name, without it."""
    prefix = f"{name}/"
    return {t.removeprefix(prefix): e for t, e in entries.items() if t.startswith(prefix)}


def _items(text: str) -> list[str]:
    """The items of a list in Markdown."""
    return [one.removeprefix("- ") for one in text.splitlines()]


def _check(file: Path) -> None:
    """Warn about a damaged event file, which TensorBoard reads in part, without a warning."""
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader, count = PyRecordReader_New(str(file)), 0
    try:
        while True:
            reader.GetNext()
            count += 1
    except OutOfRangeError:
        if count:
            return
    except DataLossError:
        pass
    log.warning(
        "%s is damaged, or truncated by a kill: records after the first %d are left out",
        file, count,
    )  # fmt: skip
