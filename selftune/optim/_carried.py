"""Layers with statistics that a validation pass calls, and buffers that it must not change."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_forward_pre_hook,
)

from selftune._modes import KeptBuffer
from selftune.nn._base import Tunable
from selftune.optim._layers import sound, tracks, wrapped


class Carried:
    """Protects training state in buffers from validation passes.

    Vectors of a power iteration, running codebooks and hidden states between batches depend on the
    training batches and weights. A validation pass must not change them, or validation data would
    enter the training. Counters of random numbers, integers without running values beside them,
    may advance, and so may modules outside of a model with parameters, such as metrics.

    Attributes:
        buffers: Module and name of each buffer of running values in the models that closures call.
        search: Whether the next pass looks for further ones.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[nn.Module, str]] = []
        self.search = True

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restores the buffers after the block."""
        kept: dict[tuple[int, str], KeptBuffer] = {}
        assigned: set[tuple[int, str]] = set()

        def look(module: nn.Module, _: Any = None) -> None:
            if any(True for _ in module.parameters()):
                for part, name in _running(module):
                    if (id(part), name) not in kept:
                        kept[id(part), name] = KeptBuffer.of(part, name)

        def assign(module: nn.Module, name: str, _: Any) -> None:
            assigned.add((id(module), name))

        for module, name in self.buffers:
            if name in module._buffers:  # else it was removed, as that of a mask made permanent
                kept[id(module), name] = KeptBuffer.of(module, name)
        known = set(kept)
        try:
            if self.search:
                with watching(look), register_module_buffer_registration_hook(assign):
                    yield
            else:
                yield
            self.buffers, self.search = [(k.module, k.name) for k in kept.values()], False
        finally:
            for key, one in kept.items():
                # Tensors that ``functional_call`` showed are not the module's own.
                if key in known | assigned or getattr(one.module, one.name) is one.buffer:
                    one.restore()


@contextmanager
def layers_called(
    params: Iterable[Tensor], known: Iterable[nn.Module]
) -> Iterator[tuple[list[nn.Module], list[nn.Module], list[Tensor]]]:
    """Fills lists with the optimizer's layers called in the block, foreign ones, and statistics.

    After the block they have their statistics from before it.

    Args:
        params: Parameters of the optimizer. Modules with only other parameters are foreign.
        known: Layers that are not searched for.
    """
    ours, seen, others = {id(p) for p in params}, {id(layer) for layer in known}, set[int]()
    mine: dict[int, nn.Module] = {}
    foreign: dict[int, nn.Module] = {}
    before: dict[int, tuple[Tensor, Tensor]] = {}  # tensors, and copies

    def look(module: nn.Module, _: Any) -> None:
        if id(module) in others:
            return
        owned = [id(p) in ours for p in module.parameters()]
        own = any(owned) or not owned
        for part in module.modules():
            if not own:
                others.add(id(part))
            if tracks(part) and id(part) not in seen:
                if own or id(part) in mine:
                    mine[id(part)] = part
                else:
                    foreign[id(part)] = part
                for tensor in sound(part):  # inside of ``functional_call`` not the layer's own
                    before.setdefault(id(tensor), (tensor, tensor.clone()))

    lists: tuple[list[nn.Module], list[nn.Module], list[Tensor]] = [], [], []
    try:
        with watching(look):
            yield lists
    finally:
        for tensor, old in before.values():
            tensor.data.copy_(old)  # as in ``unchanged``
    lists[0].extend(mine.values())
    lists[1].extend(foreign.values())
    lists[2].extend(tensor for tensor, _ in before.values())


@contextmanager
def watching(look: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Calls a function before every forward pass of a module in this thread within the block."""
    thread = get_ident()

    def own(module: nn.Module, inputs: Any) -> None:
        if get_ident() == thread:
            look(module, inputs)

    with register_module_forward_pre_hook(own), warnings.catch_warnings(), _eagerly():
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are")
        yield


def _eagerly() -> AbstractContextManager[Any]:
    """Runs compiled models and functions eagerly, because graphs do not call the hook."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _running(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Module and name of buffers of running values and their counts, without BatchNorm's."""
    for part in module.modules():
        own = {n: b for n, b in part.named_buffers(recurse=False) if not wrapped(b)}
        floating = [n for n, b in own.items() if b.is_floating_point()]
        if floating and not isinstance(part, _NormBase):
            yield from ((part, n) for n in (floating if isinstance(part, Tunable) else own))
