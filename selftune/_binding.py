"""Calls of modules with other tensors in place of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module


@contextmanager
def bound(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Put tensors into a module within a block; tensors assigned there are in ``tensors`` after it.

    As in ``torch.func.functional_call``, which leaves the given tensors in a module that has two
    names in another (an embedding of encoder and decoder), as it puts them back by name.

    Raises:
        ValueError: A tensor was replaced by one of another shape.
    """
    places = _places(module, tensors)
    try:
        with _reparametrize_module(module, places):
            yield
    finally:
        before = dict(tensors)
        tensors.update((name, places[name]) for name in before if name in places)
    for name, tensor in before.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"model: {name} changed its shape in a forward pass, from {tuple(tensor.shape)} to "
                f"{tuple(tensors[name].shape)}, but a run writes buffers in place: call the model "
                "once on the largest input before the run, or do not register it as a buffer"
            )


def functional_call(
    module: nn.Module,
    tensors: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The output of a module with other tensors."""
    with bound(module, tensors):
        return module(*args, **(kwargs or {}))


def _places(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by one name for each place, and tied ones at all of their places."""
    tied: dict[Tensor, list[str]] = {}
    for prefix, part in module.named_modules():  # each once
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                tied.setdefault(tensor, []).append(f"{prefix}.{key}" if prefix else key)
    places: dict[str, Tensor] = {}
    for names in tied.values():
        given = [tensors[name] for name in names if name in tensors]
        places |= {name: tensors.get(name, given[0]) for name in names if given}
    return places
