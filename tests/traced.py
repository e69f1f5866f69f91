"""Compiling without C++, which takes most of the time."""

from collections.abc import Callable
from typing import Any

import torch

compiler = torch.compile


def trace(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """``torch.compile``, except that torch runs the graph operation by operation."""
    options = settings.pop("options", None) or {}  # all others are the C++ compiler's
    kept = {n: o for n, o in options.items() if n == "guard_filter_fn"}
    return compiler(function, **{"backend": "aot_eager", "options": kept or None} | settings)
