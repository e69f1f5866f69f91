"""Processes on this machine."""

from __future__ import annotations

import os


def alive(process: int) -> bool:
    """Whether a process with this ID exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # owned by another user
        return True
    return True
