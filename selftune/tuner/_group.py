"""The processes of a data-parallel run, and the reductions over them."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from selftune._identity import digest
from selftune._modes import random_states, restore_random_states
from selftune.tuner._batch import size
from selftune.tuner._passes import Passed

log = logging.getLogger("selftune")

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
"""Longest wait for another rank, which may be compiling; a dead rank is detected at once."""


class RankLost(RuntimeError):
    """Another rank has died: a collective failed, before anything was written."""


class Group:
    """The ranks that train one model, each on its part of every batch.

    All ranks decide from the same reduced numbers, so weights and hyperparameters stay identical
    without being sent. A single process is a group of size 1, whose methods return their arguments
    unchanged. ``sharded``: each rank holds a shard of the weights and of their state.

    Attributes:
        asks: Whether this rank requests the end of the run; sent with every pass.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, sharded: bool = False) -> None:
        self.rank, self.size, self.sharded = rank, size, sharded
        self.asks: Callable[[], bool] = lambda: False
        self._asked: Tensor | None = None  # of any rank, since the start
        self._start = self._passes = 0  # they seed the random numbers of a pass

    @property
    def together(self) -> bool:
        """Whether there are other ranks, or weights are sharded, possibly over a single one."""
        return self.size > 1 or self.sharded

    @property
    def kind(self) -> str:
        """The argument ``parallel`` in an error message."""
        return f'parallel="{"fsdp" if self.sharded else "ddp"}" on {self.size} ranks'

    @property
    def first(self) -> bool:
        """Whether this rank writes logs, checkpoints and progress."""
        return self.rank == 0

    # the mean of passes

    def mean(self, passing: Callable[..., Passed], run: Any, batch: Any) -> Passed:
        """The pass over the batches of all ranks: means weighted by examples, in one all-reduce.

        Dropout and augmentation use different random numbers on each rank: for each pass the
        generator is seeded by (run, pass, rank), so checkpoints need no per-rank state. All other
        random numbers, such as those of shuffling, are the same on all ranks. Floating-point
        buffers, such as the running statistics of BatchNorm, are averaged as well.

        ``passing`` takes this rank's part of the batch. Sharded gradients are already averaged over
        ranks, after multiplication by the number of examples of each.
        """
        if not self.together:
            return passing(run, batch)
        with self._seeded(), self.exchange(mixed=True):
            loss, grads, buffers = passing(run, batch)
        floating = [b for b in buffers if b.is_floating_point()]
        own = [] if self.sharded else grads
        wanted = [*own, *floating, loss]
        head = loss.new_tensor([float(self.asks()), 1.0], dtype=torch.float32)
        flat = torch.cat([*(t.reshape(-1) for t in wanted), head]).mul_(size(batch))
        with self.exchange():
            dist.all_reduce(flat)
        self._passes += 1
        asked, count = flat[-2].clone(), flat[-1].clone()
        self._asked = asked if self._asked is None else torch.maximum(self._asked, asked)
        pieces = flat.div_(count)[:-2].split([t.numel() for t in wanted])
        means = [p.view(t.shape).to(t.dtype) for p, t in zip(pieces, wanted, strict=True)]
        reduced = iter(means[len(own) : -1])
        after = [next(reduced) if b.is_floating_point() else b for b in buffers]
        if self.sharded:
            return means[-1], [g.div_((count / self.size).to(g.dtype)) for g in grads], after
        return means[-1], means[: len(own)], after

    def total(self, products: Tensor) -> Tensor:
        """Sum products over shards; replicated weights have their sums already."""
        if not self.sharded:
            return products
        total = products.contiguous().clone()
        with self.exchange():
            dist.all_reduce(total)
        return total

    def concatenate(
        self, shard: Tensor, counts: Sequence[int], dim: int = 0, *, everywhere: bool = False
    ) -> Tensor:
        """The shards of all ranks along a dimension, on the CPU of the first rank or of all.

        ``counts`` has the extent of each shard; ranks that do not concatenate return their own.
        """
        shape = list(shard.shape)
        shape[dim] = max(counts)
        padded = shard.new_zeros(shape)
        padded.narrow(dim, 0, shard.shape[dim]).copy_(shard)
        pieces = [torch.empty_like(padded) for _ in counts]
        with self.exchange():
            dist.all_gather(pieces, padded)
        if not (self.first or everywhere):
            return shard
        parts = [f.narrow(dim, 0, n).cpu() for f, n in zip(pieces, counts, strict=True)]
        return torch.cat(parts, dim)

    def asked(self) -> bool:
        """Whether any rank has requested the end of the run; equal on all ranks."""
        return self._asked is not None and bool(self._asked)

    # numbers and objects

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on each of them."""
        if not self.together:
            return [value]
        gathered: list[Any] = [None] * self.size
        with self.exchange():
            dist.all_gather_object(gathered, value)
        return gathered

    def average(self, value: float, weight: float) -> float:
        if not self.together:
            return value
        gathered = self.gather((value, weight))
        return sum(v * w for v, w in gathered) / sum(w for _, w in gathered)

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def from_first(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank only; return or raise its result on all ranks."""
        if not self.together:
            return function()
        message: list[Any] = [None, None]
        if self.first:
            try:
                message[0] = function()
            except Exception as error:
                message[1] = error
        with self.exchange():
            dist.broadcast_object_list(message)
        if message[1] is not None:
            raise message[1]
        return message[0]

    def check_same(self, what: str, value: Any, remedy: str) -> None:
        """Raise an error if a value differs from that of the first rank."""
        values = self.gather(value)
        differ = [rank for rank, other in enumerate(values) if other != values[0]]
        if differ:
            raise ValueError(f"{what} of rank {differ[0]} differ from those of rank 0: {remedy}")

    def broadcast(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The first rank's tensor; those of the others only have its shape and dtype."""
        received = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if self.first:
            received.copy_(tensor)
        with self.exchange():
            dist.broadcast(received, 0)
        return received

    @contextmanager
    def exchange(self, *, mixed: bool = False) -> Iterator[None]:
        """Explain the failure of a collective within a block.

        ``mixed``: the block also runs the model, whose errors have nothing to explain.
        """
        try:
            yield
        except RuntimeError as error:
            words = ("gloo", "nccl", "connection closed")
            failed = isinstance(error, dist.DistError) or any(
                w in str(error).lower() for w in words
            )
            if mixed and not failed:
                raise
            kept = "its last checkpoint" if self.sharded else "here"
            raise RankLost(
                f"rank {self.rank} of {self.size} ends: another rank has died, or did not answer "
                f"within {TIMEOUT} (see its output). With log_dir the run is saved up to {kept}: "
                "start the script again with resume=True"
            ) from error

    # random streams

    def share_streams(self) -> None:
        """Set the random state to that of the first rank; GPU generators stay separate."""
        if self.together:
            state = self.from_first(random_states)
            state.pop("cuda", None)
            restore_random_states(state)

    def seed(self) -> None:
        self._start, self._passes = digest([torch.get_rng_state()]), 0

    def state_dict(self) -> dict[str, int]:
        return {"start": self._start, "passes": self._passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the random numbers of a saved run, on any number of ranks."""
        self._start, self._passes = state["start"], state["passes"]

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        drawn = np.random.SeedSequence((self._start, self._passes, self.rank)).generate_state(1)
        with torch.random.fork_rng([]):
            torch.manual_seed(int(drawn[0]))
            yield


def join(parallel: str, device: torch.device) -> tuple[Group, torch.device]:
    """The group of this process and its device; initialises the process group if needed."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        missing = [n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if n not in os.environ]
        if not dist.is_available() or missing:
            raise ValueError(
                f"parallel={parallel!r} needs one process per rank, but there is neither an "
                f"initialised process group nor {', '.join(missing)} in the environment: start the "
                "script with torchrun --nproc-per-node 2 script.py, or omit parallel="
            )
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun --max-restarts keeps its store, where gloo would find addresses of dead ranks.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"selftune, attempt {attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        atexit.register(_leave)
    return Group(dist.get_rank(), dist.get_world_size(), sharded=parallel == "fsdp"), device


@contextmanager
def quiet(silent: bool) -> Iterator[None]:
    """Log only errors on this rank, because the first one logs everything."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    if silent:
        log.addFilter(is_error)
    try:
        yield
    finally:
        log.removeFilter(is_error)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
