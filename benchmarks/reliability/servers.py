"""A search on PostgreSQL, whose workers are killed or whose connections are cut.

Needs Debian's package postgresql, and the extra postgres. Truth, as of searches on files: a line
of every trial whose objective ended.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.reliability.processes import Broken, Child, apart, scratch, warm_up
from benchmarks.reliability.searches import WORKERS, Search, complete, kill, lost, run

TOOLS = [Path(p) for p in sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
ABSENT = "" if TOOLS and find_spec("psycopg") else "needs Debian's postgresql and psycopg"
"""Why there can be no server here; empty where there can."""


def _as_owner(folder: Path, *command: str) -> None:
    """Run as a user that a server may be run by."""
    if os.getuid() == 0:
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        command = ("runuser", "-u", "postgres", "--", *command)
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def server() -> Iterator[str]:
    """A server of its own on a free port: its address, without a database."""
    folder = Path("/tmp") / f"selftune-postgres-{os.getpid()}"  # readable by its owner
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    tools, data = TOOLS[-1], str(folder / "data")
    try:
        _as_owner(folder, str(tools / "initdb"), "-D", data, "-A", "trust", "-U", "tuner")
        control = [str(tools / "pg_ctl"), "-D", data, "-w"]
        options = f"-p {port} -k {folder} -c fsync=off"
        _as_owner(folder, *control, "-o", options, "-l", str(folder / "log"), "start")
        yield f"postgresql://tuner@localhost:{port}"
        _as_owner(folder, *control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


def _ask(address: str, question: str) -> None:
    import psycopg  # an extra

    with psycopg.connect(f"{address}/postgres", autocommit=True) as connection:
        connection.execute(question)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cut:
    """A search all of whose connections were cut.

    Attributes:
        after: Seconds until then.
        lost: What was lost beyond the trials that were running, in words.
    """

    after: float
    lost: tuple[str, ...]


def cut(address: str, name: str, after: float, place: Path) -> Cut:
    """Cut all connections to a database once, while workers search."""
    place.mkdir()
    database = f"{address}/{name}"
    child = Child.of(partial(run, database, WORKERS, False, place))
    time.sleep(after)
    _ask(address, "select pg_terminate_backend(pid) from pg_stat_activity "
         f"where datname = '{name}'")  # fmt: skip
    known = apart(partial(complete, database, place))
    try:
        child.result()
    except Broken as error:
        return Cut(after, (str(error),))
    found = partial(lost, database, place, known, set(), failing=WORKERS)
    return Cut(after, tuple(apart(found)))


def servers(count: int) -> tuple[list[Search], list[Cut]]:
    """So many killed workers, and so many times all connections cut."""
    kills, cuts = [], []
    with server() as address, scratch() as place:
        _ask(address, "create database warm")
        warm_up(partial(run, f"{address}/warm", 1, False, place / "warm"))
        _ask(address, "create database timed")
        begun = time.monotonic()
        apart(partial(run, f"{address}/timed", WORKERS, False, place / "timed"))
        seconds = time.monotonic() - begun
        for seed in range(count):
            for what in ("kill", "cut"):
                _ask(address, f"create database {what}{seed}")
            database = f"{address}/kill{seed}"
            kills.append(kill(database, "worker", False, seconds, seed, place / f"kill{seed}"))
            after = random.Random(f"cut {seed}").uniform(0, seconds)
            cuts.append(cut(address, f"cut{seed}", after, place / f"cut{seed}"))
    return kills, cuts
