"""The engine of an optimizer's run: tuning, snapshots and rewinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selftune._gathered import reshard
from selftune.control import (
    Action,
    Controller,
    Hypergradient,
    TrainingLoss,
    ValidationLoss,
)
from selftune.method import Outer
from selftune.method.slopes import Slopes
from selftune.monitor import Monitor, marks
from selftune.optim._block import Block, Look
from selftune.optim._buffers import Buffers
from selftune.optim._closures import ClosureSteps
from selftune.optim._masks import apply_masks
from selftune.optim._shown import Restored, Shown
from selftune.optim._stepper import Stepper
from selftune.optim._store import Store
from selftune.rules._base import Values

LAPSE = 2
"""Intervals without a ``hyper_step`` after which no more are expected."""
SEARCHES = 16
"""Validation passes that look for modules, while there are trained parameters none has used."""


@dataclass(kw_only=True)
class Engine:
    """The parts of a run and their interactions, independent of torch's interface.

    Attributes:
        share: Minimum share of the weights with sensitivities.
        snapshots: Storage of the last good weights.
    """

    store: Store
    controller: Controller
    every: int
    buffers: Buffers
    monitor: Monitor
    stepper: Stepper
    share: float = 1.0
    snapshots: str | None = None
    training_signal: Tensor | None = None
    unused: set[int] | None = None  # trained tensors without a gradient so far, by place
    unreached: set[Tensor] | None = None  # those on which no validation loss depended so far
    searches: int = 0
    slopes: Slopes = field(default_factory=Slopes)
    whole: ClosureSteps | None = None
    first_loss_seen: bool = False  # at the first validation batch
    shown: Shown | None = None  # by ``averaged`` or ``eval``
    restored: Restored | None = None  # by ``load_state_dict``, until training continues
    identity: Mapping[str, Any] = field(default_factory=dict)  # settings of the run
    looks: dict[Tensor, Look] = field(default_factory=dict)  # at parameters with exact zeros

    def __post_init__(self) -> None:
        """Name the parts of the store."""
        store = self.store
        self.method, self.shifts = store.method, store.shifts
        self.reducer = self.stepper.reducer = store.reducer
        self.clock = store.clock

    @property
    def blocks(self) -> list[Block]:
        """One block for each trained parameter group."""
        return self.store.blocks

    @property
    def params(self) -> list[Tensor]:
        return [p for block in self.blocks for p in block.params]

    @property
    def stride(self) -> int:
        """Steps between two tracked steps."""
        return self.method.sensitivities.estimator.stride

    @property
    def lapsed(self) -> bool:
        """Whether ``hyper_step`` is no longer called, so that there are no validation passes."""
        clock = self.clock
        usual = max(self.every, clock.longest_gap)
        return 0 < clock.last_validation_step < clock.steps - LAPSE * usual

    @property
    def known(self) -> bool:
        """Whether a first validation loss was seen, and all layers of a loaded run are found."""
        return self.first_loss_seen and self.buffers.complete

    @property
    def searching(self) -> bool:
        """Whether a closure may call modules for the first time: it may alternate between some."""
        return self.buffers.grown or (bool(self.unreached) and self.searches < SEARCHES)

    def places_of(self, params: Collection[Tensor]) -> list[int]:
        return [place for place, p in enumerate(self.params) if p in params]

    def reached(self, params: Iterable[Tensor]) -> None:
        """Record the parameters on which a validation loss depends."""
        if self.unreached is None or self.unreached:
            left = set(self.params) if self.unreached is None else self.unreached
            self.unreached, self.searches = left.difference(params), self.searches + 1

    def notice_growth(self) -> bool:
        """Record tensors that got their first gradient; return whether modules may have joined."""
        ages = [age for block in self.blocks for age in block.ages()]
        young = {i for i, age in enumerate(ages) if not age}
        if self.unused is None:
            self.unused = young if len(young) < len(ages) else None  # all: after a rewind
        elif not self.unused <= young:
            self.unused = self.unused & young
            self.buffers.grow()
        return self.buffers.grown

    def due(self, total: int | None) -> tuple[bool, bool]:
        """Whether a hyperparameter step is due, and whether to select the final weights."""
        clock, final = self.clock, self.controller.final
        if self.controller.sweeping:
            return False, False
        step = clock.steps - max(clock.outer, clock.since) >= self.every
        period = clock.steps - clock.last_validation_step
        return (
            step and not final.over(clock.steps, total, self.every),
            self.method.settings.final_weights
            and final.due(clock.steps, period, total, self.every),
        )

    def begin(self) -> None:
        if self.buffers.shown:
            return
        for block in self.blocks:
            block.begin()
        self.buffers.begin()

    def forget(self) -> None:
        """Drop the state over the weights: before the first step, or at the choice of a rule."""
        store = self.store
        store.blocks, store.displacement, store.stiffness = [], None, None
        self.training_signal = None
        self.stepper.forget()

    @contextmanager
    def masks_applied(self) -> Iterator[None]:
        """Applies masks within a block, for a look at the weights that does not change the run."""
        looks, kept = dict(self.looks), list[tuple[Tensor, Tensor]]()
        self.apply_masks(kept)
        yield
        self.looks = looks
        for tensor, value in kept:
            tensor.copy_(value)

    def apply_masks(self, kept: list[tuple[Tensor, Tensor]] | None = None) -> None:
        """Apply masks and frozen parameters to averages and snapshots."""
        penalties = self.method.sensitivities.update.penalties
        thresholded = any(p.proximal for p in penalties)
        steps = max((age for block in self.blocks for age in block.ages()), default=0.0)
        for block in () if self.buffers.shown else self.blocks:
            apply_masks(
                block, self.looks, self.clock.steps, steps, thresholded=thresholded, kept=kept
            )

    def sync(self) -> None:
        self.begin()
        store = self.store
        if store.displacement is not None:
            store.displacement = store.displacement.rewound([], self.clock.steps)
        if store.stiffness is not None:
            store.stiffness = store.stiffness.rewound()
        for secants in (s for block in self.blocks for s in block.secants):
            secants.forget()  # changes of the gradient between other weights
        self.slopes.forget()
        self.first_loss_seen = False
        self.controller.restart()

    def training_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Each parameter and its training weights, if others are in place."""
        if self.shown is not None:
            return self.shown.saved()
        if self.restored is not None and self.restored.changed:
            return self.restored.saved()
        return []

    # hyperparameter steps

    def training_only_step(self, grads: Sequence[Tensor]) -> bool:
        """Use a training gradient with the averaged sensitivities instead of a validation gradient.

        The sensitivities do not include its batch yet, so within the first epoch it is an unbiased
        outer gradient; it cannot tune regularizers.
        """
        regularizers = self.method.sensitivities.update.regularizers
        names = [n for n in self.shifts.names if n not in regularizers]
        if self.whole is not None or not names:  # whole-step estimates cost too much
            return False
        total = self.reducer.total
        signal = total(self.method.along(self.store.state(), self._outer(grads, 0)))
        known = self.training_signal
        self.training_signal = signal if known is None else known + signal
        if self.clock.steps - self.clock.outer < self.every:
            return False
        self.clock.outer = self.clock.steps
        signal = self.method.unit(self.training_signal, grads, total)
        self.training_signal = None
        self.apply_masks()
        averages = [b.part.average for b in self.blocks]
        guard = self.controller.guard
        due = self.clock.steps % (10 * self.every) < self.every  # no losses to select good weights
        if (
            due
            and not (guard is not None and guard.lost)
            and math.isfinite(self.store.total([a.sum() for a in averages]))
        ):
            self.carry_out(Action(snapshot="average"))
        return self.tune(signal, names)

    def _outer(self, grads: Sequence[Tensor], gone: int) -> Outer:
        values = [c.tensor_values for c in self.store.cached]
        return Outer(grads, values, self.clock.steps, gone)

    def outer_step(
        self,
        loss: float,
        grads: Sequence[Sequence[Tensor]],
        values: Sequence[Values],
        compare: Callable[[], tuple[float, float, float]],
    ) -> bool:
        """Take a hyperparameter step from outer gradients; return whether values changed.

        ``grads`` has the result of :meth:`taken` for each parameter of every block; ``compare``
        returns mean losses at the averaged and at the good weights over many batches, and the
        standard error of their difference.
        """
        gone = self.clock.steps - max(self.clock.outer, self.clock.since)
        self.clock.outer = self.clock.steps
        if self.carry_out(self.controller.observe(ValidationLoss(loss, compare))):
            return True
        if not self.shifts.rows:
            return False
        if self.whole is not None:
            joined = self._mean(self.blocks[0].layout.flatten(grads[0]))
            whole_signal = self.whole.signal(self.blocks[0], values[0], joined)
            if whole_signal is None:
                return False
            signal = self.reducer.outer(whole_signal)
        else:
            pairs = zip(self.blocks, grads, strict=True)
            outer = self._outer([self._mean(b.cut.rooted(b.joined(g))) for b, g in pairs], gone)
            state, signal = self.method.hypergradient(self.store.state(), outer)
            self.store.take(state)
        return self.tune(signal, self.shifts.names)

    def taken(self, block: Block, index: int, grad: Tensor) -> Tensor:
        """The needed part of an outer gradient: a slice, or all of it for whole-step estimators."""
        piece = block.piece(index, grad)
        return piece if block.cut.stride == 1 else piece.clone()  # frees the rest

    def _mean(self, grads: Tensor) -> Tensor:
        """Mean over processes, so that the norm is that of the mean gradient; shards unchanged."""
        return grads if self.reducer.sharded else self.reducer.mean(grads)

    def tune(self, signal: Tensor, names: Sequence[str]) -> bool:
        """Step the named hyperparameters if the hypergradient is finite."""
        finite = bool(torch.isfinite(signal).all())
        action = self.controller.observe(Hypergradient(finite))
        if not finite:
            return self.carry_out(action)
        weights, step = [b.scaled(b.params) for b in self.blocks], self.clock.steps
        state, square = self.method.hyper_step(
            self.store.state(), self.shifts.gather(signal), weights, self.shifts.frame(),
            torch.tensor([step], device="cpu"), memory=self.shifts.memory, steps=step,
            moving=names, propose=self.shifts.propose,
        )  # fmt: skip
        self.store.take(state)
        self.shifts.take(state.hyper)
        if square is not None and not math.isnan(float(square)):  # before the first segment ends
            self.monitor.scalar("weights/displacement", square.sqrt(), step)
        return True

    def report(self, loss: float) -> bool:
        if self.clock.since == self.clock.steps:  # the loss is from before a rewind
            return False
        return self.carry_out(self.controller.observe(TrainingLoss(loss)))

    # actions of the controller

    def carry_out(self, action: Action) -> bool:
        """Carry out an action: snapshot and rewind; return whether hyperparameters changed."""
        if action.snapshot:
            for block in self.blocks:
                block.snapshot(action.snapshot)
            self.buffers.snapshot(action.snapshot)
        if action.rewind is None:
            if action.skip:
                self.buffers.mend()
            return False
        step = self.clock.steps
        self.apply_masks()
        for block in self.blocks:
            block.go_back(swept=action.planned)
        reshard()
        averages = [b.part.average for b in self.blocks]
        state = self.method.rewind(self.store.state(), averages, step)
        self.store.take(state)
        for block, part in zip(self.blocks, state.parts, strict=True):
            block.rewound(part)
        self.stepper.forget()
        if self.whole is not None:
            self.whole.forget()
        self.buffers.restore()
        self.training_signal = None
        self.slopes.forget()
        self.clock.since = step
        self.shifts.forget()
        if action.diverged:
            self.shifts.take(self.shifts.state.diverged())
        self.shifts.move(action.rewind)
        self.controller.announce(action, step)
        guard = self.controller.guard
        if action.reason and guard is not None:
            self.monitor.scalar("weights/rewinds", guard.rewinds, step)
            self.mark(action.rewind)
        return True

    def mark(self, names: Iterable[str], *, given: bool = False) -> None:
        """Mark an event in the charts of the hyperparameters that it changed.

        Names that are not tuned are ignored; ``given`` marks the given values too, at the start.
        """
        rows, tuned = {n: r for n, r in self.shifts.rows.items() if n in names}, self.shifts.tuned
        if given:
            self.monitor.scalars(marks(tuned, {n: r.given for n, r in rows.items()}), 0)
        values = {n: r.values().tolist() for n, r in rows.items()}
        self.monitor.scalars(marks(tuned, values), self.clock.steps)
