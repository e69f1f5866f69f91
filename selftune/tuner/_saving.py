"""The contents of a checkpoint of a tuner's run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from selftune._identity import differences
from selftune._modes import random_states, restore_random_states
from selftune._trees import leaves
from selftune.tuner import _choice
from selftune.tuner._checkpoints import plain
from selftune.tuner._parts import Parts
from selftune.tuner._run_state import RunState
from selftune.tuner._shards import Placement


def pack(training: Parts) -> dict[str, Any]:
    """The state of a run as tensors, numbers and plain containers; called on all ranks."""
    shards = training.steps.shards
    return {
        "identity": training.identity,
        "leaves": [shards.whole(t, p) for t, p in _placed(training, training.fused.run)],
        "frozen": {n: shards.whole_param(p) for n, p in _frozen_params(training).items()},
        "chosen": None if training.steps.chosen is None else tuple(training.steps.chosen),
        "whole": _remembered(training),
        "snapshots": _snapshots(training, shards.whole, training.snapshots.state_dict()),
        "watch": training.watch.state_dict(),
        "population": None if training.population is None else training.population.state_dict(),
        **position(training),
        "group": training.steps.group.state_dict(),
    }


def position(training: Parts) -> dict[str, Any]:
    """The positions of the batches and the random states."""
    train, val = training.train.state_dict(), training.val.state_dict()
    return {"train": train, "val": val, "random": random_states()}


@torch.no_grad()
def unpack(training: Parts, state: dict[str, Any]) -> None:
    """Continue from a packed state that was checked."""
    _choice.restore(training.steps, training.fused, state.get("chosen"))
    run, shards = training.fused.run, training.steps.shards
    for (leaf, place), saved in zip(_placed(training, run), state["leaves"], strict=True):
        leaf.copy_(shards.shard(saved, place))
    for name, param in _frozen_params(training).items():
        shards.load_param(param, state["frozen"][name])
    if training.fused.whole is not None:
        training.fused.whole.estimates.memory = tree_map_only(
            Tensor, lambda t: t.to(run.step.device), state["whole"]
        )
    training.snapshots.load_state_dict(_snapshots(training, shards.shard, state["snapshots"]))
    training.watch.load_state_dict(state["watch"])
    if training.population is not None:
        training.population.load_state_dict(state["population"])
    streams = ((training.train, state["train"]), (training.val, state["val"]))
    for stream, saved in streams:
        stream.load_state_dict(saved)
    restore_random_states(state["random"])
    for stream, saved in streams:
        stream.settle(saved)
    training.steps.group.load_state_dict(state["group"])


def check(training: Parts, state: dict[str, Any], but: Sequence[str] = ()) -> None:
    """Check that a packed state is of this run."""
    saved, mine = (
        {n: v for n, v in side.items() if n not in but}
        for side in (state["identity"], training.identity)
    )
    other = differences(saved, mine)
    if other:
        raise ValueError(
            f"resume: the checkpoint is from another run: {'; '.join(other)}: resume with the "
            "same model and settings, or start a new run in another log_dir"
        )
    shards = training.steps.shards
    run = _choice.expected(training.steps, training.fused.run, state.get("chosen"))
    shapes = [(shards.shape(t, place), t.dtype) for t, place in _placed(training, run)]
    if shapes != [(t.shape, t.dtype) for t in state["leaves"]]:
        raise ValueError(
            "resume: the checkpoint's tensors do not match this run's: resume with the "
            "same options of rule, penalties and estimator, or start a new run in another log_dir"
        )


def _remembered(training: Parts) -> Any:
    """The memory of an estimator; empty if batches have custom types.

    A checkpoint contains plain containers only, so reading it executes no code; with custom
    types the estimator restarts on resuming.
    """
    memory = None if training.fused.whole is None else training.fused.whole.estimates.memory
    return memory if plain(memory) else None


def _frozen_params(training: Parts) -> dict[str, Tensor]:
    """Frozen parameters, which a resumed run needs too."""
    named = training.steps.inner.named_parameters()
    return {n: p.detach() for n, p in named if not p.requires_grad}


def _placed(training: Parts, run: RunState) -> list[tuple[Tensor, Placement]]:
    """The tensors of a run with their places."""
    return list(zip(leaves(run), training.steps.shards.places(run), strict=True))


def _snapshots(
    training: Parts, change: Callable[[Tensor, Placement], Tensor], state: dict[str, list[Tensor]]
) -> dict[str, list[Tensor]]:
    """The snapshots, whole or this rank's shards."""
    sharded = training.group.sharded
    weights = [Placement(i) if sharded else Placement() for i in range(len(state["good"]))]
    places = [*weights, *[Placement()] * len(state["buffers"])]
    known = {"good": weights, "buffers": places[len(weights) :], "candidate": places}
    return {
        name: [change(t, place) for t, place in zip(tensors, known[name], strict=False)]
        for name, tensors in state.items()
    }
