"""Children that are forked, so that they begin at once, and killed."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.reliability.starts import quiet


class Broken(Exception):
    """A child's traceback."""


@dataclass(frozen=True)
class Child:
    """A process of its own session.

    Attributes:
        process: Its number.
        pipe: Where its result comes from.
    """

    process: int
    pipe: int

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Child:
        """Fork a process that calls a function.

        The parent must run no thread: it never trains, and uses one thread of torch.
        (Of a parent that trained, a child may end by a signal, or never.)
        """
        torch.set_num_threads(1)
        reading, writing = os.pipe()
        process = os.fork()
        if process:
            os.close(writing)
            return cls(process, reading)
        try:
            os.close(reading)
            os.setsid()
            quiet()
            try:
                answer = (True, work())
            except BaseException:
                answer = (False, traceback.format_exc())
            with os.fdopen(writing, "wb") as file:
                pickle.dump(answer, file)
        finally:
            os._exit(0)

    def killed(self, after: float) -> bool:
        """Send SIGKILL after some seconds; whether that ended the process."""
        time.sleep(after)
        os.kill(self.process, signal.SIGKILL)
        _, status = os.waitpid(self.process, 0)
        os.close(self.pipe)
        return os.WIFSIGNALED(status)

    def result(self) -> Any:
        """What the function returned.

        Raises:
            Broken: It raised.
        """
        with os.fdopen(self.pipe, "rb") as file:
            try:
                whole, answer = pickle.load(file)
            except EOFError:
                whole, answer = False, "the process ended without a result"
        _, status = os.waitpid(self.process, 0)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            whole, answer = False, f"the process ended by {name}"
        if not whole:
            raise Broken(answer)
        return answer


def apart(work: Callable[[], Any]) -> Any:
    """What a function returns in a process of its own.

    Raises:
        Broken: It raised.
    """
    return Child.of(work).result()


def warm_up(work: Callable[[], Any]) -> None:
    """Import here what a function imports when it is called, so that children need not."""
    for name in apart(lambda: (work(), list(sys.modules))[1]):
        if name not in sys.modules:
            with suppress(Exception):  # modules that others make up
                importlib.import_module(name)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder, in memory where that can be had: a kill leaves the same there as on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
