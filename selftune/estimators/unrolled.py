"""Truncated reverse mode through the last steps of training."""

from __future__ import annotations

import itertools
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune._arguments import COUNT, NONE, check
from selftune.estimators._base import AbstractEstimator, Estimate
from selftune.problem import Hparams, Point, Problem
from selftune.update import Update

log = logging.getLogger("selftune")


class Passed(NamedTuple):
    """A step that was taken.

    Attributes:
        point: The point before the step; without a checkpoint only its batch and clock.
        hparams: Its hyperparameters.
    """

    point: Point
    hparams: dict[str, Tensor]


@dataclass(frozen=True)
class Unrolled(AbstractEstimator):
    """``dL_val/dh`` by reverse mode through the last K steps; exact if K covers the run.

    Costs one Hessian-vector product per step for any number of hyperparameters, and memory for
    weights, gradients and rule state of K steps; with ``checkpoint`` c, of K/c steps plus c during
    the reverse pass, and each step is computed twice.

    With ``share`` W, ``Estimate.windows`` also contains the hypergradient of each window of W
    steps, the mean over its steps: for schedules that are tuned as a whole, not greedily.

    Args:
        horizon: K, or None for all steps.
        checkpoint: c: the weights of every c-th step are kept, the others recomputed.
        share: W, or None.

    Raises:
        ValueError: A number is below 1.
        MemoryError: The horizon does not fit into memory; raised before the first step.

    Source: Franceschi et al. 2017, section 3.1; truncation: Shaban et al. 2019; checkpoints:
    Chen et al. 2016; sharing: Micaelli & Storkey 2021, eq. 6.
    """

    horizon: int | None = None
    checkpoint: int = 1
    share: int | None = None

    def __post_init__(self) -> None:
        limits = dict.fromkeys(("horizon", "share"), COUNT | NONE)
        check({**limits, "checkpoint": COUNT}, vars(self))

    def check(self, update: Update, names: Sequence[str], *, endless: bool = False) -> None:
        """Raise an error for an unlimited horizon in a training run."""
        if endless and self.horizon is None:
            raise ValueError("horizon=None keeps every step of a run: give Unrolled a horizon")

    def memory(self, start: Point) -> int:
        """Bytes for weights, gradients and rule state of the horizon; 0 steps if unlimited."""
        tensors = [start.params, start.params, *start.state.values()]
        kept = 0 if self.horizon is None else -(-self.horizon // self.checkpoint)
        again = self.checkpoint if self.checkpoint > 1 else 0
        return (kept + again) * sum(t.numel() * t.element_size() for t in tensors)

    def init(self, problem: Problem, start: Point, hparams: Hparams) -> tuple[Passed, ...]:
        """The empty memory; logs the bytes that the horizon needs."""
        needed, there = self.memory(start), _free(start.params.device)
        if self.horizon is not None:
            log.info(
                "Unrolled(%d) keeps %.3g GB of weights, gradients and rule state",
                self.horizon, needed / 1e9,
            )  # fmt: skip
        if needed > there:
            raise MemoryError(
                f"horizon={self.horizon} keeps {needed / 1e9:.3g} GB of weights, gradients and "
                f"rule state, but only {there / 1e9:.3g} GB are free: use a shorter one, "
                f"checkpoint={max(2, round((self.horizon or 1) ** 0.5))}, or Forward or Implicit"
            )
        return ()

    def observe(
        self, problem: Problem, memory: tuple[Passed, ...], point: Point, hparams: Hparams
    ) -> tuple[Passed, ...]:
        """Store the step, and drop steps before the horizon."""
        problem.products.prepare(point.params, hparams, point.batch)
        if self.checkpoint == 1:
            memory = (*memory, Passed(point, dict(hparams)))
            return memory if self.horizon is None else memory[-self.horizon :]
        starts = [i for i, passed in enumerate(memory) if passed.point.params.numel()]
        if memory and len(memory) - starts[-1] < self.checkpoint:
            point = point._replace(params=point.params.new_empty(0), state={}, grads=None)
        else:
            starts.append(len(memory))
        memory = (*memory, Passed(point, dict(hparams)))
        if self.horizon is None:
            return memory
        return memory[max(i for i in starts if i == 0 or len(memory) - i >= self.horizon) :]

    def estimate(
        self,
        problem: Problem,
        memory: tuple[Passed, ...],
        end: Point,
        hparams: Hparams,
        outer_grads: Tensor,
    ) -> Estimate:
        """Reverse mode through the stored steps."""
        cotangent = (outer_grads, {k: torch.zeros_like(v) for k, v in end.state.items()})

        def last(point: Point, values: Hparams, cotangent: Any) -> dict[str, Tensor]:
            return problem.pull(point, values, cotangent)[1]

        pull, reach = problem.graph("pull", problem.pull), problem.graph("last pull", last)
        steps: list[dict[str, Tensor]] = []
        left = len(memory) if self.horizon is None else min(self.horizon, len(memory))
        for passed in reversed(self._stretches(memory)):
            for point, values in reversed(self._points(problem, passed)):
                if left == len(steps):
                    break
                if left == len(steps) + 1:  # first of the horizon
                    steps.append(reach(point, values, cotangent))
                    continue
                cotangent, grads = pull(point, values, cotangent)
                steps.append(grads)
        if not steps:
            raise ValueError("no step was observed: there is nothing to differentiate")
        stacked = {n: torch.stack([s[n] for s in reversed(steps)]) for n in hparams}
        windows = None
        if self.share is not None:
            parts = {n: s.split(self.share) for n, s in stacked.items()}
            windows = {n: torch.stack([p.mean(0) for p in ps]) for n, ps in parts.items()}
        return Estimate({n: s.sum(0) for n, s in stacked.items()}, windows=windows)

    @staticmethod
    def _stretches(memory: tuple[Passed, ...]) -> list[list[Passed]]:
        """The steps, grouped by checkpoint."""
        stretches: list[list[Passed]] = []
        for passed in memory:
            if passed.point.params.numel():
                stretches.append([])
            stretches[-1].append(passed)
        return stretches

    @staticmethod
    def _points(problem: Problem, stretch: list[Passed]) -> list[tuple[Point, Hparams]]:
        """Points of a segment; those between checkpoints are computed again."""
        step, gradient = problem.graph("step", problem.step), problem.graph("g", problem.gradient)
        point = stretch[0].point
        points: list[tuple[Point, Hparams]] = [(point, stretch[0].hparams)]
        for before, passed in itertools.pairwise(stretch):
            at, point = passed.point, step(point, before.hparams)
            point = point._replace(batch=at.batch, clock=at.clock, options=at.options)
            point = point._replace(grads=gradient(point, passed.hparams))
            points.append((point, passed.hparams))
        return points


def _free(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    if not known.exists():
        return sys.maxsize  # unknown: nothing is refused
    match = re.search(r"MemAvailable:\s+(\d+) kB", known.read_text())
    return int(match[1]) * 1024 if match else sys.maxsize


__all__ = ["Passed", "Unrolled"]
