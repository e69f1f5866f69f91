"""Functions compiled once for each name."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


class Graphs:
    """Wraps functions, once for each name."""

    def __init__(self, wrap: Callable[[Function], Function]) -> None:
        self._wrap, self._known = wrap, dict[str, Function]()

    def __call__(self, name: str, function: Function) -> Function:
        """The wrapped function; later functions of the same name are ignored."""
        if name not in self._known:
            self._known[name] = self._wrap(function)
        return self._known[name]


def alone(function: Function) -> Function:
    """A copy with its own code object, as Dynamo limits graphs per code object."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


def compile_alone(function: Function) -> Function:
    """Compile a function with its own code object."""
    compiled: Function = torch.compile(alone(lambda *args: function(*args)), fullgraph=True)
    return compiled
