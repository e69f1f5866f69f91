"""The steps of a run, in place on its tensors: eager, or compiled into one graph each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from selftune._modes import attention_by_steps
from selftune._trees import copy_into, leaves
from selftune.tuner._fast_path import FastPath
from selftune.tuner._graph import compile_step, enable_hooks, first_line, for_shapes, signature
from selftune.tuner._run_state import Batch, RunState
from selftune.tuner._steps import Steps
from selftune.tuner._whole_step import FunctionalSteps

log = logging.getLogger("selftune")

Step = Callable[..., Any]
ODD, SHARE = 20, 0.25
"""Batches of other shapes run eagerly, up to this number or, if more, this share of all."""


class Fused:
    """Executes the steps of :class:`~selftune.tuner._steps.Steps` in place.

    Compiled, a step is one graph: forward, gradient, update and sensitivities, or validation pass
    and hyperparameter step, without Python in between. The graph is compiled for the shapes of the
    first batch. A batch of another shape (the last of an epoch) runs eagerly; if there are many, a
    dynamic-shape graph is compiled too. If the model cannot be compiled, its passes run eagerly
    and the rest stays compiled. With several ranks there are two graphs, for the model's pass and
    for the rest, with the all-reduce of gradients in between. With ``population`` members,
    everything is mapped over a leading dimension.
    """

    def __init__(self, steps: Steps, run: RunState, population: int | None = None) -> None:
        _keep_freed_memory()
        self._steps = steps
        self.run = run
        self._mapped = _mapper(population)
        self.whole = None if steps.whole is None else FunctionalSteps(steps, run)
        self.compiled = False
        self._eager = self._graphs(lambda step: step)
        if population is None and FastPath.serves(steps, run):
            for kind in ("plain", "tracked"):
                quick = FastPath(steps, tracked=kind == "tracked")
                self._eager[kind] = _either(quick, self._eager[kind])
        self._exact: dict[str, Step] = {}
        self._any: dict[str, Step] = {}
        self._shapes: dict[str, Any] = {}
        self._odd = self._taken = 0
        self._apart = False  # whether the model's passes are left eager

    def compile(self) -> None:
        """Compile from the next step on."""
        if self.compiled:
            return
        device, tensors = self.run.step.device, leaves(self.run)
        if device.type == "cpu" and any(t.ndim == 0 and t.dtype == torch.float64 for t in tensors):
            # torch 2.13 passes these to its kernels by value, so writes to them are lost.
            log.warning("not compiled: the model has a float64 parameter or buffer of shape ()")
            return
        self.compiled = True
        if device.type == "cuda":
            for leaf in tensors:
                torch._dynamo.mark_static_address(leaf)
        log.info("compiling the training step: takes 20 s to several minutes, less if cached")
        exact = partial(compile_step, device=device, dynamic=False)
        by_shapes = partial(for_shapes, device=device)
        if self._steps.group.together:
            self._exact = self._parted(exact, by_shapes)
            return
        self._exact = self._graphs(exact)
        self._any = self._graphs(partial(compile_step, device=device, dynamic=True))
        if self.whole is not None:
            self.whole.wrap(by_shapes)

    def train(self, batch: Batch, *, tracked: bool, last: bool = False, step: int = 0) -> Tensor:
        """A step of the weights; returns the result of :meth:`Steps.record`."""
        kind = "tracked" if tracked else "plain"
        if self.whole is not None and self.whole.sees(step, last=last):
            kind = f"seen {kind}"
        return self._take(kind, batch)

    def tune(self, batch: Batch) -> Tensor:
        return self._take("tune", batch)

    @torch.no_grad()
    def eagerly(self, step: Step, batch: Batch) -> Any:
        """Take a step of another kind, in place, without compiling it."""
        return _in_place(self._mapped(step, 1))(self.run, batch)

    @torch.no_grad()
    def _take(self, kind: str, batch: Batch) -> Tensor:
        halved = self._steps.halved
        if not self.compiled or (halved is not None and halved.due):
            return self._eager[kind](self.run, batch)
        self._taken += 1
        shapes = signature(batch)
        first = kind not in self._shapes
        if first:
            self._shapes[kind] = shapes
        # Ranks whose batches differ in shape must round alike: one graph takes all their steps.
        if shapes == self._shapes[kind] or self._steps.group.together:
            return self._compiled(kind, first, batch)
        self._odd += 1
        if self._odd > max(ODD, SHARE * self._taken):
            dynamo = torch._dynamo.exc  # imported lazily, as it is slow
            try:
                return self._any[kind](self.run, batch)
            except (dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit) as error:
                enable_hooks()
                log.warning("batches of other shapes are trained eagerly: %s", first_line(error))
                self._any = self._eager
        return self._eager[kind](self.run, batch)

    def _compiled(self, kind: str, first: bool, batch: Batch) -> Tensor:
        """A compiled step, or its eager version if torch cannot compile it."""
        start = time.perf_counter()
        try:
            result = self._exact[kind](self.run, batch)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # imported lazily, as it is slow
            self._fall_back("a number in the model or the loss keeps changing")
            return self._take(kind, batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._fall_back(first_line(error))
            return self._take(kind, batch)
        if first:
            log.info("compiled the %s step in %.0f s", kind, time.perf_counter() - start)
        return result

    def _fall_back(self, reason: str) -> None:
        """Run the model's passes eagerly; if they already are eager, run everything eagerly."""
        enable_hooks()
        self.compiled = not self._apart and self.whole is None
        if not self.compiled:
            log.warning("the training step stays eager from here on: %s", reason)
            return
        self._apart = True
        log.warning("the model's passes stay eager, and the update alone is compiled: %s", reason)
        exact = partial(compile_step, device=self.run.step.device, dynamic=False)
        self._exact = self._any = self._parted(exact)

    def _graphs(self, wrap: Callable[[Step], Step]) -> dict[str, Step]:
        """Every kind of step, each wrapped as one function."""
        steps, mapped = self._steps, self._mapped
        train = {k: partial(steps.train, tracked=k == "tracked") for k in ("plain", "tracked")}
        kinds: dict[str, Step] = {**train, "tune": steps.tune}
        graphs = {n: wrap(_in_place(mapped(f, 1))) for n, f in kinds.items()}
        return graphs if self.whole is None else {**graphs, **self._seen(self.whole, wrap)}

    def _seen(self, whole: FunctionalSteps, wrap: Callable[[Step], Step]) -> dict[str, Step]:
        """Every kind of step, observed by an estimator that runs between the graphs."""
        steps = self._steps
        # A CUDA graph overwrites its previous outputs.
        kept = partial(tree_map, torch.clone) if self.run.step.is_cuda else lambda tree: tree

        def seen(tracked: bool) -> Step:
            def advance(run: RunState, batch: Batch) -> tuple[RunState, Any]:
                point, hparams = whole.seen(run)
                run, record = steps.train(run, batch, tracked=tracked)
                return run, (record, point, hparams)

            advancing = wrap(_in_place(advance))

            def train(run: RunState, batch: Batch) -> Tensor:
                record, point, hparams = advancing(run, batch)
                if bool(record[1]):  # the step was taken
                    point, hparams = kept((point, hparams))
                    whole.observe(point, hparams, batch)
                return record

            return train

        def validate(run: RunState, batch: Batch) -> tuple[RunState, Any]:
            passed = steps.outer_gradient(run, batch)
            end, hparams = whole.seen(run)
            return run, (passed, whole.joined(passed[1]), end, hparams)

        def step(run: RunState, passed: Any, grads: Any) -> tuple[RunState, Tensor]:
            return steps.hyper_step(run, passed, whole.raw(run, grads))

        validating, stepping = wrap(_in_place(validate)), wrap(_in_place(step))

        def tune(run: RunState, batch: Batch) -> Tensor:
            passed, grads, end, hparams = validating(run, batch)
            hypergrads = whole.estimate(end, hparams, grads)
            return stepping(run, passed, hypergrads)

        return {"seen plain": seen(False), "seen tracked": seen(True), "tune": tune}

    def _parted(
        self, wrap: Callable[[Step], Step], wrap_pass: Callable[[Step], Step] = lambda step: step
    ) -> dict[str, Step]:
        """Every kind of step in two parts: the model's pass, by default unwrapped, and the rest."""
        steps, mapped = self._steps, self._mapped

        def parted(passing: Step, step: Step) -> Step:
            stepping = wrap(_in_place(mapped(step, 0)))
            return lambda run, batch: stepping(run, steps.group.mean(passing, run, batch))

        train, val = (wrap_pass(mapped(p, 1)) for p in (steps.train_pass, steps.val_pass))
        return {
            "plain": parted(train, partial(steps.advance, tracked=False)),
            "tracked": parted(train, partial(steps.advance, tracked=True)),
            "tune": parted(val, steps.hyper_step),
        }


def _either(first: Step, second: Step) -> Step:
    """A step, or another one if that returns None."""

    def taken(*args: Any) -> Tensor:
        record = first(*args)
        return second(*args) if record is None else record

    return taken


def _keep_freed_memory() -> None:
    """Let the C library keep the memory of a step's temporary tensors for the next step.

    glibc returns a freed block to the system if it is larger than all blocks freed before (up to
    32 MB); page faults then slow the next step by up to a third.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def _in_place(step: Step) -> Step:
    """Wrap a pure step so that it writes the next run into the tensors of the current one."""

    def stepped(run: RunState, *rest: Any) -> Any:
        after, record = step(run, *rest)
        copy_into(run, after)
        return record

    return stepped


def _mapper(population: int | None) -> Callable[[Step, int], Step]:
    """Maps steps over a population; their last ``shared`` arguments are the same for all."""
    if population is None:
        return lambda step, shared: step

    def mapped(step: Step, shared: int) -> Step:
        def over_members(*args: Any) -> Any:
            cut = len(args) - shared
            dims = (0,) * cut + (None,) * shared
            with attention_by_steps():
                return torch.func.vmap(step, in_dims=dims, randomness="different")(*args)

        return over_members

    return mapped
