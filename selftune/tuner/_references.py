"""Functions that refer to the trained model itself, of which validation uses a copy."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from selftune.tuner._objective import Objective


def check_references(objective: Objective, metrics: Mapping[str, Any]) -> None:
    """Raise an error for functions that refer to a trained part of the model.

    Such a function would read training weights in a pass that evaluates averaged ones.
    """
    own = "pass objective=lambda model, batch: loss, and use its first argument"
    functions = {("loss_fn", own): objective.loss_fn, ("objective", own): objective.objective}
    later = "compute it in callbacks=, which see the averaged weights in the model"
    functions |= {(f"metrics[{name!r}]", later): metric for name, metric in metrics.items()}
    trained = {
        id(m): n.removeprefix("model.") for n, m in objective.named_modules()
        if any(p.requires_grad for p in m.parameters())
    }  # fmt: skip
    for (name, remedy), function in functions.items():
        if _refers(function, trained):
            raise ValueError(
                f"{name} refers to the model itself, but validation evaluates a copy with averaged "
                f"weights: {remedy}"
            )
    for owner in objective.modules():
        for function in _hooks(owner):
            if _refers(function, trained):
                raise ValueError(
                    f"model: a hook of {trained.get(id(owner)) or type(owner).__name__} refers to "
                    "the model itself, but validation evaluates a copy with averaged weights: "
                    "register a method of the module that it refers to, self.hook"
                )


def _hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _refers(function: Any, modules: Mapping[int, str]) -> bool:
    """Whether a function has one of the modules in its closure, globals or bound arguments."""
    if isinstance(function, functools.partial):
        bound = (*function.args, *function.keywords.values())
        return any(id(v) in modules for v in bound) or _refers(function.func, modules)
    function = inspect.unwrap(function) if callable(function) else function
    if not inspect.isfunction(function):
        return False
    found = inspect.getclosurevars(function)
    return any(id(v) in modules for v in (*found.nonlocals.values(), *found.globals.values()))
