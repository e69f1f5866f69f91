"""Handling of Ctrl-C, and of torchrun's SIGTERM, between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Records Ctrl-C; the second one interrupts at once.

    Args:
        terminating: Whether SIGTERM ends the run too. torchrun sends it to all ranks when it is
            stopped, and to the others when one has failed.
    """

    def __init__(self, terminating: bool = False) -> None:
        self.asked = False
        self._signals = (signal.SIGINT, signal.SIGTERM) if terminating else (signal.SIGINT,)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:  # launchers may send SIGTERM twice
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = [signal.signal(number, self._hear) for number in self._signals]
        try:
            yield
        finally:
            for number, handler in zip(self._signals, before, strict=True):
                signal.signal(number, handler)
