"""The steps of a run, in place on its tensors: eagerly, or compiled into one graph each."""

from __future__ import annotations

import logging
import math
import time
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from selftune._trees import leaves
from selftune.bilevel import Batch, Bilevel, Run, alive
from selftune.followed import Followed
from selftune.unobserved import Unobserved

log = logging.getLogger("selftune")

Step = Callable[..., Any]
ODD, SHARE = 20, 0.25
"""Batches of other shapes run eagerly, until there are this many and they are this share."""


class Fused:
    """Takes the steps of a :class:`~selftune.bilevel.Bilevel` and writes the run in place.

    Compiled, a step is one graph: forward, gradient, update, tangents and hyperparameter step,
    with no Python between. The graph is made for the shapes of the first batch; a batch of
    another shape (the last of an epoch) takes the same step eagerly, and where those are many a
    second graph for any shape is made. If the model itself cannot be compiled, its passes run
    eagerly and the rest stays compiled.

    Args:
        bilevel: The steps.
        run: The tensors they work on.
        population: Members of a population mapped over the leading dimension, or None.
    """

    def __init__(self, bilevel: Bilevel, run: Run, population: int | None = None) -> None:
        _keep_freed_memory()
        self._bilevel = bilevel
        self.run = run
        self._mapped = _mapper(population)
        follow = bilevel.follow
        self.followed = None if follow is None else Followed(bilevel, follow, run)
        self.compiled = False
        self._eager = self._whole(lambda step: step)
        if population is None and Unobserved.serves(bilevel, run):
            self._eager["train"] = _either(Unobserved(bilevel), self._eager["train"])
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
            # torch 2.13 hands these to its kernels by value and loses what is written to them.
            log.warning("not compiled: the model has a float64 parameter or buffer of shape ()")
            return
        self.compiled = True
        if device.type == "cuda":
            for leaf in tensors:
                torch._dynamo.mark_static_address(leaf)
        log.info("compiling the training step: up to a minute, and quick once it is cached")
        self._exact = self._whole(lambda step: _compile(step, device, dynamic=False))
        self._any = self._whole(lambda step: _compile(step, device, dynamic=True))
        if self.followed is not None:
            self.followed.wrap(lambda function: _for_shapes(function, device))

    def train(self, batch: Batch) -> Tensor:
        """A weight step; returns the training loss."""
        return self._take("train", batch)

    def tune(self, batch: Batch, outer: Batch) -> Tensor:
        """A weight and a hyperparameter step; returns what :meth:`Bilevel.told` tells."""
        return self._take("tune", batch, outer)

    @torch.no_grad()
    def _take(self, kind: str, *batches: Batch) -> Tensor:
        if not self.compiled:
            return self._eager[kind](self.run, *batches)
        self._taken += 1
        shapes = signature(batches)
        first = kind not in self._shapes
        if first:
            self._shapes[kind] = shapes
        if shapes == self._shapes[kind]:
            return self._compiled(kind, first, *batches)
        self._odd += 1
        step = self._any if self._odd > max(ODD, SHARE * self._taken) else self._eager
        return step[kind](self.run, *batches)

    def _compiled(self, kind: str, first: bool, *batches: Batch) -> Tensor:
        """A compiled step, or what stays of it where torch cannot compile it."""
        start = time.perf_counter()
        try:
            result = self._exact[kind](self.run, *batches)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # imported where used: slow
            self._fall_back("a number in the model or the loss keeps changing")
            return self._take(kind, *batches)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._fall_back(str(error).strip().splitlines()[0])
            return self._take(kind, *batches)
        if first:
            log.info("compiled the %s step in %.0f s", kind, time.perf_counter() - start)
        return result

    def _fall_back(self, reason: str) -> None:
        """Leave the model's passes eager; if that was so already, leave everything."""
        self.compiled = not self._apart and self.followed is None
        if not self.compiled:
            log.warning("the training step stays eager from here: %s", reason)
            return
        self._apart = True
        log.warning("the model's passes stay eager, and the update alone is compiled: %s", reason)
        device = self.run.step.device
        self._exact = self._parted(lambda step: _compile(step, device, dynamic=False))
        self._any = self._exact

    def _whole(self, wrap: Callable[[Step], Step]) -> dict[str, Step]:
        """Both steps, each wrapped as a whole."""
        bilevel, mapped = self._bilevel, self._mapped
        if self.followed is not None:
            return self._following(wrap)
        return {
            "train": wrap(_in_place(mapped(bilevel.train, 1))),
            "tune": wrap(_in_place(mapped(bilevel.tune, 2))),
        }

    def _following(self, wrap: Callable[[Step], Step]) -> dict[str, Step]:
        """Both steps, of which an estimator takes note; it works between the graphs."""
        bilevel, followed = self._bilevel, self.followed
        assert followed is not None

        def advance(run: Run, batch: Batch) -> tuple[Run, Any]:
            point, hparams = followed.seen(run)
            loss, grads, buffers = bilevel.gradient(run, batch)
            point = point._replace(grads=followed.joined(grads))
            observe = bilevel.estimator.stride == 1
            run = bilevel.advance(run, loss, grads, buffers, observe=observe)
            return run, (loss, point, hparams)

        def validate(run: Run, batch: Batch, outer: Batch) -> tuple[Run, Any]:
            point, hparams = followed.seen(run)
            loss, grads, buffers = bilevel.gradient(run, batch)
            passed = point._replace(grads=followed.joined(grads)) if followed.sees_all else None
            run = bilevel.advance(run, loss, grads, buffers, observe=True)
            outer_loss, outer_grads, buffers = bilevel.outer_gradient(run, outer)
            told = loss, alive(grads), outer_loss
            run = run._replace(average_buffers=buffers)
            ends = followed.seen(run)[0], followed.joined(outer_grads)
            return run, (told, passed, hparams, *ends, bilevel.hypergradient(run, outer_grads))

        def step(
            run: Run, grads: dict[str, Tensor], rows: Tensor, *told: Tensor
        ) -> tuple[Run, Tensor]:
            signal = rows + followed.raw(run, grads)
            after = bilevel.stepped(run, signal, run.average_buffers)
            return after, bilevel.told(after, *told)

        advancing, validating = wrap(_in_place(advance)), wrap(_in_place(validate))
        plain, stepping = wrap(_in_place(bilevel.train)), wrap(_in_place(step))
        # A CUDA graph writes over what it returned.
        kept = partial(tree_map, torch.clone) if self.run.step.is_cuda else lambda found: found

        def train(run: Run, batch: Batch) -> Tensor:
            if not followed.sees_all:
                return plain(run, batch)
            loss, point, hparams = advancing(run, batch)
            if not math.isfinite(float(loss)):  # the step was not taken
                return loss
            point, hparams = kept((point, hparams))
            followed.observe(point, hparams, batch)
            return loss

        def tune(run: Run, batch: Batch, outer: Batch) -> Tensor:
            told, passed, hparams, end, grads, rows = validating(run, batch, outer)
            point, hparams = kept((passed or end, hparams))
            if math.isfinite(float(told[0])):
                followed.observe(point, hparams, batch)
            end = end._replace(batch=(batch, end.batch))
            found = followed.estimate(end, hparams, grads)
            return stepping(run, found, rows, *told)

        return {"train": train, "tune": tune}

    def _parted(self, wrap: Callable[[Step], Step]) -> dict[str, Step]:
        """Both steps with the model's passes left as they are and the rest wrapped."""
        bilevel, mapped = self._bilevel, self._mapped
        inner, outer = mapped(bilevel.gradient, 1), mapped(bilevel.outer_gradient, 1)

        def advance(run: Run, loss: Tensor, *rest: Any) -> tuple[Run, Tensor]:
            return bilevel.advance(run, loss, *rest), loss

        def observe(run: Run, loss: Tensor, *rest: Any) -> tuple[Run, Tensor]:
            return bilevel.advance(run, loss, *rest, observe=True), loss

        def step(run: Run, found: Any, outer: Any) -> tuple[Run, Tensor]:
            after = bilevel.step(run, *outer)
            loss, grads, _ = found
            return after, bilevel.told(after, loss, alive(grads), outer[0])

        advancing = wrap(_in_place(mapped(advance, 0)))
        observing = wrap(_in_place(mapped(observe, 0)))
        stepping = wrap(_in_place(mapped(step, 0)))

        def train(run: Run, batch: Batch) -> Tensor:
            return advancing(run, *inner(run, batch))

        def tune(run: Run, batch: Batch, outer_batch: Batch) -> Tensor:
            found = inner(run, batch)
            observing(run, *found)
            return stepping(run, found, outer(run, outer_batch))

        return {"train": train, "tune": tune}


