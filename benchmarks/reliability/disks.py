"""Disks that are full or read-only, and two processes that write to one place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import selftune as st
from benchmarks.reliability.damage import Around, full, read_only, said
from benchmarks.reliability.kills import curves, digest, looped, net, points, tuned
from benchmarks.reliability.processes import Broken, Child
from benchmarks.reliability.uses import (
    ROWS,
    TASK,
    Case,
    Truth,
    answer,
    remembered,
    replayed,
    resumed,
    select,
    starts,
    storages,
)
from selftune import search
from selftune.monitor import JSONL, Row, TensorBoard
from selftune.tuner._checkpoints import read as read_checkpoint  # private: read without a run

Told = list[str]


def begun(place: Path, truth: Truth, told: Told) -> str:
    """Begin a run of the tuner."""
    return "" if tuned(1, place / "new") == truth["tuner"] else "another result"


def unsaved(place: Path, truth: Truth, told: Told) -> str:
    """A loop of one's own that logs and saves nothing."""
    return "" if looped("SGD", 100, place / "new") == truth["loop"] else "another result"


def searched_on(kind: str, place: Path, truth: Truth, told: Told) -> str:
    """Search on for two more trials."""
    found, whole = answer(select(place / kind, storages(place)[kind], 5)), truth["search"]
    kept = all(found["values"].get(n) == v for n, v in whole["values"].items())
    return "" if kept and len(found["values"]) == 5 else f"another result: {found}"


def remembering(place: Path, truth: Truth, told: Told) -> str:
    """A search that leaves something in a memory."""
    memory = search.Memory(place / "memory")
    found = answer(select(place / "journal", f"{place}/new.journal", 3, memory=memory))
    if len(found["values"]) < 3:
        return f"another result: {found}"
    more = len(starts(memory)) == 4 or any(said(t, ("memory",)) for t in told)
    return remembered(place, truth, told) if not more else ""


def trained(recorder: Any) -> str:
    """A run of a few steps, logged."""
    torch.manual_seed(0)
    x, y = points(100, 0)
    batches = list(zip(x.split(20), y.split(20), strict=True))
    made = st.Tuner(net(), F.cross_entropy, compile=False, probe=False)
    result = made.fit(batches[:4], batches[4:], steps=24, log_every=5, progress=False,
                      recorder=recorder)  # fmt: skip
    return digest([result.history, result.best_weights])


def noted(place: Path, truth: Truth, told: Told) -> str:
    """A run that is logged as lines."""
    if trained(JSONL(place / "lines" / "run.jsonl")) != trained(None):
        return "another result"
    return "" if any(said(t, ("run.jsonl",)) for t in told) else f"no warning: {told}"


def rescheduled(place: Path, truth: Truth, told: Told) -> str:
    """Write another schedule over one; that stays, if the other cannot be written."""
    path = place / "schedules" / "schedule.json"
    path.parent.mkdir(exist_ok=True)
    try:
        st.TunedSchedule(rule="SGD", steps=9, values={"lr": [[0, 0.5]] * 900}).save(path)
    finally:
        if path.exists():
            assert len(st.TunedSchedule.load(path).values["lr"]) in (30, 900)
    return ""


def reported(place: Path, truth: Truth, told: Told) -> str:
    """The report of a run."""
    torch.manual_seed(0)
    x, y = points(100, 0)
    batches = list(zip(x.split(20), y.split(20), strict=True))
    made = st.Tuner(net(), F.cross_entropy, compile=False, probe=False)
    result = made.fit(batches[:4], batches[4:], steps=24, progress=False, log_dir=place / "new")
    return "" if "lr" in result.report() else "no report"


def on(name: str, around: Around) -> Callable[[Path], Any]:
    """A folder of the case on such a disk; made if it is not there."""

    def disk(place: Path) -> Any:
        (place / name).mkdir(exist_ok=True)
        if name == "schedules":
            (place / name / "schedule.json").write_bytes((place / "schedule.json").read_bytes())
        return around(place / name)

    return disk


WRITERS: tuple[tuple[str, str, Any, tuple[str, ...]], ...] = (
    ("run that goes on", "tuner", resumed, ("tuner",)),
    ("run", "new", begun, ("new",)),
    ("log of a loop", "new", unsaved, ("new",)),
    ("journal", "journal", partial(searched_on, "journal"), ("study.journal",)),
    ("SQLite", "sqlite", partial(searched_on, "sqlite"), ("study.db",)),
    ("memory", "memory", remembering, ("memory",)),
    ("lines", "lines", noted, ("run.jsonl",)),
    ("schedule", "schedules", rescheduled, ("schedule.json",)),
    ("report", "new", reported, ("report.html", "schedule.json", "new")),
)
"""Whatever writes, its folder, what is done there, and names for messages."""


def stuck() -> Iterator[Case]:
    """Everything that writes, where it cannot."""
    for file, folder, use, names in WRITERS:
        for around in (full, read_only):
            yield Case(file, around.__name__, names, use, around=on(folder, around))
    some = partial(full, left=40)
    yield Case("run that goes on", "full soon", ("tuner",), resumed, around=on("tuner", some))
    yield Case("journal", "full soon", ("study.journal",), partial(searched_on, "journal"),
               around=on("journal", partial(full, left=8)))  # fmt: skip


