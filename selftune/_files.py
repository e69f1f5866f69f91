"""Text files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file beside the one that is there, and move it into its place.

    Raises:
        OSError: It cannot be written; what was there stays as it was.
    """
    place = Path(os.path.realpath(path))  # a link goes on pointing there
    partial = place.with_name(f"{place.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(place)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{path} was not written ({error.strerror}), what was there stays: free space there, "
            "or pass another place",
        ) from error