def _either(first: Step, second: Step) -> Step:
    """A step, or another where that returns None."""

    def taken(*args: Any) -> Tensor:
        told = first(*args)
        return second(*args) if told is None else told

    return taken


def _keep_freed_memory() -> None:
    """Let the C library keep the memory of a step's temporary tensors for the next step.

    glibc returns freed memory to the system above a threshold, and the next step is then slowed by
    page faults, by up to a third. The threshold follows the largest block that was ever freed
    (up to 32 MB), which is far too low in a process that has handled small tensors only.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _in_place(step: Step) -> Step:
    """A pure step that writes the next run into the tensors of the run before."""

    def stepped(run: Run, *rest: Any) -> Any:
        after, told = step(run, *rest)
        for old, new in zip(leaves(run), leaves(after), strict=True):
            if new is not old:
                old.copy_(new)
        return told

    return stepped


def _compile(step: Step, device: torch.device, *, dynamic: bool, keep: bool = False) -> Step:
    """The step as one graph, launched from C++ on a CPU and as a CUDA graph on a GPU.

    What a CUDA graph returns is written over at its next launch: ``keep`` does without.
    """
    # Dynamo keeps its graphs by code object and makes only a few of each: a new one a run.
    assert isinstance(step, types.FunctionType)
    code = step.__code__.replace()
    own = types.FunctionType(code, step.__globals__, closure=step.__closure__)
    launch = "triton.cudagraphs" if device.type == "cuda" else "cpp_wrapper"
    options: dict[str, Any] = {launch: device.type == "cpu" or not keep}
    if not dynamic:
        options["guard_filter_fn"] = _needed
    return torch.compile(own, fullgraph=True, dynamic=dynamic, options=options)


def _for_shapes(function: Step, device: torch.device) -> Step:
    """A function as one graph for arguments like the first ones; for others as it is."""
    graph = _compile(_plain(function), device, dynamic=False, keep=True)
    shapes: list[Any] = []

    def run(*args: Any) -> Any:
        found = signature(args)
        if not shapes:
            shapes.append(found)
        if found != shapes[0]:
            return function(*args)
        try:
            return graph(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            log.warning(
                "a part of the estimator stays eager: %s", str(error).strip().split("\n")[0]
            )
            shapes[0] = None
            return function(*args)

    return run


def _plain(function: Step) -> Step:
    """Any callable as a function."""
    return lambda *args: function(*args)


def _needed(guards: Sequence[Any]) -> list[bool]:
    """Which of a static graph's guards are checked at each step: numbers that users may change.

    The run's tensors, the batches' shapes and our own objects are the same at each call, and to
    check them all takes as long as a small net's step.
    """
    ours = ("G['__import_", "__import__(", "dict(type(")
    return [g.guard_type == "CONSTANT_MATCH" and not g.name.startswith(ours) for g in guards]


def _mapper(population: int | None) -> Callable[[Step, int], Step]:
    """Maps steps over a population; their last ``shared`` arguments are the same for all."""
    if population is None:
        return lambda step, shared: step

    def mapped(step: Step, shared: int) -> Step:
        def over_members(*args: Any) -> Any:
            cut = len(args) - shared
            dims = (0,) * cut + (None,) * shared
            return torch.func.vmap(step, in_dims=dims, randomness="different")(*args)

        return over_members

    return mapped


def signature(batches: Any) -> Any:
    """Structure and layout of batches: what a graph is made for."""
    if isinstance(batches, Tensor):
        return batches.shape, batches.stride(), batches.dtype, batches.device
    if isinstance(batches, dict):
        return tuple((k, signature(v)) for k, v in batches.items())
    if isinstance(batches, (tuple, list)):
        return tuple(map(signature, batches))
    if hasattr(batches, "to"):  # tensors that cannot be seen: like no other batch
        return object()
    return type(batches)
