"""Statistics of normalisation layers for the averaged weights."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from selftune._flat import swap
from selftune._modes import ordinary_tensors
from selftune._trees import copy_into, unchanged
from selftune.control.final_weights import between
from selftune.method.averaging import statistics_momentum
from selftune.optim._carried import Carried, layers_called
from selftune.optim._layers import (
    exchanged,
    finite,
    kept_in,
    places,
    sound,
    statistics,
    tracks,
)

log = logging.getLogger("selftune")


class Buffers:
    """Running statistics for averaged, good and training weights.

    BatchNorm's running mean and variance fit only the weights that produced them. The averaged
    weights therefore have separate statistics, collected by validation passes in training mode, or
    otherwise averaged over the training weights' statistics. Layers of models that are not
    trained by this optimizer, but called by a closure, are not changed.

    Args:
        module: A module to search, with its children, for layers with running statistics.
        every: Training steps between two validation passes.

    Attributes:
        layers: Layers of the trained model.
        foreign: Layers of other models.
        borrowed: Statistics that ``functional_call`` gives to layers instead of their own.
        carried: Other buffers, which validation passes must not change.
        grown: Whether parameters have joined, whose modules are not found yet.
    """

    def __init__(self, module: nn.Module | None = None, every: int = 1) -> None:
        self.layers: list[nn.Module] = []
        self.foreign: list[nn.Module] = []
        self.borrowed: list[Tensor] = []
        self.carried = Carried()
        self.average: list[Tensor] = []
        self.good: list[Tensor] = []
        self.candidate: list[Tensor] = []
        self._every = every
        self.shown = self.grown = False
        self.own = False  # whether validation passes gather the averaged weights' statistics
        self._counts: list[Tensor] = []  # ``num_batches_tracked`` at the last exchange
        self._gathered: list[Tensor] = []  # whether the last pass updated each layer
        self._others: Sequence[Tensor] = []  # the training statistics, while others are shown
        self._saved: dict[str, Any] | None = None
        self._growing = False
        self._strangers = 0  # number of foreign layers and borrowed statistics in a saved run
        if module is not None:
            self.add(module)

    @ordinary_tensors()
    def add(self, module: nn.Module) -> None:
        """Add new layers, with their current statistics as those of all other weights."""
        known = {id(layer) for layer in self.layers}
        for layer in module.modules():
            if tracks(layer) and id(layer) not in known:
                begun = sound(layer)
                kept_in.pop(layer, None)  # of an optimizer that never went back to training
                self.layers.append(layer)
                known.add(id(layer))
                for kept in (self.average, self.good, self.candidate):
                    kept += [t.clone() for t in begun]

    def grow(self) -> None:
        self.grown = True

    @contextmanager
    def discovering(self, params: Iterable[Tensor]) -> Iterator[None]:
        """Adds the modules called inside the block, with their statistics from before it.

        An optimizer gets parameters, not the model; the first validation closure reveals the model.
        """
        params = list(params)
        with unchanged(self.average), self.searching(params):
            yield
        if self._saved is not None:
            self.load_state_dict(self._saved, params)
        if self._saved is not None:
            self._saved = None
            log.warning(
                "state_dict: its BatchNorm layers are not those that the first closure of "
                "hyper_step calls, so the statistics of the average start from those of training. "
                "Load the state into the model that it was saved with"
            )
        if self._strangers:  # the uninterrupted run has no such pass
            self._gathered = []
        self._strangers = 0

    @contextmanager
    def searching(self, params: Iterable[Tensor]) -> Iterator[None]:
        """As ``discovering``, for modules that have joined, in a pass at the average."""
        self.carried.search = True
        with layers_called(params, self.layers) as (mine, foreign, seen):
            yield
        self.grown = False
        own = {id(t) for layer in (*mine, *foreign) for t in statistics(layer)}
        borrowed = {id(t) for t in self.borrowed} | own
        self.borrowed += [t for t in seen if id(t) not in borrowed]
        # Layers with frozen parameters only are foreign until these are trained.
        known = {id(layer) for layer in foreign} | {id(layer) for layer in mine}
        self.foreign = [layer for layer in self.foreign if id(layer) not in known] + foreign
        for layer in mine:
            self.add(layer)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Restores the statistics of foreign layers and the carried buffers after the block."""
        foreign = [t for layer in self.foreign for t in statistics(layer)]
        with unchanged(foreign + self.borrowed), self.carried.unchanged():
            yield

    @contextmanager
    def quick(self) -> Iterator[None]:
        """Raises the momentum of the layers in the block, because validation passes are rare."""
        usual: list[Any] = [layer.momentum for layer in self.layers]
        pairs = list(zip(self.layers, usual, strict=True))
        for layer, momentum in pairs:
            layer.momentum = statistics_momentum(momentum, self._every)  # type: ignore[assignment]
        try:
            yield
        finally:
            for layer, momentum in pairs:
                layer.momentum = momentum

    def settle(self, statistics: Sequence[Sequence[Tensor]], place: float) -> None:
        """Replace the statistics at a position up to the average by the mean of several."""
        for kept in (self.average, self.good) if place < 0 else (self.average,):
            for tensor, several in zip(kept, zip(*statistics, strict=True), strict=True):
                mean = torch.stack(several).to("cpu", torch.float64).mean(0)
                if tensor.is_floating_point() and finite(mean):
                    tensor.copy_(mean)

    def expect(self, params: Iterable[Tensor]) -> None:
        """Find the layers of loaded statistics in later forward passes."""
        if self._saved is None:
            return
        ours = places(params)

        def look(module: nn.Module, _: Any) -> None:
            # Compiled models are left to the first closure. While statistics are exchanged, layers
            # must not be added.
            if torch.compiler.is_dynamo_compiling() or self.shown:
                return
            if any(id(p) in ours for p in module.parameters()):
                self.add(module)
            if self._saved is None or self._finds(self._saved, ours):
                handle.remove()
                if self._saved is not None:
                    self._load(self._saved, ours)

        handle = register_module_forward_pre_hook(look)

    @property
    def waiting(self) -> bool:
        """Whether there are loaded statistics whose layers are not found yet."""
        return self._saved is not None

    @property
    def complete(self) -> bool:
        """Whether all layers of a loaded run are found, including foreign ones."""
        return not self.waiting and self._apart >= self._strangers

    @property
    def _apart(self) -> int:
        return len(self.foreign) + len(self.borrowed)

    def tensors(self) -> list[Tensor]:
        return [t for layer in self.layers for t in statistics(layer)]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restores all statistics and the carried buffers after the block."""
        with unchanged(self.tensors()), self.apart():
            yield

    def at(self, place: float) -> list[Tensor]:
        """Copies of the statistics of the good (−1), averaged (0) or current weights (1)."""
        pairs = zip(self.average, self.good if place < 0 else self.tensors(), strict=True)
        return [between(a, b, abs(place)) for a, b in pairs]

    def exchange(self, others: Sequence[Tensor]) -> None:
        """Swap the modules' statistics with others, such as those of the average."""
        self.shown = not self.shown
        self._others = others if self.shown else []
        if not self.shown:
            known = zip(self._counts, self._batches(), strict=False)  # layers may have been added
            self._gathered = [before != now for before, now in known]
        for layer, own in zip(self.layers, self._by_layer(others), strict=True):
            swap(exchanged(layer, own), own)
            kept = [k for k in kept_in.get(layer, []) if k[0] is not own[0]]
            kept_in[layer] = [*kept, own] if self.shown else kept
        self._counts = [c.clone() for c in self._batches()]

    def _by_layer(self, tensors: Iterable[Tensor]) -> list[list[Tensor]]:
        rest = iter(tensors)
        return [list(islice(rest, len(statistics(layer)))) for layer in self.layers]

    def _batches(self) -> list[Tensor]:
        counts = (layer.num_batches_tracked for layer in self.layers)
        return [count for count in counts if isinstance(count, Tensor)]

    def blend(self, share: float, lapsed: bool = False) -> None:
        """Move the average toward the modules' statistics, unless validation passes update it.

        ``lapsed``: such passes have ended, and the statistics from them are dropped.
        """
        if self.own and not lapsed:
            return
        share, self.own = 1.0 if self.own else share, False
        for kept, tensor in zip(self.average, self.tensors(), strict=True):
            if kept.is_floating_point():
                kept.lerp_(tensor, share)

    def mend(self) -> None:
        """Replace statistics that are not finite, after a batch with NaN, by those of the average.

        A forward pass updates them before the step is skipped.
        """
        for tensor, kept in zip(self.tensors(), self.average, strict=True):
            if not finite(tensor):
                tensor.copy_(kept)

    def passed(self) -> None:
        """Record whether the last validation pass updated statistics.

        Only training mode updates them; a closure may leave the model in another mode.
        """
        one = [more.to(self._gathered[0].device) for more in self._gathered]
        if one:  # else no layer was known before the pass
            self.own = bool(torch.stack(one).any())

    @ordinary_tensors()
    def begin(self) -> None:
        self.mend()
        for kept in (self.average, self.good, self.candidate):
            kept[:] = [t.clone() for t in self.tensors()]  # the model may have been converted

    def snapshot(self, kind: str) -> None:
        target = self.candidate if kind == "candidate" else self.good
        source = self.candidate if kind == "promote" else self.average
        copy_into(target, source)

    def restore(self) -> None:
        """Restore good statistics for the training weights and the average."""
        for others in (self.tensors(), self.average, self.candidate):
            copy_into(others, self.good)

    def state_dict(self, params: Iterable[Tensor]) -> dict[str, Any]:
        """The averaged and good statistics, and the training statistics if not in place."""
        if self._saved is not None:
            return {**self._saved, "grown": self.grown}
        average, training = self.average, []
        if self.shown:
            pairs = list(zip(self.layers, self._by_layer(self._others), strict=True))
            training = [t for layer, own in pairs for t in kept_in.get(layer, [own])[0]]
            if self._others is self.average:
                average = [t for layer, own in pairs for t in exchanged(layer, own)]
        lists = {"training": training, "average": average, "good": self.good,
                 "candidate": self.candidate}  # fmt: skip
        clones = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
        return {
            **clones, "own": self.own, "foreign": self._apart, "grown": self.grown,
            "keys": self._keys(places(params)),
        }  # fmt: skip

    def load_state_dict(
        self, state: dict[str, Any], params: Iterable[Tensor], *, growing: bool = False
    ) -> None:
        """Continue from ``state_dict``, as soon as the layers are found.

        ``growing``: later passes look for further layers.
        """
        self._growing = growing
        self._saved = state
        self.own, self._strangers = state["own"], state["foreign"]
        self.grown = state["grown"]
        self._load(state, places(params))

    def _keys(self, ours: Mapping[int, int]) -> list[int]:
        """The place of each layer's weight among the parameters; -1: not there."""
        return [ours.get(id(layer.weight), -1) for layer in self.layers]

    def _finds(self, state: dict[str, Any], ours: Mapping[int, int]) -> bool:
        return not Counter(state["keys"]) - Counter(self._keys(ours))

    def _load(self, state: dict[str, Any], ours: Mapping[int, int]) -> None:
        """Put the layers into the order of a saved state, and load it, if all are found."""
        if not self._finds(state, ours):
            return
        self._saved = None
        rest, order = self._keys(ours), []
        for key in state["keys"]:
            order.append(rest.index(key))
            rest[order[-1]] = -2  # taken
        if not (self.grown or self._growing):  # else the next search adds the others
            order += [i for i, key in enumerate(rest) if key != -2]
        for kept in (self.average, self.good, self.candidate):
            each = self._by_layer(kept)
            kept[:] = [t for i in order for t in each[i]]
        self.layers = [self.layers[i] for i in order]
        for kept in (self.average, self.good, self.candidate):
            pairs = zip(kept, self.tensors(), strict=True)
            kept[:] = [k.to(t.device, t.dtype) for k, t in pairs]
        owned = {
            "average": self.average, "good": self.good, "candidate": self.candidate,
            "training": self.tensors(),
        }  # fmt: skip
        for name, mine in owned.items():
            saved = state[name]
            mine = mine[: len(saved)]  # a module may have more
            if [t.shape for t in mine] == [t.shape for t in saved]:
                copy_into(mine, saved)
