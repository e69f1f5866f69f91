"""Storages for several machines. Truth: Optuna's own record of the trials."""

import os
import re
import socket
import sqlite3
import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import DBAPIError

from selftune import search
from selftune.search._storage import BEAT, GRACE, storage_of


def objective(space: search.Space) -> float:
    return space.suggest_float("x", -1, 1) ** 2


def test_a_database(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path / 'study.db'}"
    for trials in (2, 4):
        search.select(objective, trials=trials, storage=address, progress=False)
    study = optuna.load_study(study_name="selftune", storage=address)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 4
    assert storage_of(address).get_heartbeat_interval() == BEAT < GRACE


def test_a_sign_of_life_outlives_a_lost_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, other workers would take a long trial for dead and fail it."""
    beats, beat = [], optuna.storages.RDBStorage.record_heartbeat

    def cut(storage: optuna.storages.RDBStorage, trial: int) -> None:
        beats.append(trial)
        if len(beats) == 1:
            gone = DBAPIError("insert", {}, Exception("gone"), connection_invalidated=True)
            raise StorageInternalError("commit") from gone
        beat(storage, trial)

    monkeypatch.setattr(optuna.storages.RDBStorage, "record_heartbeat", cut)
    address = f"sqlite:///{tmp_path / 'study.db'}"
    search.select(objective, trials=1, storage=address, progress=False)
    assert beats == [1, 1]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_proxy(tmp_path: Path) -> None:
    """A server over a database, and a search that knows its address only."""
    pytest.importorskip("grpc", reason="grpc:// needs grpcio")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    behind = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    threading.Thread(
        target=optuna.storages.run_grpc_proxy_server,
        args=(behind,), kwargs=dict(host="localhost", port=port), daemon=True,
    ).start()  # fmt: skip
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.2)
    search.select(objective, trials=3, storage=f"grpc://localhost:{port}", progress=False)
    study = optuna.load_study(study_name="selftune", storage=behind)
    assert len(study.trials) == 3


def test_a_locked_database_is_named_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    search.select(objective, trials=1, storage=f"sqlite:///{file}", progress=False)
    before = file.read_bytes()
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    address = f"sqlite:///{file}?timeout=0.1"
    with pytest.raises(ValueError, match=r"storage=sqlite.*locked.*wait for that"):
        search.select(objective, trials=2, storage=address, progress=False)
    holder.close()
    assert file.read_bytes() == before
    found = search.select(objective, trials=2, storage=address, progress=False)
    assert len(found.study.trials) == 2


@pytest.mark.slow
@pytest.mark.parametrize("age", [0, 60])
def test_the_lock_of_a_killed_worker_is_told_and_taken_over(
    age: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Slow: Optuna waits for 30 s before it takes a lock to be stale."""
    path = tmp_path / "study.journal"
    search.select(objective, trials=1, storage=path, progress=False)
    lock = tmp_path / "study.journal.lock"
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    found = search.select(objective, trials=2, storage=path, progress=False)
    assert len(found.study.trials) == 2
    assert "has been locked for some time" in caplog.text


@pytest.mark.parametrize(
    ("address", "message"),
    [("grpc://localhost:abc", "storage=grpc://localhost:abc: 'abc' is no port"),
     ("foo://x/y", "storage=foo://x/y is no address of a database"),
     ("://", "storage=:// is no address of a database")],
)  # fmt: skip
def test_addresses_of_nothing_are_named(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        search.select(objective, trials=1, storage=address, progress=False)
