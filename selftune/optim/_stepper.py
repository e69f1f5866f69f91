"""Weight steps by a rule of the library, or by a wrapped optimizer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from selftune._files import plain
from selftune.method import Moment, choice, fast_path
from selftune.optim._block import Block
from selftune.optim._reducer import Reducer
from selftune.rules import AbstractRule
from selftune.rules._base import Dots, Evaluation, InPlace, State, Values
from selftune.update import Transition, Update, learning_rate

log = logging.getLogger("selftune")


class Stepper:
    """Takes weight steps with a rule of the library, whose state is in the blocks.

    Attributes:
        name: Name that a loaded state must have.
        commits: Whether ``move`` writes parameters and state, and so cannot be undone.
        reducer: Sums over processes; the engine's.
    """

    commits = False
    reducer: Reducer | None = None

    def __init__(self, update: Update) -> None:
        self._update = update
        self._kernels: list[InPlace] = []  # for the step that is ready
        self.name = type(update.rule).__name__

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy; kernels are looked up in each step."""
        return {**self.__dict__, "_kernels": []}

    def move(
        self, blocks: Sequence[Block], grads: Sequence[Tensor], moments: Sequence[Moment]
    ) -> list[Transition]:
        """The weight step of every block; leaves the parameters unwritten unless it commits."""
        updates = [self._update.joined(block.layout) for block in blocks]
        parts = [block.part._replace(params=block.before()) for block in blocks]
        assert self.reducer is not None
        total, sharded = self.reducer.total, self.reducer.sharded
        return choice.propose_all(updates, parts, grads, moments, total, sharded=sharded)

    def ready(self, blocks: Sequence[Block], values: Sequence[Values]) -> list[list[Tensor]] | None:
        """Gradients of every block if they are suitable for ``step``, else None.

        They must exist and be finite, and torch must have a kernel for the rule.
        """
        kernels = [fast_path.kernel(self._update, v) for v in values]
        self._kernels = [kernel for kernel in kernels if kernel is not None]
        return _plain_gradients(blocks) if len(self._kernels) == len(kernels) else None

    def step(
        self,
        blocks: Sequence[Block],
        grads: Sequence[Sequence[Tensor]],
        moments: Sequence[Moment],
        *,
        tracked: bool,
    ) -> list[Transition]:
        steps = [
            fast_path.of_slice(self._update, block.cut, _tensors(block, g, moment), moment)
            for block, g, moment in zip(blocks, grads, moments, strict=True)
            if tracked
        ]
        for block, kernel, g, (values, _, clock, *_) in zip(
            blocks, self._kernels, grads, moments, strict=True
        ):
            block.step_in_place(kernel, list(g), float(learning_rate(values, clock)))
        self._kernels = []
        return steps

    def forget(self) -> None:
        """Reset the state besides the blocks'."""

    @property
    def state(self) -> Mapping[Tensor, Any]:
        return {}

    def rest(self) -> dict[str, Any]:
        """Further state, saved with the run."""
        return {}

    def restore(self, rest: Mapping[str, Any]) -> None:
        """Load what ``rest`` has saved."""

    def make_state(self) -> None:
        """Create this state by a step with zero gradients and rate, before loading."""

    def expose(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Write this state to where it is saved."""

    def adopt(self, state: Mapping[Tensor, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Read this state and the parameter groups from where they were loaded."""


class Opaque(AbstractRule):
    """A rule known only by its effect: ``w₊ = w − η (d + λ w)``, d from the change of w."""

    hparams = ()
    decoupled = True
    shrinks = False
    tuned = ("lr", "weight_decay")
    defaults: Mapping[str, Any] = MappingProxyType({})

    def init(self, params: Tensor, values: Values) -> State:
        return {}

    def direction(self, *args: Any) -> tuple[Tensor, State]:
        raise TypeError("an opaque optimizer takes its own steps, so its direction is unknown")

    def tangent(self, at: Evaluation, dots: Dots) -> tuple[Tensor, State]:
        return torch.zeros_like(at.grads), {}


class InnerStepper(Stepper):
    """Steps with another optimizer, and computes the direction from the change of the weights."""

    commits = True

    def __init__(self, inner: torch.optim.Optimizer, update: Update) -> None:
        super().__init__(update)
        self._inner = inner
        # Of optimizers that make it when they are created, which `forget` has to bring back.
        self._initial = {p: _copied(entry) for p, entry in inner.state.items()}
        self._counts = [group.get("step") for group in inner.param_groups]
        self.name = f"SelfTuning({type(inner).__name__})"

    def move(
        self, blocks: Sequence[Block], grads: Sequence[Tensor], moments: Sequence[Moment]
    ) -> list[Transition]:
        """``d + λ w = (w − w₊)/η``, with the tuned η and λ shown to the inner optimizer."""
        before = [b.before() for b in blocks]
        rates = self._shown_step(moments)
        return [
            self._seen(grad, old, block.weights(), rate, moment)
            for block, grad, old, rate, moment in zip(
                blocks, grads, before, rates, moments, strict=True
            )
        ]

    def _seen(
        self, grads: Tensor, old: Tensor, moved: Tensor, rate: float, moment: Moment
    ) -> Transition:
        """The step, from the weights before and after it."""
        total = (old - moved) / max(rate, 1e-30)
        direction = total - moment.values["weight_decay"] * old
        return Transition(
            self._update, old, grads, {}, moment.values, moment.clock, direction, total, {}, moved
        )

    def _shown_step(self, moments: Sequence[Moment]) -> list[float]:
        """Step the inner optimizer with the tuned values in its groups; return the rates."""
        rates = [float(learning_rate(m.values, m.clock)) for m in moments]
        groups = self._inner.param_groups
        shown = [(_number(g["lr"]), g["weight_decay"]) for g in groups]
        for moment, rate in zip(moments, rates, strict=True):
            _show(groups[moment.values["index"]], rate, moment.values["weight_decay"])
        before = [_on_host(g["lr"]) for g in groups]
        factors = [1.0] * len(groups)
        try:
            self._step()
            # An optimizer that adapts its rate by itself continues from what it has written.
            pairs = zip(groups, before, strict=True)
            factors = [_on_host(g["lr"]) / rate if rate else 1.0 for g, rate in pairs]
        finally:
            for group, (lr, decay), factor in zip(groups, shown, factors, strict=True):
                _show(group, lr if factor == 1 else lr * factor, decay)
        return rates

    def ready(self, blocks: Sequence[Block], values: Sequence[Values]) -> list[list[Tensor]] | None:
        return _plain_gradients(blocks)

    def step(
        self,
        blocks: Sequence[Block],
        grads: Sequence[Sequence[Tensor]],
        moments: Sequence[Moment],
        *,
        tracked: bool,
    ) -> list[Transition]:
        before = [b.slice(b.params) for b in blocks if tracked]
        rates = self._shown_step(moments)
        for block in blocks:
            block.count()
        return [
            self._seen(block.slice(g), old, block.slice(block.params), rate, moment)
            for block, g, old, rate, moment in zip(
                blocks if tracked else (), grads, before, rates, moments, strict=False
            )
        ]

    def _step(self) -> None:
        """The inner step with its own hooks, without its wrapper: global hooks fire once."""
        inner, step = self._inner, type(self._inner).step
        for before in inner._optimizer_step_pre_hooks.values():
            before(inner, (), {})
        getattr(step, "__wrapped__", step)(inner)
        for after in inner._optimizer_step_post_hooks.values():
            after(inner, (), {})

    def make_state(self) -> None:
        """Let the inner optimizer create its state, without changing the weights."""
        self._step()

    def forget(self) -> None:
        """Return to the inner optimizer's first state; the rest it creates at its next step."""
        self._inner.state.clear()
        self._inner.state.update({p: _copied(entry) for p, entry in self._initial.items()})
        for group, count in zip(self._inner.param_groups, self._counts, strict=False):
            group.pop("step", None)  # bias corrections, with the moments
            if count is not None:
                group["step"] = _copied(count)

    def rest(self) -> dict[str, Any]:
        """State that is no parameter's: under other keys, or of the optimizer's own methods."""
        keyed = {k: v for k, v in self._inner.state.items() if not isinstance(k, Tensor)}
        own = type(self._inner).state_dict is not torch.optim.Optimizer.state_dict
        whole = self._inner.state_dict() if own else {}
        more = {k: v for k, v in whole.items() if k not in ("state", "param_groups")}
        rest = {"keyed": _copied(keyed), "own": _copied(more)}
        for part, entries in rest.items():
            if lost := sorted(str(k) for k, v in entries.items() if not plain(v)):
                log.warning(
                    "%s: its state %s cannot be saved: after loading it starts anew",
                    self.name,
                    lost,
                )
                rest[part] = {k: v for k, v in entries.items() if plain(v)}
        return rest

    def restore(self, rest: Mapping[str, Any]) -> None:
        """Load what ``rest`` has saved."""
        if rest["own"]:
            groups, adopted = self._inner.param_groups, dict(self._inner.state)
            self._inner.load_state_dict({**self._inner.state_dict(), **_copied(rest["own"])})
            self._inner.param_groups = groups
            self._inner.state.clear()  # torch casts it to the types of the parameters
            self._inner.state.update(adopted)
        self._inner.state.update(_copied(rest["keyed"]))

    @property
    def state(self) -> Mapping[Tensor, Any]:
        return self._inner.state

    def expose(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Write the inner state of each parameter under ``inner``."""
        for entry in state.values():
            entry.pop("inner", None)  # of an earlier call, before a rewind
        for param, inner in self._inner.state.items():
            if isinstance(param, Tensor):
                state[param]["inner"] = dict(inner)

    def adopt(self, state: Mapping[Tensor, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Read the inner state of each parameter from ``inner``."""
        self._inner.state.clear()
        for param, entry in state.items():
            if "inner" in entry:
                self._inner.state[param] = _copied(entry["inner"])  # it steps in place
        self._inner.param_groups = groups


def _copied(state: Any) -> Any:
    """A deep copy; quantised tensors (torchao) support ``to``, but not ``clone``."""
    if isinstance(state, Tensor):
        return state.detach().to(state.device, copy=True)
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    return copy.deepcopy(state)


def _on_host(rate: Any) -> float:
    """A rate as a number; 0 for one on a GPU, which would synchronise."""
    return 0.0 if isinstance(rate, Tensor) and rate.is_cuda else float(rate)


def _number(rate: Any) -> Any:
    """A copy of a rate stored in a tensor."""
    return rate.clone() if isinstance(rate, Tensor) else rate


def _show(group: dict[str, Any], rate: Any, decay: Any) -> None:
    """Write to a group; a rate in a tensor (torchao, ``capturable``) is written in place."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
    group["weight_decay"] = decay


def _plain_gradients(blocks: Sequence[Block]) -> list[list[Tensor]] | None:
    """All gradients, if they exist, are finite, and are supported by torch's kernels."""
    native = [b.params for b in blocks if b.layout.native]
    gradients = [grads for some in native if (grads := fast_path.plain(some)) is not None]
    if len(gradients) < len(blocks) or not fast_path.finite(
        [g for grads in gradients for g in grads]
    ):
        return None
    return gradients


def _tensors(block: Block, grads: Sequence[Tensor], moment: Moment) -> tuple[Tensor, Tensor, State]:
    """The inputs of the step of a block's slice; gradients are negated for ``maximize``."""
    some = block.slice(grads)
    some = -some if moment.values.get("maximize") else some
    return block.slice(block.params), some, block.part.rule
