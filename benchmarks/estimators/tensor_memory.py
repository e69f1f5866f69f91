"""The memory of tensors while steps are taken, at its highest."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch


class Scale:
    """Weighs tensors' memory: begin, mark where it starts to count, and read the highest level."""

    def __init__(self) -> None:
        torch.compiler.reset()  # it holds on to tensors of runs before, which would be freed …
        gc.collect()  # … while this one is weighed, and count against it
        self._profile = torch.profiler.profile(profile_memory=True)
        self._profile.__enter__()
        self._since = 0

    def mark(self) -> None:
        """Count from here."""
        gc.collect()  # what compiling has left
        self._since = time.time_ns()

    def read(self) -> int:
        """Bytes at the highest level since the mark."""
        self._profile.__exit__(None, None, None)
        events = self._profile.profiler.kineto_results.events()
        level = highest = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=_start):
            level += event.nbytes()
            highest = max(highest, level) if _start(event) > self._since else highest
        return highest


def _start(event: Any) -> int:
    return event.start_ns()
