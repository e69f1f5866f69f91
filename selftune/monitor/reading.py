"""A run's log read back from its folder, finished, running or killed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selftune.monitor.recorders import read_jsonl
from selftune.monitor.report import Curve, Line, line
from selftune.monitor.verdicts import KINDS, in_words

log = logging.getLogger("selftune")
PARTS = ("0", "median")
"""Last part of the first tag of a hyperparameter whose groups or layers differ."""


@dataclass
class Log:
    """What a run has told so far.

    Attributes:
        curves: Steps and values by tag.
        sentences: Of the verdicts at the end of the run, by the hyperparameter's name.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[Line]:
        """Rows of the report, a hyperparameter each."""
        found = []
        for tag, curve in sorted(self.curves.items()):
            if tag.startswith("hyper/"):
                name = tag.removeprefix("hyper/")
                if any(f"{tag}/{part}" in self.curves for part in PARTS):
                    continue  # its groups or layers have rows of their own
                end = self.curves.get(f"end/{name}")
                if end:
                    curve = ([*curve[0], end[0][-1]], [*curve[1], end[1][-1]])
                whole = name.rpartition("/")[0]  # of many values, whose verdict is a common one
                codes = next(
                    (self.curves[f"verdict/{n}"][1] for n in (name, whole)
                     if f"verdict/{n}" in self.curves),
                    (),
                )  # fmt: skip
                unjudged = "ended" if end else "running"
                told = self.sentences.get(name) or self.sentences.get(whole) or unjudged
                if codes and told == unjudged:
                    told = in_words(name, KINDS[int(codes[-1])], curve[1][-1])
                found.append(line(name, curve, told))
        return found

    def loss(self) -> float | None:
        """The last known validation loss: over the whole set, or of the last batch."""
        for tag in ("final/loss", "score/loss", "val/loss"):
            if self.curves.get(tag):
                return self.curves[tag][1][-1]
        return None


def read(folder: str | Path) -> Log:
    """The log in a folder.

    Args:
        folder: With TensorBoard's event files; or such a file, or one of JSON lines, itself.

    Raises:
        FileNotFoundError: Nothing was logged there.
    """
    path = Path(folder)
    events_file = path.is_file() and "tfevents" in path.name
    if path.is_file() and not events_file:
        rows = [r for r in read_jsonl(path) if r.get("value") is not None]
        found: dict[str, tuple[list[float], list[float]]] = {}
        for row in rows:
            steps, values = found.setdefault(row["tag"], ([], []))
            steps.append(row["step"])
            values.append(row["value"])
        texts = [r["text"] for r in read_jsonl(path) if r.get("tag") == "verdicts"]
        if found:
            return Log(dict(found), _by_name(texts))
    if not events_file and not list(path.glob("events.out.tfevents.*")):
        raise FileNotFoundError(
            f"{path}: no log of a run there: pass a log_dir, or a file that JSONL wrote"
        )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in [path] if events_file else sorted(path.glob("events.out.tfevents.*")):
        _check(file)
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    numbers: dict[str, Curve] = {
        t: ([e.step for e in es], [e.value for e in es]) for t, es in curves.items()
    }
    told = [t for t in events.Tags()["tensors"] if t.startswith("verdicts/")]
    texts = [e.tensor_proto.string_val[0].decode() for t in told for e in events.Tensors(t)]
    return Log(numbers, _by_name(texts))


def runs_in(folder: str | Path) -> list[Path]:
    """The folders with event files in a folder and below it, in order of their names."""
    return sorted({path.parent for path in Path(folder).rglob("events.out.tfevents.*")})


def _by_name(texts: Sequence[str]) -> dict[str, str]:
    """The sentences of the last list of verdicts, by their first word."""
    lines = [t.removeprefix("- ") for t in texts[-1].splitlines()] if texts else []
    return {one.split(" ", 1)[0]: one for one in lines}


def _check(file: Path) -> None:
    """Warn of an event file that TensorBoard reads a part of only, without a word."""
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
        "%s is damaged, or cut as after a kill: what follows its first %d records is left out",
        file, count,
    )  # fmt: skip
