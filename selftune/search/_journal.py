"""The journal of a study: a file of lines of JSON, checked and repaired before it is used."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

from optuna.storages.journal import JournalFileOpenLock

log = logging.getLogger("selftune")

PATIENCE = 5
"""Seconds for which a journal may be locked before a warning."""
FIRST = b'{"op_code":'  # of a journal


def opened(path: Path) -> JournalFileOpenLock:
    """The lock of a journal that can be read; an incomplete last line is repaired."""
    lock = JournalFileOpenLock(str(path))
    complete = _check_journal(path)  # first, as a file next to another one may be no lock
    _await(path, lock)
    if not complete:
        _repair(path, lock)
    return lock


def _await(path: Path, lock: JournalFileOpenLock) -> None:
    """Wait until a journal is not locked, with a warning if that takes long."""
    try:
        age = time.time() - Path(f"{path}.lock").stat().st_mtime
    except FileNotFoundError:
        return
    warning = threading.Timer(max(0.0, PATIENCE - age), _warn, [path])
    warning.start()
    try:
        lock.acquire()
        lock.release()
    finally:
        warning.cancel()


def _warn(path: Path) -> None:
    log.warning(
        "storage=%s has been locked for some time, perhaps by a worker that was killed: the lock "
        "is taken over if it is not released within 30 s", path,
    )  # fmt: skip


def _check_journal(path: Path) -> bool:
    """Raise an error if a file is not a journal; return whether its last line is complete."""
    if path.is_dir():
        raise ValueError(f"storage={path} is a folder: pass the path of a file in it")
    if not path.exists():
        return True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            known = number > 1 or line[: len(FIRST)] == FIRST[: len(line)]
            if not line.endswith(b"\n") and known:
                return False  # another worker is writing it, or was killed while it did
            try:
                entry = json.loads(line)
                assert "op_code" in entry
            except (ValueError, TypeError, AssertionError):
                raise ValueError(
                    f"storage={path} is not a journal of Optuna (line {number}): pass another "
                    "path; the file is untouched"
                ) from None
    return True


def _repair(path: Path, lock: JournalFileOpenLock) -> None:
    """Terminate or remove a last line left incomplete by a kill or a full disk.

    Otherwise the next worker would append to this line, and the journal could not be read.
    """
    lock.acquire()  # nobody writes now, so an unfinished line stays unfinished
    try:
        if _check_journal(path):
            return
        content = path.read_bytes()
        start = content.rfind(b"\n") + 1
        try:
            json.loads(content[start:])
            whole = content + b"\n"
        except ValueError:
            whole = content[:start]
        backup = path.with_name(f"{path.name}.cut")
        backup.write_bytes(content)
        with path.open("r+b") as file:  # in place: other workers may have it open
            file.write(whole)
            file.truncate()
        log.warning(
            "storage=%s ended within a line, as after a kill or on a full disk: %s; a copy of the "
            "original file is kept in %s", path,
            "the line was complete and is now terminated" if len(whole) > len(content)
            else f"its last {len(content) - len(whole)} bytes were removed", backup,
        )  # fmt: skip
    finally:
        lock.release()
