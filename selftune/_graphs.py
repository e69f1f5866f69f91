"""Functions compiled once for each name."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


class Graphs:
    """Wraps functions, once for each name.

    Args:
        wrap: Wraps a function, for example by compiling it.
    """

    def __init__(self, wrap: Callable[[Function], Function]) -> None:
        self._wrap, self._known = wrap, dict[str, Function]()

    def __call__(self, name: str, function: Function) -> Function:
        """The wrapped function; later functions of the same name are ignored."""
        if name not in self._known:
            self._known[name] = self._wrap(function)
        return self._known[name]


def compile_alone(function: Function) -> Function:
    """Compile a function with its own code object, as Dynamo limits graphs per code object."""

    def run(*args: Any) -> Any:
        return function(*args)

    own = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    compiled: Function = torch.compile(own, fullgraph=True)
    return compiled
