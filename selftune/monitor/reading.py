"""Reading the log of a finished, running or killed run from its folder."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selftune.monitor.axes import LOG10, WHEN
from selftune.monitor.recorders import read_jsonl
from selftune.monitor.report import Curve, Line, line
from selftune.monitor.verdicts import KINDS, in_words

log = logging.getLogger("selftune")
TEXT = "/text_summary"
"""Last part of the tag of a text."""
PARTS = ("0", "median")
"""Last part of the first tag of a hyperparameter whose groups or layers differ."""


@dataclass
class Log:
    """The log of a run so far.

    Attributes:
        curves: Steps and values by tag.
        sentences: Verdicts at the end of the run in words, by name.
        why: Explanations of the values, one line each; empty before the end.
        given: Initial hyperparameters.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)
    why: str = ""
    given: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[Line]:
        """Rows of the report, one for each hyperparameter."""
        lines = []
        for tag, curve in sorted(self.curves.items()):
            if tag.startswith("hyper/"):
                name = tag.removeprefix("hyper/")
                if any(f"{tag}/{part}" in self.curves for part in PARTS):
                    continue  # its groups or layers have rows of their own
                whole = name.rpartition("/")[0]  # groups or layers share its verdict
                codes = next(
                    (self.curves[f"verdict/{n}"][1] for n in (name, whole)
                     if f"verdict/{n}" in self.curves),
                    (),
                )  # fmt: skip
                sentence = self.sentences.get(name) or self.sentences.get(whole) or ""
                if codes and not sentence:
                    sentence = in_words(name, KINDS[int(codes[-1])], curve[1][-1])
                sentence = sentence or "no verdict yet"
                lines.append(line(name, curve, sentence))
        return lines

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
        for step, height in zip(*self.curves.get(f"{WHEN}/{name}", ((), ())), strict=True):
            if step and math.isfinite(height):
                set_to = 10**height if f"{LOG10}/{name}" in self.curves else height
                reasons.append(f"{'rewind' if step in rewinds else 'sweep'} {set_to:.3g}")
        codes = self.curves.get(f"verdict/{name}", ((), ()))[1]
        if codes and KINDS[int(codes[-1])] == "at bound":
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
        rows = read_jsonl(path)
        points: dict[str, tuple[list[float], list[float]]] = {}
        for row in (r for r in rows if r.get("value") is not None):
            steps, values = points.setdefault(row["tag"], ([], []))
            steps.append(row["step"])
            values.append(row["value"])
        if points:
            sentences = {r["tag"]: r["text"] for r in rows if "text" in r}
            begun = [r["hparams"] for r in rows if "hparams" in r]
            verdicts, why = (sentences.get(tag, "") for tag in ("verdicts", "why"))
            return Log(dict(points), _by_name(verdicts), _lines(why), begun[-1] if begun else {})
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
        if tag.startswith("verdict/"):
            numbers[tag] = ([events.Tensors(tag)[-1].step], [float(make_ndarray(code))])
    texts = {t: p.string_val[0].decode() for t, p in tensors.items() if t.endswith(TEXT)}
    verdicts, why = (texts.get(f"{tag}{TEXT}", "") for tag in ("verdicts", "why"))
    return Log(numbers, _by_name(verdicts), _lines(why), _given(events))


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


def _lines(text: str) -> str:
    """A list in Markdown as lines."""
    return "\n".join(one.removeprefix("- ") for one in text.splitlines())


def _by_name(text: str) -> dict[str, str]:
    """The sentences of a list of verdicts, by their first word."""
    return {one.split(" ", 1)[0]: one for one in _lines(text).splitlines()}


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
