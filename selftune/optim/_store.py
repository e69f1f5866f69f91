"""The blocks of an optimizer's run, and the method's state over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selftune.method import Displacement, Method, Moment, State
from selftune.method.stiff_directions import Stiffness
from selftune.optim._block import Block
from selftune.optim._groups import Cached
from selftune.optim._reducer import Reducer
from selftune.optim._shifts import Shifts
from selftune.rules._base import Values
from selftune.update import Clock, Transition

Counted = Sequence[bool] | None
"""Which tensors of a block have a gradient; None: all."""
Grads = Sequence[tuple[Tensor, Counted]]
"""Concatenated gradients of every block, and which of its tensors have one."""


@dataclass(kw_only=True)
class Counts:
    """Step counts of a run.

    Attributes:
        steps: Training steps taken, including skipped ones and those of the sweep.
        since: Steps at the last restart (after the sweep or a rewind).
        outer: Steps at the last hyperparameter step.
        last_validation_step: Steps at the last call of ``hyper_step``.
        longest_gap: Largest number of steps between two calls of ``hyper_step``.
    """

    steps: int = 0
    since: int = 0
    outer: int = 0
    last_validation_step: int = 0
    longest_gap: int = 0

    def called(self) -> None:
        if self.last_validation_step:
            gap = self.steps - self.last_validation_step
            self.longest_gap = max(self.longest_gap, gap)
        self.last_validation_step = self.steps


@dataclass(kw_only=True)
class Store:
    """Holds the method's state in the blocks, whose tensors torch saves.

    Attributes:
        blocks: One block for each trained parameter group.
        cached: Their tuned values.
        displacement: State of the displacement, except for tensors in the blocks.
        stiffness: State of the stiff directions.
    """

    method: Method
    shifts: Shifts
    reducer: Reducer
    clock: Counts = field(default_factory=Counts)
    blocks: list[Block] = field(default_factory=list)
    cached: Sequence[Cached] = field(default_factory=list)
    displacement: Displacement | None = None
    stiffness: Stiffness | None = None

    def lay_out(self, blocks: list[Block], slots: int, *, by_tensor: bool) -> None:
        self.blocks = blocks
        self.method.slices = [b.cut for b in blocks]
        self.method.pieces = [b.pieces for b in blocks]
        self.method.by_tensor = by_tensor
        self.method.hyper = self.shifts.hyper
        step = torch.full((1,), self.clock.since, device="cpu")
        if self.displacement is None:
            self.displacement = Displacement.begin([], step)
        if self.stiffness is None or len(self.stiffness.rises) != slots:
            self.stiffness = Stiffness.begin(slots, blocks[0].layout.device)

    def state(self) -> State:
        blocks, method = self.blocks, self.method
        assert self.displacement is not None
        assert self.stiffness is not None
        displacement = self.displacement._replace(
            centre=[b.centre for b in blocks], mark=[b.mark for b in blocks]
        )
        limited = method.guarded and method.settings.displacement is not None
        secants = [s for b in blocks for s in b.secants]
        return State(
            [b.part for b in blocks], self.shifts.state, [displacement] if limited else [],
            secants, [self.stiffness] if secants else [],
        )  # fmt: skip

    def take(self, state: State) -> None:
        """Replace the state outside the blocks."""
        for displacement in state.displacement:
            self.displacement = displacement._replace(centre=[], mark=[])
        for stiffness in state.stiffness:
            self.stiffness = stiffness

    def moments(
        self, counts: Sequence[Counted], values: Sequence[Values], rates: Sequence[float]
    ) -> list[Moment]:
        """Time and hyperparameters of the step of every block."""
        rows, age = self.method.sensitivities, self.clock.steps - self.clock.since
        share = rows.averaging.weight(age, rows.estimator.stride)
        moments = []
        for block, cached, value, rate, counted in zip(
            self.blocks, self.cached, values, rates, counts, strict=True
        ):
            ages, layout = block.ages(), block.layout
            clock = Clock(self.clock.steps - 1, rate, layout.expand(ages))
            moment = Moment(value, cached.slopes, clock, share)
            differ = (*cached.values.values(), clock.age)
            if counted is not None or any(isinstance(v, Tensor) for v in differ):
                moment = self._by_tensor(moment, block, cached, ages, counted)
            moments.append(moment)
        return moments

    @staticmethod
    def _by_tensor(
        moment: Moment,
        block: Block,
        cached: Cached,
        ages: list[float],
        counted: Sequence[bool] | None,
    ) -> Moment:
        """The moment if tensors differ, or some do not take part."""
        layout, mask, unit_mask = block.layout, None, None
        if counted is not None:
            unit_mask = torch.tensor(counted, device=layout.device)
            full = layout.expand([float(c) for c in counted])
            mask = full.bool() if isinstance(full, Tensor) else unit_mask.all()
        unit = Moment(
            {**moment.values, **cached.tensor_values}, cached.tensor_slopes,
            moment.clock._replace(age=torch.tensor(ages, dtype=layout.dtype, device=layout.device)),
            moment.share, unit_mask,
        )  # fmt: skip
        return moment._replace(mask=mask, unit=unit)

    def absorb(
        self,
        steps: list[Transition],
        moments: list[Moment],
        counts: Sequence[Counted],
        *,
        tracked: bool,
    ) -> None:
        """Apply proposed steps, and write the weights."""
        state = self.method.weight_step(self.state(), steps, moments, tracked=tracked)
        self.take(state)
        for block, part, step, counted in zip(self.blocks, state.parts, steps, counts, strict=True):
            block.write(part, step.moved, counted)

    def total(self, parts: Sequence[Tensor]) -> float:
        """The sum over blocks, and over processes that hold parts of the parameters."""
        whole = parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum()
        return float(self.reducer.total(whole))
