"""Models sharded over the ranks by torch's ``fully_shard``: a rank holds rows of every tensor."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from selftune._flat import is_sharded

LEAST = 2**20
"""Smallest number of weights that are gathered in a collective of their own."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def shard_model(objective: nn.Module, device: torch.device, ranks: int) -> None:
    """Shard the model over all ranks, unless it is sharded already.

    Elements of a ``Sequential`` or ``ModuleList`` (blocks, layers) that own at least ``LEAST``
    weights are gathered one after the other in a pass, and the rest together.

    Args:
        objective: The model and its loss.
        device: Device of the shards.
        ranks: Number of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    for module in objective.children():
        params = list(module.parameters())
        if params and not any(map(is_sharded, params)):
            for block in [*blocks(module), module]:
                fully_shard(block, mesh=mesh)
    objective.to(device)  # buffers


def blocks(model: nn.Module, least: int = LEAST) -> list[nn.Module]:
    """Modules that are gathered on their own, inner ones first.

    Examples:
        >>> layers = [nn.Linear(4, 4), nn.Linear(4, 2), nn.Sequential(nn.Linear(2, 9))]
        >>> [block.out_features for block in blocks(nn.Sequential(*layers), least=15)]
        [9, 4]
    """
    modules: list[nn.Module] = []
    claimed: set[int] = set()
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for container in reversed(list(model.modules())):
        for element in container.children() if isinstance(container, CONTAINERS) else ():
            own = {id(p): p for p in element.parameters() if id(p) not in claimed}
            inside = Counter(id(p) for _, p in element.named_parameters(remove_duplicate=False))
            shared = any(inside[i] < uses[i] for i in own)  # weights tied to other modules
            size = sum(p.numel() for p in own.values())
            if isinstance(element, CONTAINERS) or shared or size < least:
                continue
            modules.append(element)
            claimed |= own.keys()
    return modules
