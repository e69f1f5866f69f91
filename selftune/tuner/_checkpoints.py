"""Checkpoints on disk, written atomically."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from selftune import _files
from selftune.estimators import MEMORIES

log = logging.getLogger("selftune")

LAST, BEST = "last.pt", "best.pt"
RESUMED = "resumed"
"""Key of the weights in ``best.pt`` with which an interrupted run resumes, if they differ."""
RESCUE = 1.0
"""Seconds that other ranks wait for the first one to save the run when a rank is lost."""
PARTS = frozenset({
    "identity", "leaves", "frozen", "chosen", "whole", "snapshots", "watch", "population", "train",
    "val", "random", "group", "ended", "due", "numbers", "joining", "starts", "rates", "compile",
    "carried", "changes",
})  # fmt: skip
"""Entries of the checkpoint of a run."""
VERSION = 28
"""Version of checkpoints; 28 has what the first passes showed of the model."""


def write(path: Path, state: dict[str, Any], suffix: str = ".partial") -> bool:
    """Write a checkpoint atomically; return whether it was written.

    If the disk is full, the previous checkpoint stays and training continues. The ``suffix`` of the
    incomplete file is different for each writing process.
    """
    partial = path.with_suffix(suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        log.warning("%s was not written, training continues: %s", path, error)
        return False
    return True


def rescue(folder: Path | None, first: bool, save: Callable[..., None]) -> None:
    """Save a run that lost a rank: on the first rank, or on another if the first did not."""
    if folder is None:
        return
    last = folder / LAST
    before = last.stat().st_mtime_ns if last.exists() else 0
    if not first:
        time.sleep(RESCUE)
    if first or not last.exists() or last.stat().st_mtime_ns == before:
        save(everywhere=True)


def find(resume: bool | str | Path, folder: Path | None) -> list[Any] | None:
    """Find the checkpoint to resume from, if any, and the best weights next to it."""
    last = None if folder is None else folder / LAST
    if not isinstance(resume, bool):
        given = Path(resume)
        if last is not None and last.exists() and not (given.exists() and last.samefile(given)):
            raise ValueError(
                f"log_dir={folder} contains another run than resume={resume}: pass resume=True to "
                "continue that one, or another folder"
            )
        last = given
    elif resume and last is None:
        raise ValueError("resume=True needs the log_dir of the run; or pass a checkpoint's path")
    elif last is None or not last.exists():
        return None
    elif not resume:
        raise ValueError(
            f"log_dir={folder} already contains a run: pass resume=True to continue it, or "
            "another folder"
        )
    assert last is not None
    return [read(last), read_best(last.parent)]


def plain(tree: Any) -> bool:
    """Whether a tree contains only tensors, numbers and containers supported by ``read``."""
    return _files.plain(tree, MEMORIES)


def load(path: Path) -> Any:
    """Load a file saved by torch, after checking its checksums."""
    return _files.load(path, MEMORIES)


def read(path: Path, *, run: bool = True) -> dict[str, Any]:
    """Read a checkpoint: that of a run, or the best weights."""
    if not path.is_file():
        raise FileNotFoundError(f"resume: there is no checkpoint {path}")
    try:
        state = load(path)
    except ValueError as error:
        raise ValueError(
            f"resume: {path} is damaged or not a checkpoint of a Tuner ({error}); nothing was "
            "changed. Resume from another file, or start a new run in another log_dir"
        ) from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise ValueError(
            f"resume: {path} has version {version}, but this selftune's Tuner reads version "
            f"{VERSION}: finish the run with the selftune that saved it, or start a new run"
        )
    missing = sorted(PARTS - state.keys()) if run else []
    if missing:
        raise ValueError(
            f"resume: {path} is not the checkpoint of a run, {LAST}: it lacks {missing}; nothing "
            "was changed"
        )
    return state


def read_best(folder: Path) -> dict[str, Any] | None:
    """Read the best weights in a folder, if any, with which a run resumes."""
    path = folder / BEST
    best = read(path, run=False) if path.exists() else None
    return best if best is None else best.get(RESUMED, best)
