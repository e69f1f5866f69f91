"""Reductions over the processes of a distributed run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from selftune._flat import local
from selftune._identity import digest
from selftune.method.shards import copies

ALIKE: Counter[int] = Counter()
"""How many optimizers of this process have had parameters with a digest."""
PATIENCE = 10
"""Seconds that a process waits at its first validation loss; later, as long as for a reduction."""


class Reducer:
    """Sums and means over processes; each process then takes the same hyperparameter step.

    If parameters are replicated (DDP), training gradients are already equal and outer gradients are
    averaged. If they are sharded (FSDP2), inner products are summed.

    Args:
        wanted: Whether processes train one model; None means True if torch.distributed is
            initialised.

    Attributes:
        sharded: Whether parameters are DTensors.
        checked: Whether parameters were compared between processes.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted = wanted
        self.sharded = False
        self.checked = False
        self._digest = self._turn = self._again = 0
        self._step = -1
        self._left: list[str] = []

    @property
    def together(self) -> bool:
        if self._wanted is False or not dist.is_available() or not dist.is_initialized():
            return False
        return dist.get_world_size() > 1

    @property
    def first(self) -> bool:
        """Whether this process writes the log."""
        return not self.together or dist.get_rank() == 0

    @property
    def shard(self) -> tuple[int, int] | None:
        """This process's rank and their number, if parameters are sharded."""
        return (dist.get_rank(), dist.get_world_size()) if self.sharded else None

    def check_copies(self, params: Sequence[Tensor]) -> None:
        """Raise an error if sums over processes would count some parameters more often."""
        if self.together and len({copies(p, dist.get_world_size()) for p in params}) > 1:
            raise ValueError(
                "params: some are divided among the processes, others are whole on each, and would "
                "count once for every process: shard all of the model with fully_shard (tensor "
                "parallelism is not supported), or use DDP"
            )

    def check_alike(self, params: Sequence[Tensor]) -> None:
        """Raise an error if parameters differ between processes, at the first step of each."""
        self.checked = True
        if not self.together:
            return
        self._digest = digest(params, values=not self.sharded)
        ends = torch.tensor([self._digest, -self._digest], device=local(params[0]).device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if int(ends[0]) != -int(ends[1]):
            raise RuntimeError(
                f"params on rank {dist.get_rank()} differ from those of other processes, so "
                "hyperparameters would differ too. Broadcast rank 0's weights at the start, as "
                "DistributedDataParallel does; instead of ZeroRedundancyOptimizer, which gives "
                "each process only some parameters, use torch.distributed.fsdp.fully_shard; or "
                "pass distributed=False to tune in each process separately"
            )
        self._turn = ALIKE[self._digest]
        ALIKE[self._digest] += 1

    def meet(self, step: int) -> None:
        """Wait for the other processes before a hyperparameter step.

        A reduction would wait longer at first, or meet one of a training step of another process.
        """
        if not self.together:
            return
        rank, ranks = dist.get_rank(), range(dist.get_world_size())
        store = dist.distributed_c10d._get_default_store()
        later: timedelta = store.timeout  # type: ignore[attr-defined]  # of the process group
        patience = later if self._left else timedelta(seconds=PATIENCE)
        # A step meets twice after an error that a loop catches, or a state that it loads.
        self._again, self._step = self._again + 1 if step == self._step else 0, step
        place = f"selftune/{self._digest}/{self._turn}/{step}/{self._again}"
        keys = [f"{place}/{r}" for r in ranks]
        store.set(keys[rank], "here")
        if store.add(f"{place}/count", 1) == len(ranks):
            store.set(f"{place}/all", "here")
        try:
            store.wait([f"{place}/all"], patience)
        except RuntimeError as error:  # of the kind dist.DistStoreError
            absent = [f"rank {r}" for r in ranks if not store.check([keys[r]])]
            raise RuntimeError(
                f"hyper_step was called on rank {rank}, after {step} steps, but not on "
                f"{', '.join(absent)} within {patience.total_seconds():g} s: call it on every "
                "process, each with its own validation batch"
            ) from error
        for key in self._left:  # all have left the place before
            store.delete_key(key)
        self._left = [keys[rank], *([f"{place}/count", f"{place}/all"] if rank == 0 else [])]

    def mean(self, tensor: Tensor) -> Tensor:
        if not self.together:
            return tensor
        tensor = tensor.contiguous().clone()
        dist.all_reduce(tensor)
        return tensor / dist.get_world_size()

    def outer(self, products: Tensor) -> Tensor:
        """Reduce inner products with gradients of each process's validation batch."""
        if not self.together:
            return products
        mean = self.mean(products)
        return mean * dist.get_world_size() if self.sharded else mean

    def total(self, products: Tensor) -> Tensor:
        """Reduce inner products with training gradients, equal in all processes."""
        return self.outer(products) if self.sharded else products
