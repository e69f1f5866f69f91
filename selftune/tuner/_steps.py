"""The steps of a tuner as pure functions of a tree of tensors: gradients, and the method.

A step maps a run to the next::

    run, record = steps.train(run, batch, tracked=True)  # a step of the weights
    run, record = steps.tune(run, outer_batch)           # a step of the hyperparameters

The same functions run eagerly, compiled into one graph each (``_compiled``) and mapped over a
population.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selftune._flat import Layout, local
from selftune._gradient import plainly
from selftune.estimators import AbstractEstimator
from selftune.method import HyperState, Method, Moment, Outer, State, choice, layers, live_units
from selftune.rules._base import ParameterOptions, hoist
from selftune.tuner._group import Group
from selftune.tuner._noise_scale import HalvedBatches
from selftune.tuner._passes import Passed, Passes, ShardedPasses
from selftune.tuner._run_state import Batch, RunState
from selftune.tuner._shards import Shards
from selftune.update import Clock


@dataclass(kw_only=True)
class Steps:
    """The parts of a step.

    Args:
        inner: The training objective, a module that takes a batch and returns the loss.
        outer: The validation objective over the same parameters and buffers.
        options: Options of the rule, and hyperparameters that are not tuned.
        rates: Factor of the schedule at each step of the run, shape (steps,), float64.
        every: Weight steps between two hyperparameter steps.
        autocast: Makes the context of the forward passes.
        whole_step_names: Names of the hyperparameters that it handles.
        layers: Buffers of the objective that contain hyperparameters, by name.
        strengths: Strengths of its layers that are not tuned, by name.
        joined: Whether all parameters, of one dtype, become views of one vector, so that one
            operation handles all tensors. Eager steps of small networks and compiling are faster.
        own: Each part's own values; empty if all parts share the same.
        group: The ranks, over whose batches gradients are averaged.
        chosen: The member that a mixture of rules has chosen.
        shards: The layout of the run's tensors over the ranks.
        halved: Takes some steps on both halves of their batch, or None.

    Attributes:
        params: Names of the trained parameters.
        layout: Layout of the vector, or None.
        buffers: Names of the buffers.
        carried: Positions of the buffers of the training pass that validation passes use too.
    """

    inner: nn.Module
    outer: nn.Module
    method: Method
    options: dict[str, Any]
    rates: Tensor
    every: int
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    whole: AbstractEstimator | None = None
    whole_step_names: Sequence[str] = ()
    layers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    strengths: Mapping[str, float] = field(default_factory=dict)
    joined: bool = False
    own: Sequence[ParameterOptions] = ()
    group: Group = field(default_factory=Group)
    chosen: choice.Chosen | None = None
    shards: Shards = field(default_factory=Shards)
    halved: HalvedBatches | None = None
    carried: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        named = [(n, p) for n, p in self.inner.named_parameters() if p.requires_grad]
        self.params, trained = [n for n, _ in named], [p for _, p in named]
        self.layout = Layout(trained) if self.joined else None
        self._counted = len(layers(trained))
        self.buffers = [n for n, _ in self.inner.named_buffers()]
        common: dict[str, Any] = dict(
            params=self.params, buffers=self.buffers, views=self.views, autocast=self.autocast,
        )  # fmt: skip
        self._pass = Passes(**common)
        if self.group.sharded:
            self._pass = ShardedPasses(**common, trained=trained, joined=self.joins)
        self.hyper = self.method.hyper
        rows = self.method.sensitivities
        if self.layout is not None:
            rows.update = rows.update.joined(self.layout)
        self.update = rows.update
        self._factors = self.rates.tolist()
        self._known: tuple[Tensor, int, dict[str, Any], dict[str, float]] | None = None
        self.start: dict[str, Any] = {}

    def begin(self, values: Mapping[str, float]) -> RunState:
        """The initial run, from the objective's parameters (not copied) and buffers."""
        named = dict(self.inner.named_parameters())
        self.start = start = {**self.options, **values}
        device = named[self.params[0]].device
        weights = self.joins([local(named[n].detach()) for n in self.params])
        if self.layout is not None and not self.group.sharded:
            for name, view in zip(self.params, self.views(weights), strict=True):
                named[name].data = view
        own = [o.options for o in self.own] or [{}] * len(weights)
        parts = [
            self.method.sensitivities.begin(part, {**start, **options}, cut)
            for (cut, part), options in zip(self.method.cuts(weights), own, strict=True)
        ]
        hyper = HyperState(*(t.to(device) for t in self.hyper.begin(values)))
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        buffers = list(self.inner.buffers())
        still, state = [b.clone() for b in buffers], self.method.begin(parts, hyper, zero)
        return RunState(state, buffers, still, zero, zero.clone(), zero.clone())

    def views(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """One tensor for each parameter, from the run's weights."""
        return list(weights) if self.layout is None else self.layout.views(weights[0])

    def joins(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of :meth:`views`."""
        return list(tensors) if self.layout is None else [self.layout.flatten(tensors)]

    @property
    def starts(self) -> dict[str, float]:
        """Starting values of the tuned hyperparameters, by name."""
        return {n: float(self.start[n]) for n in self.hyper.names}

    def release(self) -> None:
        """Give parameters their own tensors again, if they are views of one vector."""
        named = dict(self.inner.named_parameters())
        apart = self.layout is None or self.group.sharded
        for name in () if apart else self.params:
            named[name].data = named[name].data.clone()

    # the steps

    def train(self, run: RunState, batch: Batch, *, tracked: bool) -> tuple[RunState, Tensor]:
        """A weight step; returns the next run, and the outputs of :meth:`record`."""
        return self.advance(run, self.gradient(run, batch), tracked=tracked)

    def tune(self, run: RunState, batch: Batch) -> tuple[RunState, Tensor]:
        """A step of the hyperparameters on a validation batch.

        Returns the next run, and a vector of the outer loss, whether hypergradients were finite,
        the hyperparameters after the step, and their raw values after and before it.
        """
        return self.hyper_step(run, self.outer_gradient(run, batch))

    def gradient(self, run: RunState, batch: Batch) -> Passed:
        """Loss, gradients and next buffers of the training objective, over all ranks."""
        passing = partial(self.group.mean, self.train_pass)
        if self.halved is not None and self.halved.due:
            return self.halved.gradient(passing, run, batch)
        return passing(run, batch)

    def outer_gradient(self, run: RunState, batch: Batch) -> Passed:
        """Loss, gradients and next buffers of the validation objective, over all ranks."""
        return self.group.mean(self.val_pass, run, batch)

    def train_pass(self, run: RunState, batch: Batch) -> Passed:
        """:meth:`gradient` on this rank's part of the batch."""
        return self._pass(self.inner, run.weights, run.buffers, batch, self._layers(run))

    def val_pass(self, run: RunState, batch: Batch) -> Passed:
        """:meth:`outer_gradient` on this rank's part of the batch, at the average."""
        params = [p.average.to(p.params.dtype) for p in run.method.parts]
        both = enumerate(zip(run.buffers, run.average_buffers, strict=True))
        buffers = [mine if i in self.carried else average for i, (mine, average) in both]
        return self._pass(self.outer, params, buffers, batch, self._layers(run))

    def _layers(self, run: RunState) -> dict[str, Tensor]:
        """The buffers with the current values of tuned layers, shape (1,) each."""
        if not self.layers:
            return {}
        dtype = run.method.parts[0].average.dtype
        values = self.hyper.values(run.hyper.raw)
        strengths = {n: v.to(dtype).view(1) for n, v in values.items() if n in self.layers}
        return {buffer: strengths[n] for n in strengths for buffer in self.layers[n]}

    def advance(
        self, run: RunState, passed: Passed, *, tracked: bool, rate: float | None = None
    ) -> tuple[RunState, Tensor]:
        """The run after a step along gradients, and the outputs of :meth:`record`.

        A step whose loss or new weights are not finite is counted but not taken. ``rate`` replaces
        the schedule's factor of the learning rate.
        """
        loss, grads, buffers = passed
        moments, parts, total = self.moments(run, rate), run.method.parts, self.method.total
        steps = choice.propose_all(
            [self.update] * len(parts), parts, grads, moments, total, sharded=self.group.sharded
        )
        sums = torch.stack([s.moved.sum(dtype=torch.float64) for s in steps])
        fine, record = self.record(loss, sums, self.views(grads) if tracked else ())
        if self._on_host(run):
            if not bool(fine):
                return run._replace(step=run.step + 1), record
        else:
            steps = [s.masked(fine) for s in steps]
            moments = [
                m._replace(share=torch.where(fine, m.share, 0.0), mask=fine) for m in moments
            ]
            buffers = [torch.where(fine, *b) for b in zip(buffers, run.buffers, strict=True)]
        after = run._replace(
            method=self.method.weight_step(run.method, steps, moments, tracked=tracked),
            buffers=buffers,
            step=run.step + 1,
            age=run.age + fine.to(run.age.dtype),
        )
        return after, record

    def record(self, loss: Tensor, sums: Tensor, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Whether the step is taken, and a vector of the loss, this, and the live units by layer.

        Args:
            loss: The training loss.
            sums: Finite if this rank's weights after the step are, or its gradients.
            grads: Gradients, for the live units; without any, their numbers are NaN.
        """
        unknown = torch.full((self._counted,), torch.nan, device=loss.device)
        alive = live_units(grads) if grads else unknown
        numbers = torch.cat([sums.sum().double().view(1), alive.double()])
        total = self.method.total(numbers)  # one all-reduce
        fine = torch.isfinite(loss) & torch.isfinite(total[0])
        return fine, torch.cat([torch.stack([loss.double(), fine.double()]), total[1:]])

    def _on_host(self, run: RunState) -> bool:
        """Whether the host may read values at each step: in eager mode, on a CPU."""
        return run.step.device.type == "cpu" and plainly()

    def moments(self, run: RunState, rate: float | None = None) -> list[Moment]:
        rows = self.method.sensitivities
        rho, stride = rows.averaging.rho, rows.estimator.stride
        if self._on_host(run):
            values, slopes = self.numbers(run)
            step, age = int(run.step), int(run.age)
            rate = self.factor(step) if rate is None else rate
            share = rows.averaging.weight(step + 1 - int(run.since), stride)
            moment = Moment(values, slopes, Clock(step, rate, age), share)
            return self._with_own([moment] * len(run.method.parts))
        present = self.hyper.values(run.hyper.raw)
        derivatives = self.hyper.slopes(present).values()
        even = 1 - stride / (run.step + 3 - run.since).squeeze(0).double()
        newest = 1 - even.clamp(0.0, rho**stride)
        moments = {}
        for dtype in {part.average.dtype: None for part in run.method.parts}:
            scalars = [s.to(dtype) for s in (*present.values(), *derivatives, newest)]
            *both, share = hoist(*scalars)
            values = dict(zip(present, both[: len(present)], strict=True))
            slopes = dict(zip(present, both[len(present) :], strict=True))
            moments[dtype] = Moment(
                {**self.options, **values}, slopes, self.clock(run, dtype, rate), share
            )
        return self._with_own([moments[p.average.dtype] for p in run.method.parts])

    def _with_own(self, moments: list[Moment]) -> list[Moment]:
        """The moments with each part's own values and rate."""
        if not self.own:
            return moments
        return [
            m._replace(
                values={**m.values, **o.options}, clock=m.clock._replace(rate=m.clock.rate * o.rate)
            )
            for m, o in zip(moments, self.own, strict=True)
        ]

    def clock(self, run: RunState, dtype: torch.dtype, rate: Any = None) -> Clock:
        """The time of the step as tensors, with the schedule's factor by default."""
        if rate is None:
            last = torch.clamp(run.step, max=len(self.rates) - 1)
            rate = self.rates.gather(0, last).squeeze(0).to(dtype)
        return Clock(run.step.squeeze(0).to(dtype), rate, run.age.squeeze(0).to(dtype))

    def factor(self, step: int) -> float:
        return self._factors[min(step, len(self._factors) - 1)]

    def numbers(self, run: RunState) -> tuple[dict[str, Any], dict[str, float]]:
        """Values and slopes as numbers, which change at hyperparameter steps only."""
        raw = run.hyper.raw
        if self._known is None or self._known[0] is not raw or self._known[1] != raw._version:
            present = self.hyper.values(raw)
            values = {**self.options, **{n: float(v) for n, v in present.items()}}
            slopes = {n: float(s) for n, s in self.hyper.slopes(present).items()}
            self._known = raw, raw._version, values, slopes
        return self._known[2:]

    def memory(self, values: Mapping[str, Any]) -> Any:  # 1/(1 − μ) of heavy-ball momentum
        heavy = self.update.heavy
        return 1 / (1 - values[heavy[0].name]) if heavy else 1.0

    def hyper_step(
        self, run: RunState, passed: Passed, whole_step_grads: Mapping[str, Tensor] | None = None
    ) -> tuple[RunState, Tensor]:
        """The run after a step of the hyperparameters; see :meth:`tune`."""
        (loss, grads, buffers), before = passed, run.hyper.raw.clone()
        state, signal = self.signal(run, grads, whole_step_grads or {})
        weights = self.method.cut([p.params.to(p.average.dtype) for p in run.method.parts])
        memory = self.memory({**self.options, **self.hyper.values(run.hyper.raw)})
        frame = self.hyper.frame(run.step.device)
        state, _ = self.method.hyper_step(state, signal, weights, frame, run.step, memory=memory)
        present = self.hyper.values(state.hyper.raw).values()
        fine = torch.isfinite(signal).all()
        kept = [torch.where(fine, *b) for b in zip(buffers, run.average_buffers, strict=True)]
        after = run._replace(method=state, average_buffers=kept)
        record = torch.stack([t.to(torch.float64) for t in (loss, fine, *present)])
        return after, torch.cat([record, state.hyper.raw, before])

    def signal(
        self, run: RunState, grads: Sequence[Tensor], whole_step_grads: Mapping[str, Tensor]
    ) -> tuple[State, Tensor]:
        """dL/d(raw) of every tuned hyperparameter, shape (hyperparameters,), and the state."""
        names = self.method.sensitivities.names
        state, hypergrads = run.method, {}
        if names:
            values = {**self.options, **self.hyper.values(run.hyper.raw)}
            grads = [g.to(a.dtype) for g, a in zip(grads, run.averages, strict=True)]
            outer = Outer(self.method.cut(grads), [values] * len(grads), run.step, self.every)
            state, rows = self.method.hypergradient(run.method, outer)
            hypergrads = dict(zip(names, rows.squeeze(1), strict=True))
        hypergrads |= whole_step_grads
        if not hypergrads:
            return state, torch.zeros_like(run.hyper.raw)
        return state, torch.stack([hypergrads[n].to(torch.float64) for n in self.hyper.names])