# two writers


def both(*work: Callable[[], Any]) -> list[Any]:
    """Results of processes that run at one time."""
    children = [Child.of(one) for one in work]
    return [child.result() for child in children]


def owned(place: Path, truth: Truth, told: Told) -> str:
    """A run in the folder of one that is running; that must end as if it were alone."""
    fine = Child.of(partial(tuned, 1, place / "new"))
    while not (place / "new" / "run.owner").exists():
        pass
    try:
        tuned(1, place / "new")
    finally:
        if fine.result() != truth["tuner"]:
            raise Broken("the first run ended otherwise")
    return "the second run was accepted"


def nested(place: Path, truth: Truth, told: Told) -> str:
    """A run in the folder of one of the same process."""
    x, y = points(100, 0)
    batches = list(zip(x.split(20), y.split(20), strict=True))

    def again(progress: Any) -> None:
        made = st.Tuner(net(), F.cross_entropy, compile=False, probe=False)
        made.fit(batches[:4], batches[4:], steps=24, progress=False, log_dir=place / "new")

    made = st.Tuner(net(), F.cross_entropy, compile=False, probe=False)
    made.fit(batches[:4], batches[4:], steps=24, progress=False, log_dir=place / "new",
             callbacks=[again])  # fmt: skip
    return "the second run was accepted"


def searching(kind: str, known: int, place: Path, truth: Truth, told: Told) -> str:
    """Two processes search together, in a study that has so many trials."""
    home = place if known else place / "fresh"
    (home / kind).mkdir(parents=True, exist_ok=True)

    def one() -> int:
        return len(answer(select(home / kind, storages(home)[kind], known + 4))["values"])

    both(one, one)
    values = answer(select(home / kind, storages(home)[kind], known + 4))["values"]
    kept = not known or all(values.get(n) == v for n, v in truth["search"]["values"].items())
    return "" if kept and len(values) >= known + 4 else f"another result: {values}"


def remembering_both(place: Path, truth: Truth, told: Told) -> str:
    """Two processes leave things in a memory."""
    memory = search.Memory(place / "memory")

    def one() -> None:
        for _ in range(50):
            memory.remember(TASK, {"lr": 0.5}, value=1.0)

    both(one, one)
    return "" if len(starts(memory)) == 103 else "something is lost"


def lined(place: Path, truth: Truth, told: Told) -> str:
    """Two processes write lines to one file."""
    path = place / "both.jsonl"

    def one() -> None:
        for _ in range(100):
            JSONL(path).scalars(ROWS)

    both(one, one)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return "" if len(lines) == 200 * len(ROWS) else "lines are lost"


def drawn(place: Path, truth: Truth, told: Told) -> str:
    """Two processes write curves to one folder."""

    def one(tag: str) -> None:
        recorder = TensorBoard(place / "both")
        for step in range(100):
            recorder.scalars([Row(tag, float(step), step)])
        recorder.end("finished")

    both(partial(one, "a"), partial(one, "b"))
    found = curves(place / "both")
    return "" if [len(found[t]) for t in "ab"] == [100, 100] else "points are lost"


def replaced(place: Path, truth: Truth, told: Told) -> str:
    """One process writes a schedule again and again, another one reads it."""
    path = place / "schedule.json"

    def write() -> None:
        for _ in range(300):
            st.TunedSchedule(rule="SGD", steps=30, values=truth["schedule"]).save(path)

    def look() -> list[str]:
        return [replayed(place, truth, told) for _ in range(300)]

    return next((wrong for wrong in both(write, look)[1] if wrong), "")


def looked_at(place: Path, truth: Truth, told: Told) -> str:
    """One process trains, another one reads its checkpoint."""

    def look() -> int:
        return sum(read_checkpoint(place / "tuner" / "last.pt")["numbers"][0] > 0
                   for _ in range(40))  # fmt: skip

    seen, ended = both(look, partial(tuned, 1, place / "tuner"))
    return "" if seen == 40 and ended == truth["tuner"] else "another result"


PAIRS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("run", owned, ("new",)),
    ("run of the same process", nested, ("new",)),
    ("journal", partial(searching, "journal", 3), ("study.journal",)),
    ("journal, new", partial(searching, "journal", 0), ("study.journal",)),
    ("SQLite", partial(searching, "sqlite", 3), ("study.db",)),
    ("SQLite, new", partial(searching, "sqlite", 0), ("study.db",)),
    ("memory", remembering_both, ("memory",)),
    ("lines", lined, ("both.jsonl",)),
    ("event files", drawn, ("both",)),
    ("schedule", replaced, ("schedule.json",)),
)


def crowded() -> Iterator[Case]:
    """Places that two processes write to, or one writes and one reads."""
    for file, use, names in PAIRS:
        yield Case(file, "two writers", names, use)
