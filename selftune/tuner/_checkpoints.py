"""Saved runs on disk: written whole or not at all."""

from __future__ import annotations

import logging
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from selftune.estimators import MEMORIES

log = logging.getLogger("selftune")

LAST, BEST = "last.pt", "best.pt"
VERSION = 1


def write(path: Path, state: dict[str, Any]) -> bool:
    """Write a checkpoint in one move; true if it was written.

    If the disk refuses, the one before stays and training goes on.
    """
    partial = path.with_suffix(".partial")
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
        log.warning("%s was not written, training goes on: %s", path, error)
        return False
    return True


def plain(tree: Any) -> bool:
    """Whether a tree is of tensors, numbers and containers that ``read`` knows."""
    kinds = (torch.Tensor, int, float, str, bool, type(None))
    if isinstance(tree, kinds):
        return True
    if type(tree) is dict:
        return all(plain(v) for v in tree.values())
    return type(tree) in (tuple, list, *MEMORIES) and all(plain(v) for v in tree)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"resume: there is no checkpoint {path}")
    try:
        with torch.serialization.safe_globals(MEMORIES):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, LookupError,
            ValueError) as error:  # fmt: skip
        raise ValueError(
            f"resume: {path} is damaged or no checkpoint of a Tuner ({error}); nothing was "
            "changed. Resume from another file, or start anew in another log_dir"
        ) from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ValueError(f"resume: {path} is no checkpoint of this version of selftune's Tuner")
    return state
