"""Checks of options that do not work together: a population, several ranks, shards."""

from __future__ import annotations

from typing import Any

from selftune._flat import is_sharded
from selftune.control import make_guard
from selftune.method import choice
from selftune.tuner._given import Given


def check_objective(objective: Any, metrics: Any, augment: Any) -> None:
    """Raise an error for options that an objective of the user leaves no place for."""
    if metrics and objective is not None:
        raise ValueError(
            "metrics need outputs and targets, which objective= does not return: pass loss_fn= and "
            "batches (inputs, (target, target)), or compute them in a callback"
        )
    if augment is not None and objective is not None:
        raise ValueError("augment= changes batches for loss_fn=, which objective= replaces")


def check_together(given: Given, compile: bool | str) -> None:
    """Raise an error for options that do not work in a population or on several ranks."""
    members, group, assigned = given.population, given.group, given.assignment(None)
    if members is not None and choice.undecided(given.update) is not None:
        raise ValueError(
            f"population={members.size} needs one rule for all members, but a mixture would "
            "choose one per member: pass population=1, or a single rule"
        )
    if assigned.whole is not None and members is not None:
        raise ValueError(
            f"population={members.size} needs an elementwise estimator, Trace or OneStep, for all "
            f"tuned hyperparameters, but {assigned.names} need {assigned.whole}: leave them out of "
            "tune=, or pass population=1"
        )
    if group.together and assigned.whole is not None:
        raise ValueError(
            f"{group.kind} needs an elementwise estimator (Trace, OneStep) for "
            f"all tuned hyperparameters, but {assigned.names} need {assigned.whole}: leave them "
            "out of tune=, or train on one rank"
        )
    if members is not None and make_guard(given.guard) is None:
        raise ValueError(
            f"population={members.size} ranks its members by the guard's mean validation loss, but "
            f"guard={given.guard}: leave guard= out, or pass population=1"
        )
    if group.together and members is not None:
        raise ValueError(
            f"population={members.size} cannot be trained with {group.kind}: "
            "pass population=1, or train on one rank"
        )
    _check_sharded(given, compile)


def _check_sharded(given: Given, compile: bool | str) -> None:
    """Raise an error for options that do not work with sharded weights, or a sharded model."""
    rule = type(given.update.rule).__name__
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
    if not given.update.rule.elementwise:
        raise ValueError(
            f'rule={rule} needs whole matrices, but with parallel="fsdp" each rank holds some '
            'rows: pass parallel="ddp", or an elementwise rule, such as st.rules.AdamW()'
        )
    if whole:
        raise ValueError(
            f'penalty={whole[0]!r} needs whole tensors, but with parallel="fsdp" each rank '
            'holds some rows: pass parallel="ddp", or an elementwise penalty, such as L1'
        )
    from torch.distributed.tensor import Shard  # takes a second to import, and is rarely needed

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
        by_rows = sharded and param.placements == (Shard(0),)
        if sharded and not (by_rows and param.device_mesh.size() == given.group.size):
            raise ValueError(
                f"model: {name} has placements {param.placements} on a mesh of shape "
                f'{tuple(param.device_mesh.shape)}, but parallel="fsdp" needs rows over all '
                f"{given.group.size} ranks: call fully_shard(module) without mesh= and "
                "shard_placement_fn=, or pass the plain model"
            )
