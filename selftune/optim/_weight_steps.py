"""The weight steps of an optimizer's run: in place if possible, otherwise pure.

In place, torch's kernel or another optimizer steps the parameters, and a tracked step is recorded
over slices only, without allocations of the size of the weights. The pure step handles all other
cases: gradients that are missing or not finite, half precision, GPUs and shards, penalties, a
hyperparameter for each tensor, and whole-step estimators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from selftune._flat import local
from selftune.control import Action, Activity, Gradient, SweepSlope
from selftune.method import Moment, fast_path, live_units
from selftune.method.slopes import sharded
from selftune.optim._block import Block
from selftune.optim._closures import Call
from selftune.optim._engine import Engine
from selftune.optim._store import Grads
from selftune.rules._base import Values
from selftune.update import Clock, Transition

THINNED = 5  # steps between two samples of BatchNorm statistics in their average
TRAINING_ONLY_AFTER = 50  # steps without a hyper_step after which training gradients serve instead


class WeightSteps:
    """Takes weight steps, including those of the sweep.

    Args:
        values: Options and hyperparameters of every block.
        rates: Factor of the schedule for every block.
        call: Computes gradients at other weights, for an estimator that needs them.
        raised: Whether the learning rate is raised from outside, which ends the sweep.

    Attributes:
        factors: Factors of the peaks of the learning rates, for every block.
    """

    def __init__(
        self,
        engine: Engine,
        values: Sequence[Values],
        rates: Sequence[float],
        call: Call | None = None,
        *,
        raised: bool = False,
    ) -> None:
        self._engine, self._store, self._call = engine, engine.store, call
        self._raised = raised
        self._values, self.factors = values, rates
        self._grads: Grads = []

    def take(self) -> bool:
        """Take a step from the gradients in ``.grad``; return whether hyperparameters changed."""
        engine = self._engine
        plain = None
        if engine.whole is None:
            plain = engine.stepper.ready(engine.blocks, self._values)
        if plain is None:
            self._gather()  # rejects unsupported gradients before counting the step
        engine.clock.steps += 1
        if engine.controller.sweeping:
            return self._sweep(plain)
        if plain is None:
            return self._pure()
        if self._pulse:
            action = self._observe_activity([g for grads in plain for g in grads])
            if action.skip:
                return engine.carry_out(action)
        if engine.controller.guard is not None:
            engine.controller.guard.gradient(finite=True)
        changed = self._training_only(plain)
        if engine.clock.since == engine.clock.steps:  # rewound
            return True
        self._in_place(plain, tracked=self._age % engine.stride == 0)
        self._blend_buffers()
        return changed

    @property
    def _blocks(self) -> list[Block]:
        return self._engine.blocks

    @property
    def _age(self) -> int:
        return self._engine.clock.steps - self._engine.clock.since

    @property
    def _pulse(self) -> bool:
        guard = self._engine.controller.guard
        return guard is not None and guard.policy.counts(self._age, self._engine.stride)

    def _observe_activity(self, grads: Sequence[Tensor]) -> Action:
        # `zero_grad(set_to_none=False)` leaves zeros in frozen layers, which are not dead.
        params = (p for block in self._blocks for p in block.params)
        present = [p.requires_grad and p.grad is not None for p in params]
        live = self._store.reducer.total(live_units(grads, present)).tolist()
        record = Activity(live, self._age, self._engine.shifts.climb)
        return self._engine.controller.observe(record)

    def _blend_buffers(self) -> None:
        engine = self._engine
        if engine.clock.steps % THINNED == 0:
            averaging = engine.method.sensitivities.averaging
            engine.buffers.blend(averaging.weight(self._age, THINNED), engine.lapsed)

    def _training_only(self, plain: Sequence[Sequence[Tensor]] | None) -> bool:
        """Use training gradients if there are no validation gradients."""
        engine, clock = self._engine, self._engine.clock
        if clock.last_validation_step or clock.steps <= TRAINING_ONLY_AFTER:
            return False
        if plain is None:
            return engine.training_only_step(engine.method.cut([g for g, _ in self._grads]))
        pairs = zip(self._blocks, self._descending(plain), strict=True)
        return engine.training_only_step([block.scaled(g) for block, g in pairs])

    def _descending(self, grads: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Gradients of the minimised loss, block by block; negated with ``maximize``."""
        return [
            [-g for g in some] if v.get("maximize") else list(some)
            for v, some in zip(self._values, grads, strict=True)
        ]

    # in place

    def _in_place(self, grads: Sequence[Sequence[Tensor]], *, tracked: bool) -> None:
        engine, rates = self._engine, self.factors
        if not tracked:
            step = engine.clock.steps - 1
            pairs = zip(self._values, rates, strict=True)
            moments = [Moment(v, {}, Clock(step, rate), 0.0) for v, rate in pairs]
            engine.stepper.step(self._blocks, grads, moments, tracked=False)
            return
        moments = self._store.moments([None] * len(grads), self._values, rates)
        steps = engine.stepper.step(self._blocks, grads, moments, tracked=True)
        self._store.take(engine.method.track(self._store.state(), steps, moments))
        for block, moment in zip(self._blocks, moments, strict=True):
            block.average_towards(moment.share)

    # pure

    def _gather(self) -> None:
        """Concatenated gradients of every block, and which tensors have one."""
        gradients = [b.gradient() for b in self._blocks]
        self._grads = [
            (-g if v.get("maximize") else g, counted)
            for v, (g, counted) in zip(self._values, gradients, strict=True)
        ]
        if self._call is not None and self._grads[0][1] is not None:
            raise ValueError("estimator: every parameter needs a gradient at every step")

    def _move(self) -> tuple[list[Moment], list[Transition]]:
        moments = self._store.moments([c for _, c in self._grads], self._values, self.factors)
        return moments, self._engine.stepper.move(
            self._blocks, [g for g, _ in self._grads], moments
        )

    def _pure(self) -> bool:
        engine, grads = self._engine, self._grads
        # Irreversible steps are checked in advance, others afterwards.
        commits = engine.stepper.commits
        if commits or self._pulse:
            action = self._judge()
            if action.skip:
                return engine.carry_out(action)
        changed = commits and self._training_only(None)
        if engine.clock.since == engine.clock.steps:  # rewound
            return True
        moments, steps = self._move()
        finite = self._finite(steps)
        if finite is not None:
            action = engine.controller.observe(Gradient(finite))
            if not finite:  # the step is skipped
                return engine.carry_out(action)
        if not commits:
            changed = self._training_only(None)
            if engine.clock.since == engine.clock.steps:
                return True
        if engine.whole is not None and self._call is not None:
            engine.whole.observe(
                self._blocks[0], self._values[0], grads[0][0], steps[0], self._call
            )
        tracked = self._age % engine.stride == 0
        self._store.absorb(steps, moments, [c for _, c in grads], tracked=tracked)
        self._blend_buffers()
        return changed

    def _finite(self, steps: Sequence[Transition]) -> bool | None:
        """Whether a step is finite; None if unknown, because a GPU would synchronise."""
        if steps[0].moved.is_cuda and not self._pulse:
            return None
        return math.isfinite(self._store.total([s.moved.sum() for s in steps]))

    def _judge(self) -> Action:
        """Judge gradients before the step: whether they are finite, and how many units are live."""
        controller, grads = self._engine.controller, self._grads
        if grads[0][0].is_cuda and not self._pulse:
            return Action()
        finite = self._finite_gradients()
        if controller.guard is None:
            return Action(skip=not finite)
        action = controller.observe(Gradient(finite))
        if finite and self._pulse:
            action = self._observe_activity(self._shaped())
        return action

    def _finite_gradients(self) -> bool:
        return math.isfinite(self._store.total([*fast_path.norms([g for g, _ in self._grads])]))

    # the sweep

    def _sweep(self, plain: Sequence[Sequence[Tensor]] | None) -> bool:
        engine, sweep = self._engine, self._engine.controller.sweep
        assert sweep is not None
        if self._raised and sweep.taken:
            return engine.carry_out(engine.controller.leave_sweep())
        if plain is None and not self._finite_gradients():
            action = engine.controller.observe(Gradient(False))
            if action.skip:
                return engine.carry_out(action)
        some = [] if plain is None else self._descending(plain)
        grads = self._shaped() if plain is None else [g for each in some for g in each]
        if not sweep.taken:
            self._observe_activity(grads)
        weights = [local(p) for b in self._blocks for p in b.params]
        cuts = sharded(engine.params) if engine.reducer.sharded else None
        slopes = engine.slopes.along(grads, weights, engine.reducer.total, cuts)
        if slopes is not None:
            rule = engine.method.sensitivities.update.rule
            gain = max(rule.initial_gain(v, sweep.taken) for v in self._values)
            record = SweepSlope(slopes[1], engine.shifts.values(), slopes[0], gain)
            if engine.carry_out(engine.controller.observe(record)):
                if sweep.ended:
                    swept, middles = engine.controller.swept, engine.shifts.middles()
                    swept.update((n, v) for n, v in middles.items() if n in swept)
                    engine.mark(engine.controller.swept, given=True)
                return True
        self.factors = [sweep.factor(sweep.taken)] * len(self._blocks)
        if plain is not None:
            self._in_place(plain, tracked=False)
        else:
            moments, steps = self._move()
            self._store.absorb(steps, moments, [c for _, c in self._grads], tracked=False)
        sweep.taken += 1
        return False

    def _shaped(self) -> list[Tensor]:
        """The concatenated gradients, in the shapes of the parameters."""
        pairs = zip(self._blocks, self._grads, strict=True)
        return [t for b, (g, _) in pairs for t in b.layout.views(g)]
