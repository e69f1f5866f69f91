"""Files of runs, what a user does with them, and whether that went well.

It did if the result is that of undisturbed files, or less of it with a warning that names the file,
or if it is refused by an error of the library's that names the file and says what to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import selftune as st
from benchmarks.reliability.damage import Ears, obscure, said
from benchmarks.reliability.kills import curves, looped, tuned
from benchmarks.reliability.processes import Broken, apart, scratch
from selftune import search
from selftune.monitor import JSONL, Row, TensorBoard, read_jsonl
from selftune.monitor.reading import read

Truth = dict[str, Any]
Use = Callable[[Path, Truth, list[str]], str]
TASK = search.Task(
    kind="table", task="regression", examples=500, inputs=8, outputs=1, steps=1000, batch=32
)
ROWS = [Row("hyper/lr", 0.1 / (s + 1), s) for s in range(30)]


def build(space: search.Space) -> nn.Module:
    """A net of one of two widths."""
    width = space.suggest_categorical("width", (2, 4))
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))


def select(place: Path, storage: str | Path, trials: int = 3, **options: Any) -> search.Selection:
    """A small search."""
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    batches = [(a, a.sum(1, keepdim=True)) for a in x.split(16)]
    return search.select(
        build, batches[:2], batches[2:], trials=trials, steps=8, loss_fn=F.mse_loss, pruner=None,
        sampler="random", storage=storage, progress=False, log_dir=place / "runs",
        tuner=dict(compile=False, probe=False), **options,
    )  # fmt: skip


def answer(found: search.Selection) -> dict[str, Any]:
    """What a search found."""
    assert found.model is not None
    x = torch.ones(1, 3)
    values = {str(t.number): t.value for t in found.study.trials if t.value is not None}
    return {"values": values, "best": float(found.value), "output": float(found.model(x))}


def make(place: Path) -> Truth:
    """All files, undisturbed, and what comes of them."""
    tuned(1, place / "tuner", stop=33)
    looped("SGD", 1, place / "loop", stop=33)
    for kind, storage in storages(place).items():
        (place / kind).mkdir()
        found = select(place / kind, storage)
    memory = search.Memory(place / "memory")
    for number in range(3):
        memory.remember(TASK, {"lr": 0.01 * (number + 1)}, value=1.0)
    schedule = st.TunedSchedule(rule="SGD", steps=30, values={"lr": [[s, v] for _, v, s in ROWS]})
    schedule.save(place / "schedule.json")
    for recorder in (JSONL(place / "run.jsonl"), TensorBoard(place / "board")):
        recorder.scalars(ROWS)
        recorder.end("finished")
    return {
        "tuner": tuned(1, place / "whole tuner"), "loop": looped("SGD", 1, place / "whole loop"),
        "search": answer(found), "schedule": schedule.values, "starts": starts(memory),
        "board": curves(place / "board")["hyper/lr"],
    }  # fmt: skip


def storages(place: Path) -> dict[str, str]:
    """By kind."""
    return {
        "journal": f"{place}/journal/study.journal",
        "sqlite": f"sqlite:///{place}/sqlite/study.db",
    }


def starts(memory: search.Memory) -> list[float]:
    """What is remembered."""
    return sorted(e["hparams"]["lr"] for e in memory.runs())


# what a user does with the files of a folder: "" if all is well, or what is not


def resumed(place: Path, truth: Truth, told: list[str]) -> str:
    """Go on with a run of the tuner."""
    return "" if tuned(1, place / "tuner") == truth["tuner"] else "another result"


def loaded(place: Path, truth: Truth, told: list[str]) -> str:
    """Go on with a loop, which reads its own file."""
    return "" if looped("SGD", 1, place / "loop") == truth["loop"] else "another result"


def searched(kind: str, place: Path, truth: Truth, told: list[str]) -> str:
    """Go on with a search whose trials are all there."""
    found, whole = answer(select(place / kind, storages(place)[kind])), truth["search"]
    if found == whole:
        return ""
    names = ("study.journal", "study.db", ".pt", ".json")
    warned = any(said(t, names) for t in told)
    backup = any((place / kind).glob("*.cut"))  # of what was recorded before the cut
    kept = backup or found["values"] == whole["values"]
    return "" if warned and kept and len(found["values"]) == 3 else f"another result: {found}"


def remembered(place: Path, truth: Truth, told: list[str]) -> str:
    """Start from a memory."""
    found = starts(search.Memory(place / "memory"))
    if found == truth["starts"]:
        return ""
    warned = any(said(t, (".json",)) for t in told)
    return "" if warned and set(found) < set(truth["starts"]) else f"another result: {found}"


def replayed(place: Path, truth: Truth, told: list[str]) -> str:
    """Load a schedule."""
    found = st.TunedSchedule.load(place / "schedule.json").values
    same = json.dumps(found) == json.dumps(truth["schedule"])
    return "" if same else "another result"


def shown(name: str, place: Path, truth: Truth, told: list[str]) -> str:
    """Read curves."""
    found = read(place / name).curves.get("hyper/lr", ((), ()))
    pairs = list(zip(*found, strict=True))
    whole = truth["board"] if name == "board" else [(r.step, r.value) for r in ROWS]
    if pairs == whole:
        return ""
    warned = any(said(t, ("tfevents", "run.jsonl", "board")) for t in told)
    return "" if warned and set(pairs) < set(whole) else f"another result: {len(pairs)} points"


def rewritten(place: Path, truth: Truth, told: list[str]) -> str:
    """Go on with a file of lines; what is not of a log must not be lost."""
    path = place / "run.jsonl"
    held = path.read_bytes()
    recorder = JSONL(path)
    recorder.resume(19)
    recorder.scalars(ROWS[20:])
    recorder.end("finished")
    found = {(r["step"], r["value"]) for r in read_jsonl(path) if "value" in r}
    lost = {(r.step, r.value) for r in ROWS} - found
    backup = any(p.read_bytes() == held for p in place.glob("run.jsonl*") if p != path)
    warned = any(said(t, ("run.jsonl",)) for t in told)
    return "" if not lost or ((backup or not held) and warned) else f"{len(lost)} points lost"


TARGETS: dict[str, tuple[str, Use, tuple[str, ...]]] = {
    "checkpoint": ("tuner/last.pt", resumed, ("last.pt",)),
    "best weights": ("tuner/best.pt", resumed, ("best.pt",)),
    "optimizer state": ("loop/saved.pt", loaded, ("state_dict",)),
    "journal": ("journal/study.journal", partial(searched, "journal"), ("study.journal",)),
    "SQLite": ("sqlite/study.db", partial(searched, "sqlite"), ("study.db",)),
    "weights of a search": ("journal/runs/weights/*.pt", partial(searched, "journal"), (".pt",)),
    "memory": ("memory/*.json", remembered, (".json",)),
    "schedule": ("schedule.json", replayed, ("schedule.json",)),
    "event file": ("board/events*", partial(shown, "board"), ("board", "tfevents")),
    "lines": ("run.jsonl", rewritten, ("run.jsonl",)),
}
"""File, what is done with it, and names of which an error must have one."""


@dataclass(frozen=True)
class Case:
    """Files in trouble.

    Attributes:
        file: Which.
        trouble: Of what kind.
        names: Of the file, for messages.
        use: What is done.
        damage: Done to the files before.
        around: The disk that they are on.
        foreign: Files of other libraries that may raise where the user calls them.
    """

    file: str
    trouble: str
    names: tuple[str, ...]
    use: Use
    damage: Callable[[Path], None] = lambda place: None
    around: Callable[[Path], AbstractContextManager[None]] = field(
        default=lambda place: nullcontext()
    )
    foreign: tuple[str, ...] = ()

    def verdict(self, origin: Path, truth: Truth) -> str:
        """``""`` if all is well, or what happened."""
        with scratch() as place:
            shutil.copytree(origin, place / "files")
            try:
                return str(apart(partial(self._verdict, place / "files", truth)))
            except Broken as error:
                return f"raw {error}"

    def _verdict(self, place: Path, truth: Truth) -> str:
        self.damage(place)
        with self.around(place), Ears.listening() as ears:
            try:
                return self.use(place, truth, ears.told)
            except Exception as error:
                return obscure(error, self.names, self.foreign)
