"""The validation loss and its gradients at other weights, without side effects on the model."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selftune._flat import is_sharded, local
from selftune._gathered import gradients_apart, reshard
from selftune._gradient import nodes
from selftune._modes import random_kept
from selftune.control.final_weights import BACK
from selftune.optim._block import Block
from selftune.optim._checks import check_dependence, check_outer_loss
from selftune.optim._engine import Engine
from selftune.optim._shown import Shown

log = logging.getLogger("selftune")

Closure = Callable[[], Tensor]
Taken = list[list[Tensor]]
"""For every block, the needed part of the gradient of each parameter."""
Take = Callable[[Block, int, Tensor], Tensor]
"""Selects the needed part, from the block, the index of the parameter and its gradient."""
RARER = 200
"""The slopes at a position use one validation batch per this many steps."""

SETTLING = 20
"""Validation passes for the final statistics of BatchNorm; the first half replaces old ones."""

OLD_LOSS = (
    "closure returned a loss computed before the closure was called, at other weights: hyper_step "
    "measures the validation loss at the averaged weights, so the closure must run the model "
    "itself: opt.hyper_step(lambda: loss_fn(model(x), y)); averaged() of another optimizer goes "
    "around hyper_step, not into the closure"
)


@dataclass(frozen=True)
class OuterLoss:
    """Calls the user's closure with other weights in place.

    A number selects them: -1 the last good weights, 0 the average, 1 the current weights, or a
    position between two of these.

    Args:
        engine: Holds the weights and the statistics of BatchNorm.
        scale: Factor of the differentiated loss, by which its gradients are divided.
    """

    engine: Engine
    scale: float = 1.0

    @contextmanager
    def showing(
        self, place: float, *, live: bool = False, exchanged: bool = False
    ) -> Iterator[Sequence[Sequence[Tensor]]]:
        """Put other weights and statistics in place in a block; yields :attr:`Shown.kept`.

        The arguments are those of :class:`Shown`.
        """
        engine = self.engine
        shown = Shown(engine.blocks, engine.buffers, place, live=live, exchanged=exchanged)
        try:
            yield shown.kept
        finally:
            shown.back()

    def _average(self) -> AbstractContextManager[Any]:
        """Put the average in place, by exchange with the weights if possible."""
        exchanged = all(b.layout.native for b in self.engine.blocks)
        return self.showing(0.0, live=True, exchanged=exchanged)

    def gradients(self, closure: Closure) -> tuple[Tensor, Taken]:
        """The loss at the average, and the needed parts of its gradients."""
        engine = self.engine
        search = engine.searching
        with engine.buffers.searching(engine.params) if search else nullcontext():
            return self._gradients(closure, self._average(), engine.taken)

    def first(self, closure: Closure) -> Tensor:
        """The loss at the initial weights, or at the good weights if the start was long ago."""
        engine = self.engine
        age = engine.clock.steps - engine.clock.since
        shown: AbstractContextManager[Any] = self._average()
        if not engine.controller.sweeping and age >= engine.stride:  # the average has moved
            shown = self.showing(-1.0, live=True)
        return self._gradients(closure, shown)[0]

    def _gradients(
        self,
        closure: Closure,
        shown: AbstractContextManager[Any],
        take: Take = lambda block, index, grad: grad.new_empty(0),
    ) -> tuple[Tensor, Taken]:
        scale = self.scale
        buffers = self.engine.buffers
        with shown, buffers.apart(), buffers.quick(), torch.enable_grad():
            while True:
                loss = _call(closure)
                check_outer_loss(loss)
                grads, reached = outer_gradients(loss, self.engine.blocks, take, scale)
                self.engine.reached(reached)
                if scale == 1 or self._finite(grads):
                    return loss.detach(), grads
                # A scaler adapts to training gradients only.
                scale = max(1.0, scale / 16)

    def _finite(self, grads: Taken) -> bool:
        """Whether all gradients are finite, on every process: all repeat a closure, or none."""
        finite = torch.stack([local(g).isfinite().all() for some in grads for g in some]).all()
        return float(self.engine.reducer.mean(finite.float())) == 1

    def random(self) -> AbstractContextManager[None]:
        return random_kept(self.engine.blocks[0].layout.device)

    def value(self, closure: Closure) -> Tensor:
        """The loss at the current weights; statistics and random states do not change."""
        with self.random():
            return self._value(closure)

    def _value(self, closure: Closure) -> Tensor:
        with torch.enable_grad(), self.engine.buffers.kept():
            loss = _call(closure).detach()
        reshard()  # there is no backward pass; a weight step may be next
        return loss

    def check_finite(self, closure: Closure) -> None:
        """Distinguish a closure that is never finite from weights that have diverged."""
        good, _ = self._gradients(closure, self.showing(-1.0))
        if not bool(torch.isfinite(self.engine.reducer.mean(good))):
            raise ValueError(
                f"closure returned {float(good)} at the last good weights too; check the "
                "validation batch and loss for overflow, log(0) or missing values"
            )

    @property
    def final_position(self) -> float:
        """The position of the final weights if the run ended now."""
        guard = self.engine.controller.guard
        lost = guard is not None and guard.lost and not self.engine.clock.last_validation_step
        stuck = guard is not None and guard.stuck
        if guard is not None and guard.worsened and self.engine.lapsed:
            stuck |= not self.engine.controller.final.judged  # more steps overfit further
        if self.engine.controller.sweeping or lost or stuck:  # no average during a sweep
            return -1.0
        return self.engine.controller.final.position

    def judge_end(self, closure: Closure) -> None:
        engine = self.engine
        final, step = engine.controller.final, engine.clock.steps
        if engine.controller.guard is None:
            final.judge(step, self._slopes(closure, (0.0, 1.0))[:, 1])
        else:
            slopes = self._slopes(closure, (*BACK, 1.0))
            final.judge(step, slopes[-2:, 1], slopes[:-1, 0])
        if engine.buffers.own and self.final_position <= 0:  # else they are those of training
            self._settle(closure, self.final_position)
        engine.monitor.scalar("weights/position", final.position, step)
        log.info("%s: final weights: %s", engine.controller.label, final)

    def _settle(self, closure: Closure, place: float) -> None:
        """Collect the statistics of BatchNorm for the final weights.

        Those from the run lag behind the weights, because its passes are rare.
        """
        buffers, several = self.engine.buffers, []
        with self.random(), self.showing(place), buffers.apart(), buffers.quick():
            for _ in range(SETTLING):
                with torch.enable_grad():
                    _call(closure)
                several.append([t.clone() for t in buffers.tensors()])
                reshard()  # there is no backward pass
        buffers.settle(several[SETTLING // 2 :], place)

    def compared(self, closure: Closure) -> tuple[float, float, float]:
        """Mean losses at averaged and at good weights, and the standard error of their difference.

        The number of batches is large enough to detect a worsened loss.
        """
        guard = self.engine.controller.guard
        assert guard is not None
        count = guard.policy.batches(self.engine.shifts.horizon)
        losses_at: list[list[float]] = [[], []]
        with self.random():  # around all of them: a closure may draw its batches at random
            for _ in range(count):  # alternately, because batches differ
                for place, losses in zip((0.0, -1.0), losses_at, strict=True):
                    with self.showing(place):
                        losses.append(float(self.engine.reducer.mean(self._value(closure))))
        now, then = map(statistics.fmean, losses_at)
        if not (math.isfinite(now) and math.isfinite(then)):
            return now, then, math.nan
        return now, then, math.sqrt(sum(map(statistics.variance, losses_at)) / count)

    def _slopes(self, closure: Closure, places: Sequence[float]) -> Tensor:
        """Slopes at positions on the paths from good to averaged and from averaged to last weights.

        Returns:
            Shape (places, 2, batches), float64.
        """
        sums_of = []
        with self.random():
            for _ in range(max(2, self.engine.shifts.horizon // RARER)):
                for place in places:
                    sums_of.append(self._slopes_at(closure, place))
        sums = self.engine.reducer.outer(torch.stack(sums_of)).to("cpu", torch.float64)
        return sums.view(-1, len(places), 2).movedim(0, -1)

    def _slopes_at(self, closure: Closure, place: float) -> Tensor:
        with self.showing(place) as weights:
            kept = {id(b): w for b, w in zip(self.engine.blocks, weights, strict=True)}

            def along(block: Block, index: int, grad: Tensor) -> Tensor:
                return block.slopes(index, grad, kept[id(block)])

            slopes_of = self._gradients(closure, nullcontext(), along)[1]
        return torch.stack([s for slopes in slopes_of for s in slopes]).sum(0)


def _call(closure: Closure) -> Tensor:
    mark = torch.autograd._get_sequence_nr()  # of the next node
    try:
        loss = closure()
    except StopIteration as error:
        raise RuntimeError(
            "closure ran out of validation batches (StopIteration): draw them from an endless "
            "generator: def endless(loader): while True: yield from loader"
        ) from error
    if isinstance(loss, Tensor) and getattr(loss.grad_fn, "_sequence_nr", lambda: mark)() < mark:
        raise RuntimeError(OLD_LOSS)
    return loss


def outer_gradients(
    loss: Tensor, blocks: Sequence[Block], take: Take, scale: float
) -> tuple[Taken, set[Tensor]]:
    """The needed parts of the gradients of every block, and the parameters that have gradients.

    The others' are zeros.

    Where only slices are needed, each gradient is freed at once, so that only one is in memory.
    """
    places = {p: (b, i) for b in blocks for i, p in enumerate(b.params)}
    grads: dict[Tensor, Tensor] = {}

    def seen(param: Tensor, grad: Tensor) -> None:
        part = take(*places[param], grad if scale == 1 else grad / scale)
        grads[param] = grads[param] + part if param in grads else part

    scaled = loss if scale == 1 else loss * scale
    leaves = [p for p in places if p.requires_grad]
    if not leaves:
        check_dependence([])
    _differentiate(scaled, leaves, seen, freed=any(b.cut.stride > 1 for b in blocks))
    check_dependence([grads.get(p) for p in places])
    reached = set(grads)
    for param, (block, index) in places.items():
        if param not in grads:
            grads[param] = take(block, index, torch.zeros_like(param))
    return [[grads[p] for p in b.params] for b in blocks], reached


def _differentiate(
    loss: Tensor, leaves: Sequence[Tensor], seen: Callable[[Tensor, Tensor], None], *, freed: bool
) -> None:
    """Pass on the gradients of a loss, without changing ``.grad``; ``freed`` frees each at once.

    Sharded parameters need ``backward``, whose hooks reduce their gradients, and so do reentrant
    activation checkpoints, which call ``backward`` themselves.
    """
    if not any(map(is_sharded, leaves)) and not any(
        node.name() == "CheckpointFunctionBackward" for node in nodes(loss)
    ):

        def passed(param: Tensor, grad: Tensor) -> Tensor:
            seen(param, grad.detach())
            return grad.new_zeros(()).expand_as(grad)  # a placeholder without memory

        handles = [p.register_hook(partial(passed, p)) for p in leaves if freed]
        try:
            with gradients_apart(leaves):  # reversible layers call backward within their own
                grads = torch.autograd.grad(loss, leaves, allow_unused=True)
                inner = [p.grad for p in leaves]
        except RuntimeError as error:
            if "inplace operation" in str(error):  # weights have been exchanged since
                raise RuntimeError(OLD_LOSS) from error
            if "second time" not in str(error):
                raise
            raise RuntimeError(
                "closure returned a loss whose graph has been freed: run the model inside the "
                "closure, and return the loss without calling backward"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        for param, *both in zip(leaves, grads, inner, strict=True):
            for grad in () if freed else both:
                if grad is not None:
                    seen(param, grad)
        return
    with gradients_apart(leaves):
        loss.backward()
        for param in leaves:
            if param.grad is not None:
                seen(param, param.grad)
