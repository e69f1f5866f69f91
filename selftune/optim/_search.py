"""Search for the normalisation layers that a validation pass calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from selftune.optim._carried import watching
from selftune.optim._layers import sound, tracks


@contextmanager
def layers_called(
    params: Iterable[Tensor], known: Iterable[nn.Module]
) -> Iterator[tuple[list[nn.Module], list[nn.Module]]]:
    """Fills a list with the optimizer's layers called in the block, and one with foreign ones.

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

    lists: tuple[list[nn.Module], list[nn.Module]] = [], []
    try:
        with watching(look):
            yield lists
    finally:
        for tensor, old in before.values():
            tensor.data.copy_(old)  # as in ``unchanged``
    lists[0].extend(mine.values())
    lists[1].extend(foreign.values())
