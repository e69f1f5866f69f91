"""Text files, written atomically."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path


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
