"""The contents of a checkpoint of a tuner's run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from selftune._identity import differences
from selftune._trees import leaves
from selftune.tuner import _choice
from selftune.tuner._checkpoints import plain
from selftune.tuner._compiled import Fused
from selftune.tuner._data import Stream
from selftune.tuner._population import Population
from selftune.tuner._randomness import restore, snapshot
from selftune.tuner._run_state import RunState
from selftune.tuner._shards import Place
from selftune.tuner._snapshots import Snapshots
from selftune.tuner._steps import Steps
from selftune.tuner._watch import Watch


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The stateful parts of a run, and the settings that must be equal to resume it."""

    steps: Steps
    fused: Fused
    train: Stream
    val: Stream
    snapshots: Snapshots
    watch: Watch
    population: Population | None
    identity: dict[str, Any]

    def pack(self) -> dict[str, Any]:
        """Their state as tensors, numbers and plain containers; called on all ranks."""
        shards = self.steps.shards
        return {
            "identity": self.identity,
            "leaves": [shards.whole(t, p) for t, p in self._placed(self.fused.run)],
            "frozen": {n: shards.whole_param(p) for n, p in self._frozen_params().items()},
            "chosen": None if self.steps.chosen is None else tuple(self.steps.chosen),
            "whole": self._remembered(),
            "snapshots": self._snapshots(shards.whole, self.snapshots.state_dict()),
            "watch": self.watch.state_dict(),
            "population": None if self.population is None else self.population.state_dict(),
            **self.position(),
            "group": self.steps.group.state_dict(),
        }

    def position(self) -> dict[str, Any]:
        """The positions of the batches and the random states."""
        train, val = self.train.state_dict(), self.val.state_dict()
        return {"train": train, "val": val, "random": snapshot()}

    @torch.no_grad()
    def unpack(self, state: dict[str, Any], but: Sequence[str] = ()) -> None:
        """Continue from a packed state.

        Args:
            state: The return value of ``pack``.
            but: Names of settings that may differ.

        Raises:
            ValueError: It belongs to another run; nothing was changed.
        """
        self._check(state, but)
        _choice.restore(self.steps, self.fused, state.get("chosen"))
        device, shards = self.fused.run.step.device, self.steps.shards
        for (leaf, place), saved in zip(self._placed(self.fused.run), state["leaves"], strict=True):
            leaf.copy_(shards.shard(saved, place))
        for name, param in self._frozen_params().items():
            shards.load_param(param, state["frozen"][name])
        if self.fused.whole is not None:
            self.fused.whole.whole.memory = tree_map_only(
                Tensor, lambda t: t.to(device), state["whole"]
            )
        self.snapshots.load_state_dict(self._snapshots(shards.shard, state["snapshots"]))
        self.watch.load_state_dict(state["watch"])
        if self.population is not None:
            self.population.load_state_dict(state["population"])
        streams = ((self.train, state["train"]), (self.val, state["val"]))
        for stream, saved in streams:
            stream.load_state_dict(saved)
        restore(state["random"])
        for stream, saved in streams:
            stream.settle(saved)
        self.steps.group.load_state_dict(state["group"])

    def _check(self, state: dict[str, Any], but: Sequence[str]) -> None:
        saved, mine = (
            {n: v for n, v in side.items() if n not in but}
            for side in (state["identity"], self.identity)
        )
        other = differences(saved, mine)
        if other:
            raise ValueError(
                f"resume: the checkpoint is from another run: {'; '.join(other)}: resume with the "
                "same model and settings, or start a new run in another log_dir"
            )
        run, shards = (
            _choice.expected(self.steps, self.fused.run, state.get("chosen")),
            self.steps.shards,
        )
        shapes = [(shards.shape(t, place), t.dtype) for t, place in self._placed(run)]
        if shapes != [(t.shape, t.dtype) for t in state["leaves"]]:
            raise ValueError(
                "resume: the checkpoint's tensors do not match this run's: resume with the "
                "same options of rule, penalties, estimator and compile, or start a new run in "
                "another log_dir"
            )

    def _remembered(self) -> Any:
        """The memory of an estimator; empty if batches have custom types.

        A checkpoint contains plain containers only, so reading it executes no code; with custom
        types the estimator restarts on resuming.
        """
        memory = None if self.fused.whole is None else self.fused.whole.whole.memory
        return memory if plain(memory) else None

    def _frozen_params(self) -> dict[str, Tensor]:
        """Frozen parameters, which a resumed run needs too."""
        named = self.steps.inner.named_parameters()
        return {n: p.detach() for n, p in named if not p.requires_grad}

    def _placed(self, run: RunState) -> list[tuple[Tensor, Place]]:
        """The tensors of a run with their places."""
        return list(zip(leaves(run), self.steps.shards.places(run), strict=True))

    def _snapshots(
        self, change: Callable[[Tensor, Place], Tensor], state: dict[str, list[Tensor]]
    ) -> dict[str, list[Tensor]]:
        """The snapshots, whole or this rank's shards."""
        weights = self.steps.shards.of_weights(len(state["good"]))
        places = [*weights, *[Place()] * len(state["buffers"])]
        known = {"good": weights, "buffers": places[len(weights) :], "candidate": places}
        return {
            name: [change(t, place) for t, place in zip(tensors, known[name], strict=False)]
            for name, tensors in state.items()
        }
