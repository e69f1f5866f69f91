"""Processes on this machine, whose IDs a restarted container gives again."""

from __future__ import annotations

import os
import time
from pathlib import Path


def alive(process: int, begun: float | None = None) -> bool:
    """Whether a process with this ID exists; with ``begun``, only one that started then.

    ``begun`` is what :func:`start_of` has returned.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # owned by another user
        pass
    now = start_of(process)
    return begun is None or now is None or now == begun


def start_of(process: int) -> float | None:
    """When a process started, in seconds since boot; None where the system does not tell."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def younger(process: int, than: float) -> bool:
    """Whether a process started after a time, as of ``time.time()``; False if that is unknown."""
    begun = start_of(process)
    if begun is None:
        return False
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - begun
    return time.time() - age > than + 1  # clocks are set
