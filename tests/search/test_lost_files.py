"""Searches on disks that are full, read-only or were cut. Truth: the same search undisturbed."""

import errno
import json
import pickle
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import CmaEsSampler, PartialFixedSampler
from optuna.storages import RDBStorage
from sqlalchemy.exc import IntegrityError
from torch import nn

from selftune import search
from selftune.search import _workers  # private: how long is waited


def objective(space: search.Space) -> float:
    return space.suggest_float("x", -1, 1) ** 2


def build(space: search.Space) -> nn.Module:
    width = space.suggest_categorical("width", (2, 4))
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))


def batches() -> list[Any]:
    x = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    return [(a, a.sum(1, keepdim=True)) for a in x.split(16)]


def trained(**options: Any) -> search.Selection:
    data = batches()
    return search.select(
        build, data[:2], data[2:], trials=2, steps=8, loss_fn=nn.functional.mse_loss,
        sampler="random", progress=False, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("missing", [1, 10])
def test_a_cut_journal_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, missing: int
) -> None:
    """As after a kill or on a full disk: what was whole is kept, and so is the file as it was."""
    path = tmp_path / "study.journal"
    script = f"""
from selftune import search
search.select(lambda space: space.suggest_float("x", -1, 1), trials=3, storage={str(path)!r},
              progress=False)
"""
    subprocess.run([sys.executable, "-c", script], check=True)  # a worker that is gone
    cut = path.read_bytes()[:-missing]
    path.write_bytes(cut)
    for trials in (4, 5):  # the line after the cut must be readable, too
        found = search.select(objective, trials=trials, storage=path, progress=False)
        assert sum(t.value is not None for t in found.study.trials) == trials
    for line in path.read_text().splitlines():
        json.loads(line)
    assert (tmp_path / "study.journal.cut").read_bytes() == cut
    assert "ended within a line" in caplog.text


