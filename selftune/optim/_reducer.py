"""Agreement between the processes of a distributed run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Reducer:
    """Sums and means over processes; each process then takes the same hyperparameter step.

    Where parameters are replicated (DDP), training gradients agree already and outer ones are
    averaged. Where they are sharded (FSDP2), every inner product is a part of a sum.

    Args:
        wanted: Whether processes train together; None: if torch.distributed is initialised.

    Attributes:
        sharded: Whether parameters are DTensors.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted = wanted
        self.sharded = False

    @property
    def together(self) -> bool:
        """Whether there are other processes to agree with."""
        if self._wanted is False or not dist.is_available() or not dist.is_initialized():
            return False
        return dist.get_world_size() > 1

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over processes."""
        if not self.together:
            return tensor
        tensor = tensor.contiguous().clone()
        dist.all_reduce(tensor)
        return tensor / dist.get_world_size()

    def outer(self, products: Tensor) -> Tensor:
        """Inner products with gradients of each process's own validation batch."""
        if not self.together:
            return products
        mean = self.mean(products)
        return mean * dist.get_world_size() if self.sharded else mean

    def total(self, products: Tensor) -> Tensor:
        """Inner products with training gradients, on which processes agree."""
        return self.outer(products) if self.sharded else products


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "to_local")
