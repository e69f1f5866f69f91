"""A search over a PostgreSQL server. Truths: what was asked for, what was killed."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import optuna
import pytest

from benchmarks.reliability import servers
from selftune import search
from selftune.search._storage import persist, storage_of

psycopg = pytest.importorskip("psycopg", reason="needs the extra postgres")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(servers.ABSENT), reason=servers.ABSENT or "a server is here"),
]
SCRIPT = """
import sys, time
from selftune import search

def objective(space):
    x = space.suggest_float("x", -1, 1)
    time.sleep(0.2)
    return x * x

if __name__ == "__main__":
    search.select(objective, trials=40, sampler="random", storage=sys.argv[1], progress=False)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with servers.server() as address:
        yield f"{address}/postgres"


def trials(address: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="selftune", storage=address).trials


def test_workers_start_together_on_empty_databases(server: str) -> None:
    """Law: each of four opens the storage, whichever creates its types and tables."""
    for number in range(5):
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"create database empty{number}")
        address = f"{server.rsplit('/', 1)[0]}/empty{number}"
        with ThreadPoolExecutor(4) as workers:
            opened = workers.map(lambda _, a=address: persist(partial(storage_of, a)), range(4))
            assert all(storage.get_all_studies() == [] for storage in opened)


def test_nothing_is_lost_but_the_trial_of_a_killed_worker(server: str, tmp_path: Path) -> None:
    """Twenty times all connections are cut, and six times a worker is killed."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "selftune.search", "worker", "--storage", server, str(script)]
    command.append(server)
    workers = [subprocess.Popen(command) for _ in range(2)]
    kills = cuts = 0
    admin = psycopg.connect(server, autocommit=True)
    until = time.monotonic() + 240
    while any(w.poll() is None for w in workers) and time.monotonic() < until:
        time.sleep(0.4)
        with admin.cursor() as cursor:
            cursor.execute("select to_regclass('trials')")
            if cursor.fetchone() == (None,):
                continue
            cursor.execute("select count(*) from trials where state = 'COMPLETE'")
            done = cursor.fetchone()[0]
            if done and cuts < 20:
                cursor.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where pid <> pg_backend_pid() and backend_type = 'client backend'"
                )
                cuts += 1
        if done > 5 * (kills + 1) and kills < 6:
            workers[0].send_signal(signal.SIGKILL)
            workers[0].wait()
            workers = [workers[1], subprocess.Popen(command)]
            kills += 1
    admin.close()
    assert cuts == 20
    assert kills == 6
    assert [w.wait(60) for w in workers] == [0, 0]
    ended = trials(server)
    ends = [t.state.name for t in ended]
    assert ends.count("COMPLETE") >= 40
    assert set(ends) <= {"COMPLETE", "FAIL", "WAITING"}  # nobody waits for a trial that is lost
    # A lost trial is tried again only if another has not taken its place by then.
    again = [t.user_attrs["instead of"] for t in ended if t.state.name == "WAITING"]
    assert all(ends[number] == "FAIL" for number in again)
    assert ends.count("FAIL") <= kills + 2 * cuts  # each its trial only, of two workers at most
    best = search.select(
        lambda space: 0.0, trials=40, sampler="random", storage=server, progress=False
    )
    assert best.value == min(t.value for t in trials(server) if t.value is not None)
