"""Endless streams of batches whose position can be saved."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset

from selftune._modes import random_states, restore_random_states
from selftune.structure import Batches
from selftune.tuner._batch import size, structure, to_device
from selftune.tuner._checkpoints import plain
from selftune.tuner._positions import position, restarts, stateful
from selftune.tuner._rank_batches import RankBatches

log = logging.getLogger("selftune")


class Stream:
    """Batches of a loader, epoch after epoch, on the device.

    A saved position consists of all random states at the start of the epoch and the number of
    batches taken since. On loading, these batches are read again, with the same shuffling and the
    same random transforms. A loader with ``state_dict`` and ``load_state_dict`` (torchdata's
    ``StatefulDataLoader``) continues from its own state instead.

    Args:
        name: Its name for error messages.
        device: Device of the batches. On a GPU the next batch is copied in advance, unless the
            loader has a state, which would then be one batch ahead.
        skips: Whether to skip a last batch of one example, which BatchNorm does not support.
        shard: Makes the loader yield this rank's part of each batch.

    Attributes:
        following: The loader's sampler, if the size of its batches follows the noise scale.
        expected: Batches in each epoch, if the length of the run depends on it.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        name: str,
        device: torch.device,
        *,
        skips: bool = False,
        shard: RankBatches | None = None,
    ) -> None:
        self.skips = skips
        # Not tested with iter(loader), which would draw random numbers and start workers.
        iterable = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
        if not iterable or isinstance(loader, (str, bytes)):
            raise TypeError(
                f"{name}={type(loader).__name__} must be a DataLoader or an iterable of batches"
            )
        if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
            raise TypeError(
                f"{name}={type(loader).__name__} yields single examples: pass DataLoader({name}, "
                "batch_size=64), or DataLoader(..., batch_size=None) if its items are batches"
            )
        self.once = isinstance(loader, Iterator)  # a generator: it cannot be started again
        self._own = own_iterator(loader)
        self.following = batches_of(self._own)
        self._shard, self._loader = shard, self._own if shard is None else shard(self._own)
        self._name = name
        self._stateful = self.following is None and stateful(self._loader)
        self._usual = 0  # examples in the first batch
        self._device = device
        self._prefetches = device.type == "cuda" and not self._stateful
        self._batches: Iterator[Any] | None = None
        self._waiting: list[Any] = []  # batches that were put back
        self._start: dict[str, Any] = {}
        self._structure: Any = None
        self.expected: int | None = None
        self.epoch = 0
        self.taken = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._loader)

    @property
    def initial_length(self) -> int | None:
        """Batches in an epoch at the initial batch size, if known."""
        if self.following is not None:
            return self.following.initial_length
        return len(self) if self.sized else None

    @property
    def drawn(self) -> int:
        """Examples in the last batch taken, over all ranks, if its size follows the noise scale."""
        assert self.following is not None
        return self.following.examples(self.taken - 1)

    @property
    def sized(self) -> bool:
        """Whether the length of an epoch is known."""
        try:
            return len(self) >= 0
        except TypeError:
            return False

    def peek(self) -> Any:
        """The next batch, without taking it.

        If the loader restarts alike, random states are restored, and its own position, if any.
        """
        now = self._randomness()
        place = position(self._own)
        batch = self.next()
        if self.taken > 1 or not (self._stateful or restarts(self._own)):
            self.put_back(batch)
        else:  # start again, since a loader's workers draw random numbers as well
            self._batches, self.taken, self._start = None, 0, {}
            if place is not None:
                self._own.load_state_dict(place)
            self._restore(now)
        return batch

    def put_back(self, batch: Any) -> None:
        """Put back a batch, as the next one."""
        self._waiting.insert(0, batch)
        self.taken -= 1

    def next(self) -> Any:
        """The next batch, from the next epoch if this one has ended."""
        if self._batches is None:
            self._begin()
        while True:
            try:
                batch = self._fetch()
                break
            except StopIteration:
                if self.taken == 0:
                    raise ValueError(
                        f"{self._name} has no batches: is it empty, or is the batch size above its "
                        "length with drop_last=True?"
                    ) from None
                if self.once:
                    raise ValueError(
                        f"{self._name} ended after {self.taken} batches and cannot be "
                        "restarted: pass a DataLoader or a list, or use fewer steps"
                    ) from None
                self._count()
                self.epoch += 1
                self._begin()
        self.taken += 1
        self._check(batch)
        # Ranks skip together, though the larger parts of an odd batch have two examples.
        usual = self._usual if self._shard is None else self._shard.least
        if self.skips and size(batch) == 1 < usual:
            return self.next()
        self._usual = self._usual or size(batch)
        return batch

    def _count(self) -> None:
        """Warn once about an epoch of another length than expected."""
        if self.taken == (self.expected or self.taken):
            return
        log.warning(
            "%s: epoch %d has %d batches, but the length of the run was computed with %d for each "
            "epoch. Pass steps= instead of epochs= if their number changes",
            self._name, self.epoch, self.taken, self.expected,
        )  # fmt: skip
        self.expected = None

    def _begin(self) -> None:
        self._start = self._randomness()
        self._batches, self.taken = iter(self._loader), 0
        if self._prefetches:
            self._batches = _prefetched(self._batches, self._device)

    def _fetch(self) -> Any:
        assert self._batches is not None
        if self._waiting:
            return self._waiting.pop()
        batch = next(self._batches)
        return batch if self._prefetches else to_device(batch, self._device)

    def close(self) -> None:
        """End the loader's workers.

        Garbage collection would take five seconds for each, because it ends the workers' queue
        before the iterator that stops them.
        """
        self._batches = None
        end_workers(self._own)

    def _check(self, batch: Any) -> None:
        layout = structure(batch)
        if self._structure is None:
            self._structure = layout
        elif layout != self._structure:
            raise ValueError(
                f"{self._name}: batch {self.taken} of epoch {self.epoch} is {layout}, the first "
                f"was {self._structure}; every batch must have the same structure"
            )

    def _generators(self) -> list[torch.Generator]:
        groups = getattr(self._loader, "batch_sampler", None)
        holders = (self._loader, getattr(self._loader, "sampler", None), groups,
                   getattr(groups, "sampler", None))  # fmt: skip
        generators = [getattr(h, "generator", None) for h in holders]
        return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())

    def own(self) -> list[Tensor]:
        return [g.get_state() for g in self._generators()]

    def _randomness(self) -> dict[str, Any]:
        return {"all": random_states(), "own": self.own(), "sizes": self._sizes()}

    def _restore(self, state: dict[str, Any]) -> None:
        restore_random_states(state["all"])
        self.settle(state)
        if self.following is not None:
            self.following.load_state_dict(state["sizes"])

    def _sizes(self) -> dict[str, Any] | None:
        return None if self.following is None else self.following.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "taken": self.taken, "start": self._start, "own": self.own(),
                "usual": self._usual, "loader": self._place(), "sizes": self._sizes()}  # fmt: skip

    def _place(self) -> Any:
        """The loader's own state; None if it has none, or one that cannot be saved."""
        if not self._stateful or self._batches is None or self._waiting:
            return None
        state = self._loader.state_dict()
        return copy.deepcopy(state) if plain(state) else None

    def settle(self, state: dict[str, Any]) -> None:
        """Restore the loader's own generators to a saved state."""
        generators = self._generators()
        if len(generators) != len(state["own"]):
            raise ValueError(
                f"resume: {self._name} has {len(generators)} generators of its own, but had "
                f"{len(state['own'])} when the run was saved: resume with the same loader"
            )
        for generator, saved in zip(generators, state["own"], strict=True):
            generator.set_state(saved)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; changes the random states, which the caller restores."""
        self.epoch, taken, self._usual = state["epoch"], state["taken"], state["usual"]
        if not state["start"]:
            return
        place = state.get("loader")
        if place is None and getattr(self._own, "persistent_workers", False):
            self._begin()  # starts the workers, which draws a seed that later epochs do not draw
        if (self.following is None) != (state["sizes"] is None):
            had = "no" if state["sizes"] is None else "a"
            raise ValueError(
                f"resume: {self._name} had {had} sampler structure.Batches when the run was saved: "
                "resume with the same loader"
            )
        # The sampler may have drawn all batches of this epoch in advance.
        sizes = None if self.following is None else {**state["sizes"], "ended": False}
        self._restore(state["start"] | {"sizes": sizes})
        if place is not None and not self._stateful:
            raise ValueError(
                f"resume: {self._name} had a state_dict when the run was saved, but has none now: "
                "resume with the same loader"
            )
        if place is not None:
            self._loader.load_state_dict(place)
        self._begin()
        if place is not None:
            self.taken = taken
            return
        for _ in range(taken):
            try:
                self._check(self._fetch())
            except StopIteration:
                raise ValueError(
                    f"{self._name} has fewer batches than when the run was saved ({taken}): "
                    "resume with the same data"
                ) from None
            self.taken += 1


def _prefetched(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Batches on the GPU, with the next one copied in advance."""
    copying = torch.cuda.Stream(device)

    def send(batch: Any) -> Any:
        with torch.cuda.stream(copying):
            return to_device(batch, device)

    def receive(batch: Any) -> Any:
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for tensor in tree_leaves(batch):
            if isinstance(tensor, Tensor):
                tensor.record_stream(computing)  # otherwise its memory is reused while it is read
        return batch

    waiting: list[Any] = []  # popped as it is yielded, so that its memory can be reused
    for batch in batches:
        waiting.append(send(batch))
        if len(waiting) > 1:
            yield receive(waiting.pop(0))
    for batch in waiting:
        yield receive(batch)


def batches_of(loader: Any) -> Batches | None:
    """The sampler of a loader whose batches follow the noise scale."""
    loader = loader if isinstance(loader, DataLoader) else None
    samplers = [getattr(loader, name, None) for name in ("batch_sampler", "sampler")]
    return next((s for s in samplers if isinstance(s, Batches)), None)


def own_iterator(loader: Any) -> Any:
    """The same loader with its own iterator.

    Persistent workers share one iterator, which would restart when another reader starts.
    """
    if not isinstance(loader, DataLoader):
        return loader
    own = copy.copy(loader)
    vars(own)["_iterator"] = None
    return own


def end_workers(loader: Any) -> None:
    """Delete the iterator of a loader with persistent workers."""
    if isinstance(loader, DataLoader):
        vars(loader)["_iterator"] = None
