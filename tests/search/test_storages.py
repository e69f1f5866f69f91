"""Storages for several machines. Truth: Optuna's own record of the trials."""

import socket
import threading
import time
from pathlib import Path

import optuna
import pytest

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
