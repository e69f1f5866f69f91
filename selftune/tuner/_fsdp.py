"""Models sharded over the ranks by torch's ``fully_shard``: a rank holds rows of every tensor."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from selftune._flat import is_sharded

if TYPE_CHECKING:
    from selftune.tuner._building import Given

LEAST = 2**20
"""Smallest number of weights that are gathered in a collective of their own."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def check_sharded(given: Given, compile: bool | str) -> None:
    """Raise an error for options that do not work with sharded weights, and for a sharded model.

    Args:
        given: The arguments of the tuner.
        compile: Its argument.

    Raises:
        ValueError: There are such options; the message names them.
    """
    rule = type(given.rule).__name__
    whole = [p.name for p in given.update.penalties if not p.elementwise]
    params: dict[str, Any] = dict(given.objective.model.named_parameters())
    sharded = [name for name, param in params.items() if is_sharded(param)]
    if not given.group.sharded:
        if sharded:
            raise ValueError(f'model: {sharded[0]} is sharded (a DTensor): pass parallel="fsdp"')
        return
    if compile is True:
        raise ValueError(
            'compile=True cannot be used with parallel="fsdp", whose steps run eagerly: pass '
            'compile=False, or parallel="ddp"'
        )
    if not given.rule.elementwise:
        raise ValueError(
            f'rule={rule} needs whole matrices, but with parallel="fsdp" each rank holds some '
            'rows: pass parallel="ddp", or an elementwise rule, such as st.rules.AdamW()'
        )
    if whole:
        raise ValueError(
            f'penalty={whole[0]!r} needs whole tensors, but with parallel="fsdp" each rank '
            'holds some rows: pass parallel="ddp", or an elementwise penalty, such as L1'
        )
    for name, param in params.items():
        if param.ndim == 0:
            raise ValueError(
                f'model: {name} has shape (), which parallel="fsdp" cannot divide: give it shape '
                '(1,), or pass parallel="ddp"'
            )
        if sharded and not is_sharded(param):
            raise ValueError(
                f"model: {name} is not sharded, but {sharded[0]} is: call fully_shard(model) after "
                "fully_shard of its blocks, or pass the plain model"
            )
        if sharded and param.device.type != param.device_mesh.device_type:
            raise ValueError(
                f"model: {name} is offloaded to the {param.device.type}, which st.Tuner does not "
                "support: call fully_shard(module) without offload_policy=, or use st.AdamW in "
                "your own loop"
            )
        if sharded and not _by_rank(param, given.group.size):
            raise ValueError(
                f"model: {name} has placements {param.placements} on a mesh of shape "
                f'{tuple(param.device_mesh.shape)}, but parallel="fsdp" needs rows over all '
                f"{given.group.size} ranks: call fully_shard(module) without mesh= and "
                "shard_placement_fn=, or pass the plain model"
            )


def _by_rank(param: Any, ranks: int) -> bool:
    from torch.distributed.tensor import Shard  # takes a second to import, and is rarely needed

    return param.placements == (Shard(0),) and param.device_mesh.size() == ranks


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
