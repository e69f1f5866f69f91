"""A lock that lets only one process write to a run's folder."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from selftune._processes import alive

log = logging.getLogger("selftune")

LOCK, OWNER = "run.lock", "run.owner"
WAIT = 10.0
"""Seconds for which a lock may outlive its process, because loader workers hold it."""


@contextmanager
def owned(folder: Path | None) -> Iterator[None]:
    """Lock a run's folder for this process; the system releases the lock when the process ends."""
    if folder is None:
        yield
        return
    owner = folder / OWNER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        _acquire(lock, folder)
    except OSError as error:  # a file system without locks, or a read-only one
        log.warning("log_dir=%s cannot be locked; make sure that no other process writes to it: %s",
                    folder, error)  # fmt: skip
        yield
        return
    try:
        with suppress(OSError):  # a full disk; the lock is held anyway
            about = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
            owner.write_text(json.dumps(about))
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    """Take the lock, or name its owner in an error."""
    until = time.monotonic() + WAIT
    while True:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            host, process, age = _owner(folder)
            gone = host == socket.gethostname() and process is not None and not alive(process)
            if gone and time.monotonic() < until:
                time.sleep(0.2)
                continue
            raise ValueError(
                f"log_dir={folder} is being written to by process {process} on {host}, started "
                f"{age:.0f} s ago: wait until it ends, or pass another folder"
            ) from None
        host, process, age = _owner(folder)
        if process is not None:
            log.info(
                "log_dir=%s: process %d on %s, started %.0f s ago, did not end its run there",
                folder, process, host, age,
            )  # fmt: skip
        return


def _owner(folder: Path) -> tuple[str, int | None, float]:
    """Host, process and age of the last owner."""
    try:
        owner = json.loads((folder / OWNER).read_text())
        return str(owner["host"]), int(owner["process"]), time.time() - float(owner["since"])
    except (OSError, ValueError, TypeError, KeyError):  # no owner, or a partly written file
        return "an unknown host", None, 0.0
