"""Parameters and multiply-adds of a model, as a function of the units that are closed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from selftune._modes import attention_by_steps
from selftune.structure._channels import Follower
from selftune.structure._folding import replace_optionals
from selftune.structure._tracing import Tracer, call, plain_copy
from selftune.structure.gates import AbstractGated, Optional, gated
from selftune.structure.recurrent import Recurrent
from selftune.structure.transformer import Attention

KINDS = ("parameters", "multiply_adds")
COUNTED = (
    nn.Linear, _ConvNd, Recurrent, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
)  # fmt: skip
"""Layers whose multiply-adds are counted."""
Place = tuple[str, int]
"""Name of a module with gates, and the index of one of them."""


@dataclass(frozen=True)
class _Block:
    """A tensor of weights with axes of units.

    Attributes:
        fixed: Number of weights at one position of all axes.
        axes: The unit of each position, by axis; −1 if it cannot be removed.
        positions: Multiply-adds per weight in one example; 0 for a bias.
        within: Units of ``Optional`` blocks whose removal removes the whole tensor.
    """

    fixed: float
    axes: tuple[NDArray[np.int64], ...]
    positions: float
    within: tuple[int, ...]

    @cached_property
    def kinds(self) -> NDArray[np.float64]:
        """Parameters and multiply-adds of one weight, shape (2,)."""
        return np.array([1.0, self.positions])


class Sizes:
    """The size of a model with some of its units closed.

    A unit comprises everything that shares a channel; it is removed if all of its gates are closed.
    The size counts weights and biases, and the multiply-adds of weights of Linear,
    convolution, recurrent and attention layers for one example, also inside torch's encoder and
    decoder layers; those of functions, such as ``F.linear``, and of attention scores are not
    counted.

    Args:
        model: A model with gates. It is not modified.
        example: An input, or a tuple of inputs.

    Attributes:
        idle: Names of modules none of whose units can be removed.
        places: The gates of each unit that can be removed.
        axes: The unit of each gate of each module, or −1 if it cannot be removed.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        inputs = example if isinstance(example, tuple) else (example,)
        plain = plain_copy(model)
        firsts = {id(m): n for n, m in gated(plain) if isinstance(m, Optional)}
        optionals = [*firsts.values()]
        paths = {
            n: firsts[id(m)]
            for n, m in plain.named_modules(remove_duplicate=False)
            if isinstance(m, Optional)
        }
        with torch.no_grad():
            batch = _examples(plain, inputs)
            replace_optionals(plain, whole=True)
            graph = fx.GraphModule(plain, Tracer().of(plain, inputs))
            follower = Follower(graph, math.inf)
            with _counted(plain, batch) as positions:
                follower.run(*inputs)
        self.places: list[list[Place]] = []
        self.axes: dict[str, NDArray[np.int64]] = {}
        self._number(follower, optionals, dict(gated(model)))
        self._blocks = self._made(follower, plain, optionals, paths, positions)
        self.whole = self.count(np.zeros(len(self.places), dtype=bool))

    def _number(
        self, follower: Follower, optionals: list[str], modules: dict[str, AbstractGated]
    ) -> None:
        """Number the units that can be removed: those of the graph, and Optional blocks."""
        self._numbers: dict[int, int] = {}
        removable = follower.units.removable()
        for cut in follower.units.cuts.values():
            if not isinstance(cut.module, AbstractGated) or cut.name != "gates":
                continue
            roots = [follower.units.root(u) for u in cut.ids]
            for at, root in enumerate(roots):
                if root in removable:
                    unit = self._numbers.setdefault(root, len(self._numbers))
                    if unit == len(self.places):
                        self.places.append([])
                    self.places[unit].append((cut.path, at))
            self.axes[cut.path] = self._units(follower, cut.ids)
        self._optionals: dict[str, int] = {}
        for name in optionals:
            self._optionals[name] = len(self.places)
            self.axes[name] = np.array([len(self.places)])
            self.places.append([(name, 0)])
        for name, module in modules.items():
            self.axes.setdefault(name, np.full(len(module.gates), -1))
        self.idle = [name for name, axis in self.axes.items() if bool((axis < 0).all())]

    def _units(self, follower: Follower, ids: Iterable[int]) -> NDArray[np.int64]:
        return np.array([self._numbers.get(follower.units.root(u), -1) for u in ids])

    def _made(
        self, follower: Follower, plain: nn.Module, optionals: list[str],
        paths: Mapping[str, str], positions: Mapping[int, float],
    ) -> list[_Block]:  # fmt: skip
        """A block for each parameter."""
        cuts: dict[int, list[tuple[int, NDArray[np.int64]]]] = {}
        for (tensor, axis), cut in follower.units.cuts.items():
            cuts.setdefault(tensor, []).append((axis, self._units(follower, cut.ids)))
        blocks: list[_Block] = []
        names: dict[int, list[str]] = {}
        for name, param in plain.named_parameters(remove_duplicate=False):
            names.setdefault(id(param), []).append(name)
        for name, param in plain.named_parameters():
            if isinstance(plain.get_submodule(name.rpartition(".")[0]), AbstractGated):
                continue
            axes = cuts.get(id(param), [])
            fixed = param.numel() / math.prod(len(units) for _, units in axes)
            # A block of several Optionals counts as kept: closing one of them does not remove it.
            each = [
                {n for path, n in paths.items() if used.startswith(f"{path}.")}
                for used in names[id(param)]
            ]
            within = tuple(self._optionals[n] for n in optionals if all(n in e for e in each))
            times = positions.get(id(param), 0.0)
            blocks.append(_Block(fixed, tuple(u for _, u in axes), times, within))
        return blocks

    def count(self, gone: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Parameters and multiply-adds without some units, shape (2,)."""
        total, padded = np.zeros(2), np.append(gone, False)
        for block in self._blocks:
            if not any(gone[u] for u in block.within):
                kept = math.prod(len(a) - np.count_nonzero(padded[a]) for a in block.axes)
                total += block.kinds * (block.fixed * kept)
        return total

    def saved(self, gone: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Parameters and multiply-adds saved by removing each unit next, shape (2, units)."""
        total, padded = np.zeros((2, len(gone))), np.append(gone, False)
        for block in self._blocks:
            if any(gone[u] for u in block.within):
                continue
            numel, stay = block.fixed, np.ones(len(gone))
            for axis in block.axes:
                left = axis[~padded[axis]]
                numel *= len(left)
                stay *= 1 - np.bincount(left[left >= 0], minlength=len(gone)) / max(len(left), 1)
            for unit in block.within:
                stay[unit] = 0.0
            total += block.kinds[:, None] * (numel * (1 - stay))
        return total

    def last(self, gone: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which units are the last of a layer and are therefore kept; shape (units,)."""
        last, padded = np.zeros(len(gone), dtype=bool), np.append(gone, False)
        optional = set(self._optionals)
        for name, axis in self.axes.items():
            left = np.unique(axis[~padded[axis]])
            if name not in optional and len(left) == 1 and left[0] >= 0:
                last[left[0]] = True
        return last

    def floor(self) -> NDArray[np.float64]:
        """The size with one unit in each layer and no Optional block, shape (2,)."""
        gone = np.zeros(len(self.places), dtype=bool)
        for unit in range(len(gone)):
            gone[unit] = not self.last(gone)[unit]
        return self.count(gone)

    def target(self, budget: float | None, kinds: Sequence[str]) -> NDArray[np.float64]:
        """The final sizes for a budget, shape (2,); inf if unconstrained."""
        whole, least = self.whole, self.floor()
        counted = np.array([k in kinds for k in KINDS])
        if budget is None:
            return np.where(counted, 0.0, np.inf)
        if not budget > 0:
            raise ValueError(f"budget={budget} must be above 0")
        if budget > 1 and len(kinds) > 1:
            raise ValueError(f"budget={budget} of {kinds}: two sizes need a share, in (0, 1]")
        target = np.where(counted, budget if budget > 1 else budget * whole, np.inf)
        for kind, wanted, most, fewest in zip(KINDS, target, whole, least, strict=True):
            if np.isfinite(wanted) and wanted > most:
                raise ValueError(
                    f"budget={budget:g}: the model has only {most:,.0f} {kind}; pass a smaller "
                    "number, or a fraction below 1"
                )
            if wanted < fewest:
                raise ValueError(
                    f"budget={budget:g}: with one unit open in each layer the model has "
                    f"{fewest:,.0f} {kind} of {most:,.0f}; raise the budget, or gate more layers"
                )
        return target


def _examples(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Number of examples in a pass: along the first axis, or one that a gated module names."""
    found: list[float] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        read = next(iter((*args, *kwargs.values())), None)
        gate = isinstance(module, AbstractGated)
        axis = module.batch_dim if gate else int(not module.batch_first)
        if axis and isinstance(read, Tensor):
            found.append(float(read.shape[axis]))

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (AbstractGated, Attention)):
                hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        call(model, inputs)
    usual = (float(len(i)) for i in tree_leaves(inputs) if isinstance(i, Tensor) and i.ndim)
    return next(iter((*found, *usual)), 1.0)


@contextmanager
def _counted(model: nn.Module, batch: float) -> Iterator[dict[int, float]]:
    """Multiply-adds per weight for one example, by the id of the parameter, over all its uses.

    Hooks also count layers inside torch's composite layers, unless those use a fused kernel.
    """
    positions: dict[int, float] = {}

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        for param, times in _uses(module, (*args, *kwargs.values()), kwargs, output):
            if isinstance(param, nn.Parameter):
                positions[id(param)] = positions.get(id(param), 0.0) + times / batch

    with attention_by_steps(), ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, COUNTED):
                undo.enter_context(module.register_forward_hook(count, with_kwargs=True))
        yield positions


def _uses(
    module: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
) -> Iterator[tuple[Any, float]]:
    """The weights of a layer, each with the number of positions at which a call uses it."""
    if isinstance(module, nn.Linear):
        yield module.weight, output.numel() / module.out_features
    elif isinstance(module, _ConvNd):
        yield module.weight, (args[0].numel() / module.in_channels if module.transposed
                              else output.numel() / module.out_channels)  # fmt: skip
    elif isinstance(module, nn.MultiheadAttention):
        given: dict[str, Any] = dict(zip(("query", "key", "value"), args, strict=False))
        given |= kwargs
        tokens = [given[n].numel() / given[n].shape[-1] for n in ("query", "key", "value")]
        own = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        yield from zip(own, tokens, strict=True)
        yield module.in_proj_weight, sum(tokens) / 3
        yield module.out_proj.weight, tokens[0]
    else:  # recurrent
        cell = module.cell if isinstance(module, Recurrent) else module
        states: Any = output[0] if isinstance(output, tuple) else output
        states = getattr(states, "data", states)  # of a packed sequence
        for name, param in cell.named_parameters():
            if name.startswith("weight"):
                yield param, states.numel() / states.shape[-1]
