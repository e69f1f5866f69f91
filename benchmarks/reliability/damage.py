"""Troubles of files: cut, flipped and foreign ones, disks that are full or cannot be written to."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import random
import resource
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

Damage = Callable[[Path, random.Random], None]
Around = Callable[[Path], AbstractContextManager[None]]
REMEDIES = (
    "another", "pass ", "start a new", "wait for", "resume from", "free ", "use ", "goes on",
    "continue", "left out", "kept", "Start the", "stay", "trained again", "delete",
    "is not remembered", "no longer logs",
)  # fmt: skip
"""Words of which a sentence has one that says what to do, or what is done instead."""


def emptied(path: Path, draw: random.Random) -> None:
    """Nothing is left, as after a full disk."""
    path.write_bytes(b"")


def halved(path: Path, draw: random.Random) -> None:
    """Cut somewhere."""
    held = path.read_bytes()
    path.write_bytes(held[: draw.randrange(1, len(held) - 1)])


def clipped(path: Path, draw: random.Random) -> None:
    """Its last bytes are missing."""
    path.write_bytes(path.read_bytes()[: -draw.randrange(1, 20)])


def flipped(path: Path, draw: random.Random) -> None:
    """One bit is another."""
    held = bytearray(path.read_bytes())
    held[draw.randrange(len(held))] ^= 1 << draw.randrange(8)
    path.write_bytes(held)


def notes(path: Path, draw: random.Random) -> None:
    """Somebody's text."""
    path.write_text("these are\nmy notes, not a file of a run\n")


def other(path: Path, draw: random.Random) -> None:
    """A file that torch wrote for something else."""
    torch.save({"model": {"weight": torch.zeros(3)}}, path)


DAMAGES: tuple[Damage, ...] = (emptied, halved, clipped, flipped, flipped, notes, other)


def obscure(error: BaseException, names: tuple[str, ...], foreign: tuple[str, ...] = ()) -> str:
    """``""`` if an error is a sentence of the library's, or what it is instead.

    Args:
        error: What was raised.
        names: Of files, of which its message must have one.
        foreign: Ends of paths of other libraries' files that may raise it, where the user calls
            them.
    """
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    told = f"{type(error).__name__} in {Path(where).name}: {error}"
    if where.endswith(foreign or "\0"):
        return ""
    if not isinstance(error, (ValueError, RuntimeError, OSError)) or "/selftune/" not in where:
        return f"raw {told}"
    return "" if said(str(error), names) else f"no file or no remedy: {told}"


def said(message: str, names: tuple[str, ...]) -> bool:
    """Whether a sentence names a file, and what to do."""
    return any(n in message for n in names) and any(r in message for r in REMEDIES)


class Ears(logging.Handler):
    """Keeps what the library tells."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.told.append(record.getMessage())

    @classmethod
    @contextmanager
    def listening(cls) -> Iterator[Ears]:
        """To warnings of the library, which are not shown."""
        logger, ears = logging.getLogger("selftune"), cls()
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(ears)
        yield ears
        logger.removeHandler(ears)


def mounted(folder: Path, kilobytes: int = 10_000) -> bool:
    """Mount a file system in memory over a folder, for this process alone; whether it could."""
    system = ctypes.CDLL(None, use_errno=True)
    new_mounts, private, recursive = 0x20000, 1 << 18, 1 << 14
    size = f"size={kilobytes}k".encode()
    return not (
        system.unshare(new_mounts)
        or system.mount(b"none", b"/", None, private | recursive, None)
        or system.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, size)
    )


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder, with what is in it, that cannot be written to."""
    held = folder.with_name(f"{folder.name}.held")
    shutil.copytree(folder, held)
    if mounted(folder):
        shutil.copytree(held, folder, dirs_exist_ok=True)
        system, remount, fixed = ctypes.CDLL(None), 32, 1
        assert not system.mount(None, os.fsencode(folder), None, remount | fixed, None)
    else:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555)
    try:
        (folder / "probe").touch()
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
    else:
        raise RuntimeError("a folder cannot be made read-only here")
    yield


@contextmanager
def full(folder: Path, left: int = 0) -> Iterator[None]:
    """A folder, with what is in it, on a disk with so many kilobytes left."""
    held = folder.with_name(f"{folder.name}.held")
    shutil.copytree(folder, held)
    if mounted(folder):
        shutil.copytree(held, folder, dirs_exist_ok=True)
        with (folder / "filling").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
            file.truncate(max(0, file.tell() - 1024 * left))
    else:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * left, hard))
    yield
