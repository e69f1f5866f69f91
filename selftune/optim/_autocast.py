"""The caller's autocast: closures run in it, the optimizer's own arithmetic does not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

Result = TypeVar("Result")


def disabled(device: str) -> AbstractContextManager[object]:
    """A context without autocast, which would compute inner products in low precision."""
    return torch.autocast(device, enabled=False) if _enabled(device) else nullcontext()


def keeping(closure: Callable[[], Result], device: str) -> Callable[[], Result]:
    """A closure that runs in the autocast of the caller of this function, wherever it is called."""
    if not _enabled(device):
        return closure
    dtype, caches = torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()

    def called() -> Result:
        with torch.autocast(device, dtype, cache_enabled=caches):
            return closure()

    return called


def _enabled(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
