"""Compiling a function into one graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from selftune._graphs import alone

log = logging.getLogger("selftune")

Step = Callable[..., Any]


def compile_step(step: Step, device: torch.device, *, dynamic: bool, keep: bool = False) -> Step:
    """The step as one graph, launched from C++ on a CPU and as a CUDA graph on a GPU.

    The outputs of a CUDA graph are overwritten at its next launch; ``keep`` avoids CUDA graphs.
    """
    launch = "triton.cudagraphs" if device.type == "cuda" else "cpp_wrapper"
    options: dict[str, Any] = {launch: device.type == "cpu" or not keep}
    if not dynamic:
        options["guard_filter_fn"] = _needed
    return torch.compile(alone(step), fullgraph=True, dynamic=dynamic, options=options)


def for_shapes(function: Step, device: torch.device) -> Step:
    """A function as one graph for arguments of the first layout; eager for others."""
    # A lambda, because Dynamo needs a function with a code object.
    graph = compile_step(lambda *args: function(*args), device, dynamic=False, keep=True)
    shapes: list[Any] = []

    def run(*args: Any) -> Any:
        layout = signature(args)
        if not shapes:
            shapes.append(layout)
        if layout != shapes[0]:
            return function(*args)
        dynamo = torch._dynamo.exc  # imported lazily, as it is slow
        try:
            return graph(*args)
        except (dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit) as error:
            log.warning("a part of the estimator stays eager: %s", first_line(error))
            shapes[0] = None
            return function(*args)

    return run


NUMBERS = {"CONSTANT_MATCH", "NOT_PRESENT_IN_GENERIC_DICT"}
LIBRARIES = ("G['__import_torch", "G['__import_selftune", "__import__(", "dict(type(")


def _needed(guards: Sequence[Any]) -> list[bool]:
    """Guards of what users may change; checking all takes as long as a small step.

    These are numbers, also of classes and modules, and tensors that a model caches in attributes.
    """
    return [_of_user(g.guard_type, g.name) for g in guards]


def _of_user(kind: str, name: str) -> bool:
    theirs = "_modules['model']" in name or "loss_fn" in name
    if kind == "TENSOR_MATCH":
        return theirs and "_parameters[" not in name and "_buffers[" not in name
    if kind not in NUMBERS or "__mro__" in name:
        return False
    return theirs or (kind == "CONSTANT_MATCH" and not name.startswith(LIBRARIES))


def signature(batches: Any) -> Any:
    """Structure and layout of batches, for which a graph is compiled."""
    if isinstance(batches, Tensor):
        return batches.shape, batches.stride(), batches.dtype, batches.device
    if isinstance(batches, dict):
        return tuple((k, signature(v)) for k, v in batches.items())
    if isinstance(batches, (tuple, list)):
        return tuple(map(signature, batches))
    if hasattr(batches, "to"):  # opaque tensors: never equal
        return object()
    return type(batches)


def first_line(error: Exception) -> str:
    """The first line of an error message; those of torch are long."""
    return str(error).strip().splitlines()[0]


def enable_hooks() -> None:
    """Enable the hooks of saved tensors again, which a graph that failed leaves disabled."""
    torch._C._autograd._saved_tensors_hooks_enable()
