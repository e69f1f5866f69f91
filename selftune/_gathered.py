"""Gathered weights and unreduced gradients of models sharded by torch's ``fully_shard``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor


def _modules() -> list[Any]:
    """All modules that were passed to ``fully_shard``: shards do not know theirs."""
    if not (dist.is_available() and dist.is_initialized()):  # ``fully_shard`` needs a group
        return []
    from torch.distributed._composable_state import _module_state_mapping

    if not _module_state_mapping:
        return []
    from torch.distributed.fsdp import FSDPModule  # takes a second to import

    return [module for module in list(_module_state_mapping) if isinstance(module, FSDPModule)]


def reshard() -> None:
    """Free gathered weights; call it after a write to their shards, which makes them stale.

    After a forward pass without a backward pass the weights of the outermost module stay gathered,
    and the next forward pass uses them.
    """
    for module in _modules():
        module.reshard()


@contextmanager
def gradients_apart(params: Iterable[Tensor]) -> Iterator[None]:
    """Sets all gradients aside, and reduces those of sharded models, within the block.

    With ``set_requires_gradient_sync(False)`` the gradients of sharded models are not in ``.grad``:
    they are accumulated without communication, or partly reduced.
    """
    within: list[tuple[Any, str, Any]] = [(p, "grad", None) for p in params]
    for group in (group for module in _modules() for group in _groups(module)):
        within += [(group, "reduce_grads", True), (group, "all_reduce_grads", True)]
        within.append((group, "_partial_reduce_output", None))
        for param in group.fsdp_params:
            within.append((param.sharded_param, "grad", None))
            # In newer versions of torch a property: the gradient of the gathered parameter.
            if not isinstance(getattr(type(param), "unsharded_accumulated_grad", None), property):
                within.append((param, "unsharded_accumulated_grad", None))
            if hasattr(param, "_unsharded_param"):  # has been gathered
                within.append((param._unsharded_param, "grad", None))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in within]
    try:
        for owner, name, value in within:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def _groups(module: Any) -> list[Any]:
    """Groups of parameters that are gathered together; older versions of torch have one."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