def test_a_full_disk_costs_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    found = trained(storage=tmp_path / "study.journal")
    assert [t.value for t in found.study.trials] == [t.value for t in whole.study.trials]
    assert found.model is not None
    assert whole.model is not None
    for mine, theirs in zip(found.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert "No space left" in caplog.text


def test_a_memory_that_cannot_be_written_loses_no_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    found = trained(memory=search.Memory(tmp_path / "file" / "folder"))
    assert found.model is not None
    assert "could not be stored" in caplog.text


TASK = search.Task(
    kind="table", task="regression", examples=500, inputs=8, outputs=1, steps=1000, batch=32
)
WRONG = {
    "a number for a task": {"task": 3},
    "a text for a size": {"examples": "many"},
    "no examples": {"examples": 0},
    "a list of hyperparameters": {"hparams": [1, 2]},
    "a hyperparameter that is a text": {"hparams": {"lr": "high"}},
    "a hyperparameter that is no number": {"hparams": {"lr": float("nan")}},
    "choices that are a list": {"params": [1]},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_memory_of_wrong_types_is_left_out(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    memory = search.Memory(tmp_path)
    memory.remember(TASK, {"lr": 0.1}, value=1.0)
    (file,) = tmp_path.glob("*.json")
    entry = json.loads(file.read_text())
    for name, value in WRONG[what].items():
        (entry if name in entry else entry["task"])[name] = value
    (tmp_path / "wrong.json").write_text(json.dumps(entry))
    assert len(memory.runs()) == 1
    assert memory.start(TASK, {"lr": 0.1})["lr"] == pytest.approx(0.1)
    assert memory.best(TASK) == []
    assert "wrong.json is left out" in caplog.text


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_sampler_that_unpickles_a_shared_storage_is_refused(tmp_path: Path) -> None:
    path, mark = tmp_path / "study.journal", tmp_path / "mark"
    assert pickle.dumps(Trap(mark))
    with pytest.warns(ExperimentalWarning):
        inside = PartialFixedSampler({"x": 0.5}, CmaEsSampler())
    for sampler in ("cmaes", CmaEsSampler(), inside):
        with pytest.raises(ValueError, match=r"unpickles its state.*trust_storage=True"):
            search.select(objective, trials=2, storage=path, sampler=sampler, progress=False)
    assert not path.exists()
    with pytest.raises(ValueError, match="unpickles its state"):  # others may write to log_dir
        search.select(
            objective, trials=2, workers=2, log_dir=tmp_path, sampler="cmaes", progress=False
        )
    found = search.select(
        objective, trials=2, storage=path, sampler="cmaes", trust_storage=True, progress=False
    )
    assert len(found.study.trials) == 2


@pytest.mark.slow
def test_workers_leave_no_payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers are given holds training data: it has no name in the file system at all."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    seen: set[str] = set()
    real = time.sleep

    def look(seconds: float) -> None:
        seen.update(p.name for p in tmp_path.rglob("*") if p.is_file())
        real(seconds)

    monkeypatch.setattr(time, "sleep", look)
    path = tmp_path / "study.journal"
    simple = lambda space: space.suggest_float("x", -1, 1)  # noqa: E731 - pickled by value
    found = search.select(simple, trials=2, storage=path, workers=2, progress=False)
    assert len(found.study.trials) >= 2
    assert seen
    assert all(name.startswith("study.journal") for name in seen)


def damaged(path: Path, how: str) -> None:
    held = path.read_bytes()
    if how == "cut":
        path.write_bytes(held[: len(held) // 2])
    elif how == "flipped":  # a weight: torch reads it without its checksum
        at = held.index(b"data/0") + 200
        path.write_bytes(held[:at] + bytes([held[at] ^ 64]) + held[at + 1 :])
    else:
        torch.save({"model": {}}, path)


@pytest.mark.parametrize(
    ("how", "warm"), [("cut", False), ("flipped", False), ("another's", False), ("cut", True)]
)
def test_damaged_weights_of_a_search_are_trained_again(
    tmp_path: Path, how: str, warm: bool, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained(storage=tmp_path / "study.journal", warm_start=warm)
    (path,) = (tmp_path / "study.journal.runs" / "weights").glob("*.pt")
    damaged(path, how)
    again = trained(storage=tmp_path / "study.journal", warm_start=warm)
    assert again.model is not None
    assert whole.model is not None
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert "trained again" in caplog.text


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_text("these are my notes")
    with pytest.raises(ValueError, match=r"study\.db cannot be opened.*pass another URL"):
        search.select(objective, trials=1, storage=f"sqlite:///{path}", progress=False)
    assert path.read_text() == "these are my notes"


@pytest.mark.parametrize("kind", ["journal", pytest.param("SQLite", marks=pytest.mark.slow)])
def test_a_storage_on_a_full_disk_is_told_by_name(tmp_path: Path, kind: str) -> None:
    """A limit on the size of files makes the system refuse a write in the middle."""
    path = tmp_path / "study"
    storage = path if kind == "journal" else f"sqlite:///{path}"
    search.select(objective, trials=2, storage=storage, progress=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        with pytest.raises(OSError, match=r"study cannot be written to .*free space") as told:
            search.select(objective, trials=40, storage=storage, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(told.value)
    found = search.select(objective, trials=40, storage=storage, progress=False)
    assert len([t for t in found.study.trials if t.value is not None]) == 40


@pytest.mark.slow
def test_two_processes_make_one_database(tmp_path: Path) -> None:
    script = f"""
from selftune import search
search.select(lambda space: space.suggest_float("x", -1, 1), trials=4, progress=False,
              storage="sqlite:///{tmp_path}/study.db")
"""
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]


def test_a_version_that_another_process_writes_first_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race of the test above, at the statement where it once ended a search."""
    make, errors = RDBStorage.__init__, [sqlite3.IntegrityError("UNIQUE constraint failed")]

    def racing(self: RDBStorage, *args: Any, **options: Any) -> None:
        if errors:
            statement = "INSERT INTO alembic_version (version_num) VALUES (?)"
            raise IntegrityError(statement, (), errors.pop())
        make(self, *args, **options)

    monkeypatch.setattr(RDBStorage, "__init__", racing)
    address = f"sqlite:///{tmp_path}/study.db"
    found = search.select(objective, trials=1, storage=address, progress=False)
    assert len(found.study.trials) == 1
    assert not errors


def test_a_trial_that_no_worker_signed_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between asking for a trial and beginning it."""
    path = tmp_path / "study.journal"
    first = search.select(objective, trials=2, storage=path, progress=False)
    first.study.ask()
    monkeypatch.setattr(_workers, "SIGN", 0.5)
    found = search.select(objective, trials=3, storage=path, progress=False)
    assert [t.state.name for t in found.study.trials] == [
        "COMPLETE",
        "COMPLETE",
        "FAIL",
        "COMPLETE",
    ]
