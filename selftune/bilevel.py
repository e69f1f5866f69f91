"""One step of self-tuned training as a pure function: weights, responses, hyperparameters.

A run is a tree of tensors, and a step maps it to the next::

    run, loss = bilevel.train(run, batch)                 # a weight step
    run, told = bilevel.tune(run, batch, outer_batch)     # … and a hyperparameter step

The same functions run eagerly, compiled into one graph (:mod:`selftune.fused`) and mapped over a
population.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from selftune._flat import Layout
from selftune._gradient import gradient
from selftune.averaging import Average
from selftune.estimators import AbstractEstimator, AbstractRows
from selftune.hypervector import HyperState, HyperVector
from selftune.response import Moment, Responses, Weight
from selftune.travel import BEGINNING, Way
from selftune.update import Clock, Update

Batch = Any


class Run(NamedTuple):
    """Everything a run is, as tensors, none of them without a dimension.

    (torch 2.13's CPU compiler passes those to its kernels by value and loses what is written to
    them, see ``tests/test_fused.py``.)

    Attributes:
        weights: One for each trained parameter, or one for all of them joined.
        shrinking: A weight of 1, whose response to weight decay stands for all; or nothing.
        buffers: The model's, as the training passes leave them.
        average_buffers: Those of the averaged weights, as the validation passes leave them.
        hyper: The tuned hyperparameters.
        step: Steps taken in the run, shape (1,).
        age: Updates since the last fresh start, shape (1,).
        way: How far weights have come since, where that limits the learning rate; or nothing.
    """

    weights: list[Weight]
    shrinking: list[Weight]
    buffers: list[Tensor]
    average_buffers: list[Tensor]
    hyper: HyperState
    step: Tensor
    age: Tensor
    way: list[Way]


class Bilevel:
    """The parts of a step.

    Args:
        inner: The training objective, a module that takes a batch and returns the loss.
        outer: The validation objective over the same parameters and buffers.
        update: Turns weights into the next weights.
        options: The rule's options and the hyperparameters that are not tuned.
        hyper: The tuned hyperparameters.
        estimator: Follows how weights respond to them. Its stride is the number of steps from one
            ``tune`` to the next, or 1: then every step is observed, and costs more.
        storage: The dtype of tangents and responses, or None for that of the weights.
        averaging: The outer point, sampled at the steps that are observed.
        rates: The schedule's factor at each step of the run, shape (steps,).
        autocast: Makes the context of the forward passes.
        follow: An estimator that sees whole steps (:class:`~selftune.followed.Followed`).
        followed: Names of the hyperparameters that are followed by it instead of ``estimator``.
        strengths: Buffers of the objective in which hyperparameters are kept, by name.
        joined: Whether all parameters, of one dtype, are kept as one vector of which they become
            views: one operation then does for all tensors, which is what eager steps of small nets
            consist of.
        limited: Whether the learning rate does not climb while weights go to and fro.

    Attributes:
        layout: Of the vector, or None.
    """

    def __init__(
        self,
        inner: nn.Module,
        outer: nn.Module,
        update: Update,
        options: Mapping[str, Any],
        hyper: HyperVector,
        estimator: AbstractRows,
        storage: torch.dtype | None,
        averaging: Average,
        rates: Tensor,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        follow: AbstractEstimator | None = None,
        followed: Sequence[str] = (),
        strengths: Mapping[str, Sequence[str]] | None = None,
        joined: bool = False,
        limited: bool = False,
    ) -> None:
        self.inner, self.outer = inner, outer
        trained = {n: p for n, p in inner.named_parameters() if p.requires_grad}
        self.params = list(trained)
        self.layout = Layout(list(trained.values())) if joined else None
        update = update if self.layout is None else update.joined(self.layout)
        self.buffers = [n for n, _ in inner.named_buffers()]
        self.update, self.options = update, dict(options)
        self.hyper, self.averaging = hyper, averaging
        self.estimator, self.storage = estimator, storage
        self.rates, self.autocast = rates, autocast
        self.follow, self.followed = follow, list(followed)
        self.strengths = {n: list(s) for n, s in (strengths or {}).items()}
        names = [n for n in hyper.names if n not in self.followed]
        self.limited = limited and "lr" in hyper.names
        self.responses = Responses(names, update, estimator, averaging, storage)

    def init(self, values: Mapping[str, float]) -> Run:
        """A run at its start, from the objective's parameters (not copied) and buffers."""
        named = dict(self.inner.named_parameters())
        start = {**self.options, **values}
        device = named[self.params[0]].device
        if self.layout is None:
            values_of = [named[n].detach() for n in self.params]
        else:
            vector = self.layout.flatten([named[n].detach() for n in self.params])
            values_of = [vector]
            for name, view in zip(self.params, self.layout.views(vector), strict=True):
                named[name].data = view
        weights = [self.responses.start(value, start) for value in values_of]
        shrinking = self.responses.shrinking(weights[0].average, start)
        buffers = [b for _, b in self.inner.named_buffers()]
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        hyper = HyperState(*(t.to(device) for t in self.hyper.init(values)))
        still = [b.clone() for b in buffers]
        way = [Way.begun([w.value for w in weights], zero)] if self.limited else []
        return Run(weights, shrinking, buffers, still, hyper, zero, zero.clone(), way)

    def parts(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """One tensor a parameter, of what the run keeps of its weights."""
        return list(weights) if self.layout is None else self.layout.views(weights[0])

    def part(self) -> None:
        """Give parameters tensors of their own again, where they are views of one."""
        named = dict(self.inner.named_parameters())
        for name in self.params if self.layout is not None else ():
            named[name].data = named[name].data.clone()

    # the steps

    def train(self, run: Run, batch: Batch) -> tuple[Run, Tensor]:
        """A weight step; returns the training loss with the next run."""
        loss, grads, buffers = self.gradient(run, batch)
        observe = self.estimator.stride == 1
        return self.advance(run, loss, grads, buffers, observe=observe), loss

    def tune(self, run: Run, batch: Batch, outer_batch: Batch) -> tuple[Run, Tensor]:
        """A weight step, then a hyperparameter step; returns the next run and what it tells.

        That is a vector: training loss, outer loss, share of gradients that are not 0, and the
        hyperparameters after the step.
        """
        loss, grads, buffers = self.gradient(run, batch)
        run = self.advance(run, loss, grads, buffers, observe=True)
        outer_loss, outer_grads, buffers = self.outer_gradient(run, outer_batch)
        run = self.step(run, outer_loss, outer_grads, buffers)
        return run, self.told(run, loss, alive(grads), outer_loss)

    def told(self, run: Run, loss: Tensor, share: Tensor, outer_loss: Tensor) -> Tensor:
        """What a hyperparameter step tells, shape (3 + hyperparameters,), float64."""
        values = list(self.hyper.values(run.hyper.raw).values())
        return torch.stack([t.to(torch.float64) for t in (loss, outer_loss, share, *values)])

    def gradient(self, run: Run, batch: Batch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Loss, gradients and next buffers of the training objective."""
        params = [w.value for w in run.weights]
        return self._gradient(self.inner, params, run.buffers, batch, self.strengthened(run))

    def outer_gradient(self, run: Run, batch: Batch) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Loss, gradients and next buffers of the validation objective, at the average."""
        params = [w.average.to(w.value.dtype) for w in run.weights]
        strengths = self.strengthened(run)
        return self._gradient(self.outer, params, run.average_buffers, batch, strengths)

    def strengthened(self, run: Run) -> dict[str, Tensor]:
        """The buffers that hold the present strengths, shape (1,) each."""
        if not self.strengths:
            return {}
        values = self.hyper.values(run.hyper.raw)
        dtype = run.weights[0].average.dtype
        held = {n: v.to(dtype).view(1) for n, v in values.items() if n in self.strengths}
        return {buffer: held[n] for n in held for buffer in self.strengths[n]}

    def _gradient(
        self,
        module: nn.Module,
        params: list[Tensor],
        buffers: list[Tensor],
        batch: Batch,
        strengths: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        def objective(params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            held = [b.clone() for b in buffers]  # modules write into them, which must not show
            tensors = dict(zip(self.params, self.parts(params), strict=True))
            tensors |= {**dict(zip(self.buffers, held, strict=True)), **strengths}
            with self.autocast():
                loss = functional_call(module, tensors, (batch,))
            return loss, [tensors[n] for n in self.buffers]  # the same, or what was bound anew

        grads, loss, after = gradient(objective, params)
        return loss, grads, after

    def advance(
        self,
        run: Run,
        loss: Tensor,
        grads: Sequence[Tensor],
        buffers: list[Tensor],
        *,
        observe: bool = False,
        rate: float | None = None,
    ) -> Run:
        """The run after a weight step, or the same run if the loss is not finite.

        Args:
            run: Before the step.
            loss: The training loss.
            grads: Its gradients.
            buffers: The module's buffers after the pass.
            observe: Whether this step is averaged and seen by the estimator.
            rate: What the learning rate is multiplied with instead of the schedule.
        """
        fine = torch.isfinite(loss)
        dtypes = {w.average.dtype for w in run.weights}
        moments = {dtype: self._moment(run, dtype, fine, rate) for dtype in dtypes}
        weights = [
            self._moved(weight, grad, moments[weight.average.dtype], observe)
            for weight, grad in zip(run.weights, grads, strict=True)
        ]
        shrinking = run.shrinking
        if observe:
            shrinking = [self.responses.shrunk(w, moments[w.average.dtype]) for w in shrinking]
        kept = [torch.where(fine, new, old) for new, old in zip(buffers, run.buffers, strict=True)]
        return run._replace(
            weights=weights,
            shrinking=shrinking,
            buffers=kept,
            step=run.step + 1,
            age=run.age + fine.to(run.age.dtype),
        )

    def _moment(self, run: Run, dtype: torch.dtype, fine: Tensor, rate: float | None) -> Moment:
        values = self.hyper.values(run.hyper.raw)
        slopes = self.hyper.slopes(values)
        last = torch.clamp(run.step, max=len(self.rates) - 1)
        factor = self.rates.gather(0, last).squeeze(0).to(dtype) if rate is None else rate
        step, age = run.step.squeeze(0).to(dtype), run.age.squeeze(0).to(dtype)
        return Moment(
            {**self.options, **{n: v.to(dtype) for n, v in values.items()}},
            {n: v.to(dtype) for n, v in slopes.items()},
            Clock(step, factor, age),
            self.responses.kept(age),
            fine,
        )

    def _moved(self, weight: Weight, grad: Tensor, moment: Moment, observe: bool) -> Weight:
        """A weight after the step."""
        dtype, fine = weight.average.dtype, moment.fine
        before = weight.value.to(dtype)
        moved, after, transition = self.update.observed(
            before, grad.to(dtype), weight.rule, moment.values, moment.clock
        )
        moved = torch.where(fine, moved, before)
        rule = {k: torch.where(fine, after[k], v) for k, v in weight.rule.items()}
        weight = weight._replace(value=moved.to(weight.value.dtype), rule=rule)
        return self.responses.observed(weight, moved, transition, moment) if observe else weight

    def step(self, run: Run, loss: Tensor, grads: Sequence[Tensor], buffers: list[Tensor]) -> Run:
        """The run after a hyperparameter step along the outer gradients."""
        return self.stepped(run, self.hypergradient(run, grads), buffers)

    def stepped(self, run: Run, signal: Tensor, buffers: list[Tensor]) -> Run:
        """The run after a hyperparameter step along hypergradients, shape (hyperparameters,)."""
        values = {**self.options, **self.hyper.values(run.hyper.raw)}
        memory = 1 / (1 - values["momentum"]) if "momentum" in values else 1.0
        way, climb = self._led(run)
        hyper = self.hyper.step(run.hyper, signal, memory, climb)
        return run._replace(hyper=hyper, average_buffers=buffers, way=way)

    def _led(self, run: Run) -> tuple[list[Way], Tensor | None]:
        """How far weights have come, and how much of a step upwards the rate may take."""
        if not run.way:
            return [], None
        way, led = run.way[0].onward([w.value for w in run.weights], run.step)
        begins = run.step < self.hyper.horizon / BEGINNING
        return [way], torch.where(begins, 1.0, led).squeeze(0)

    def hypergradient(self, run: Run, grads: Sequence[Tensor]) -> Tensor:
        """dL/d(raw), shape (hyperparameters,); 0 for those that are followed."""
        values = self.hyper.values(run.hyper.raw)
        rows = self.responses.hypergradients(
            run.weights, run.shrinking, grads, values, run.step.squeeze(0)
        )
        found = dict(zip(self.responses.names, rows, strict=True))
        signal = [found.get(n, torch.zeros_like(v)).to(torch.float64) for n, v in values.items()]
        return torch.stack(signal) if signal else torch.zeros_like(run.hyper.raw)


def alive(grads: Sequence[Tensor]) -> Tensor:
    """The share of gradients that are not 0, shape ()."""
    count = torch.stack([torch.count_nonzero(g) for g in grads]).sum()
    return count / sum(g.numel() for g in grads)
