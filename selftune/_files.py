"""Text files, written atomically; files of torch, with their checksums compared."""

from __future__ import annotations

import io
import os
import pickle
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def write_text(path: Path, text: str) -> None:
    """Write a temporary file, and move it into place.

    Raises:
        OSError: The file cannot be written; the previous file is unchanged.
    """
    place = Path(os.path.realpath(path))  # keeps a symbolic link intact
    partial = place.with_name(f"{place.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(place)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{path} was not written ({error.strerror}); the previous file is kept: free space "
            "there, or pass another path",
        ) from error


def plain(tree: Any, safe: Sequence[type] = ()) -> bool:
    """Whether a tree contains only tensors, numbers and containers that ``load`` supports."""
    kinds = (torch.Tensor, int, float, str, bool, type(None))
    if isinstance(tree, kinds):
        return True
    if type(tree) is dict:
        return all(plain(v, safe) for v in tree.values())
    return type(tree) in (tuple, list, *safe) and all(plain(v, safe) for v in tree)


def load(source: Path | io.BytesIO, safe: Sequence[type] = ()) -> Any:
    """Load what torch has saved, after checking its checksums, which torch does not read.

    Args:
        source: A file, or its content.
        safe: Classes that it may hold besides tensors and plain containers.

    Raises:
        ValueError: It is damaged, or was not saved by torch.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"the checksum of {broken} does not match")
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with torch.serialization.safe_globals(list(safe)):
            return torch.load(source, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, LookupError, ValueError,
            zipfile.BadZipFile, zlib.error, NotImplementedError) as error:  # fmt: skip
        raise ValueError(str(error) or type(error).__name__) from error
