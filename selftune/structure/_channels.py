"""Tracks units through a model's graph: which layers share them, and where they are 0."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from selftune.structure import _inside
from selftune.structure import _operations as ops
from selftune.structure._tracing import hooked
from selftune.structure._units import Channels, Tracked
from selftune.structure.choice import mixed
from selftune.structure.gates import Gate
from selftune.structure.recurrent import Recurrent


class Follower(Tracked):
    """Runs a model on an example, and tracks the units of every value."""

    def __init__(self, graph: fx.GraphModule, threshold: float) -> None:
        super().__init__(graph, threshold)
        self._shared = _shared(graph)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, then track its units."""
        value = self.values[n] = super().run_node(n)
        channels = None
        if n.op == "output":
            self.units.need(*self._of(n.args))
        elif n.op == "call_module":
            channels = self._module(n, value)
        elif n.op in ("call_function", "call_method"):
            channels = self._operation(n, value)
        self.channels[n] = channels
        return value

    # modules

    def _module(self, node: fx.Node, value: Any) -> Channels | None:
        path = str(node.target)
        module = self.fetch_attr(path)
        inputs = self._of((node.args, node.kwargs))
        given = inputs[0] if len(inputs) == 1 else None
        if isinstance(module, Recurrent):
            _inside.recurrent(self, node, module, given)
            return None
        if isinstance(module, nn.Linear):
            return self._layer(node, module, given, value.ndim - 1)
        if isinstance(module, _ConvNd):
            return self._convolution(node, module, given, value)
        if given is None:
            return self._whole(node, module)
        if isinstance(module, Gate) and given.axis == module.dim % value.ndim:
            self.units.cut(path, module, "gates", 0, given.ids)
            closed = module.closed(self.threshold).to(given.zero.device)
            return Channels(given.axis, given.ids, given.zero | closed)
        if isinstance(module, _BatchNorm) and given.axis == 1:
            return self._batch_norm(path, module, given)
        if isinstance(module, ops.ELEMENTWISE):
            return self._elementwise(node, given, value)
        pads = getattr(module, "padding", ()) if isinstance(module, ops.RESIZING) else ()
        if len(pads) // 2 >= getattr(value, "ndim", 0) - given.axis:  # also along the units
            return self.unknown(node)
        if isinstance(module, (*ops.POOLS, *ops.RESIZING)) and isinstance(value, Tensor):
            return self._resized(node, given, value)
        if isinstance(module, (nn.Flatten, nn.Unflatten)):
            return self._reshaped(node, given, value)
        return self._whole(node, module)

    def _layer(
        self, node: fx.Node, module: nn.Module, given: Channels | None, axis: int
    ) -> Channels:
        """A layer with a row for each output unit and a column for each input unit.

        The other way round in a transposed convolution.
        """
        path = str(node.target)
        linear = isinstance(module, nn.Linear)
        across = int(not getattr(module, "transposed", False))
        ins, outs = ("in_features", "out_features") if linear else ("in_channels", "out_channels")
        if given is not None and given.axis == axis:
            self.units.cut(path, module, "weight", across, given.ids, [ins])
            self.units.use(given)
        else:
            self.unknown(node)
            self.keep(path, module, "weight", across)
        size = getattr(module, outs)
        made = Channels(
            axis, self.units.new(size), torch.zeros(size, dtype=torch.bool, device="cpu")
        )
        self.units.cut(path, module, "weight", 1 - across, made.ids, [outs])
        self.units.cut(path, module, "bias", 0, made.ids)
        if self._tied(module) or hooked(module):
            self.units.need(given, made)
        return made

    def _convolution(
        self, node: fx.Node, module: _ConvNd, given: Channels | None, value: Tensor
    ) -> Channels | None:
        axis = value.ndim - len(module.kernel_size) - 1
        if module.groups == 1:
            return self._layer(node, module, given, axis)
        depthwise = module.groups == module.in_channels == module.out_channels
        kept = hooked(module) or self._tied(module)
        if given is None or not depthwise or given.axis != axis or kept:
            return self._whole(node, module)
        sizes = ["in_channels", "out_channels", "groups"]
        self.units.cut(str(node.target), module, "weight", 0, given.ids, sizes)
        self.units.cut(str(node.target), module, "bias", 0, given.ids)
        still = torch.ones_like(given.zero) if module.bias is None else module.bias.cpu() == 0
        if self.ahead and module.bias is not None:
            still = torch.zeros_like(given.zero)  # training changes it
        return Channels(axis, given.ids, given.zero & still)

    def _whole(self, node: fx.Node, module: nn.Module) -> Channels | None:
        """A module that acts on all units of an input without known ones."""
        if isinstance(module, (Gate, _BatchNorm, _ConvNd)):
            for name in ("gates", "weight", "bias", "running_mean", "running_var"):
                self.keep(str(node.target), module, name, 0)
        return self.unknown(node)

    def _tied(self, module: nn.Module) -> bool:
        """Whether other modules have its parameters too."""
        return any(id(p) in self._shared for p in module._parameters.values())

    def _batch_norm(self, path: str, module: _BatchNorm, given: Channels) -> Channels:
        """A closed unit is 0 afterwards only if the norm leaves 0 at 0."""
        for at, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            sizes = ["num_features"] if at == 0 or name == "running_mean" else []
            self.units.cut(path, module, name, 0, given.ids, sizes)
        if module.running_mean is None or self._tied(module):
            self.units.need(given)
        if module.running_mean is None:
            return given
        if self.ahead:  # a new norm has means and biases of 0, which training changes
            return given.shifted()
        at_zero = F.batch_norm(
            torch.zeros_like(module.running_mean)[None], module.running_mean, module.running_var,
            module.weight, module.bias, eps=module.eps,
        )  # fmt: skip
        return Channels(1, given.ids, given.zero & (at_zero[0] == 0).cpu())

    # functions and methods

    def _operation(self, node: fx.Node, value: Any) -> Channels | None:
        target = node.target
        if target in ops.SIZES and not isinstance(value, Tensor):
            return None
        inputs = self._of((node.args, node.kwargs))
        if target is operator.getitem and node.args[0] in self.pieces:
            return _inside.item(self, node)
        given = inputs[0] if inputs else None
        if target in ops.CHUNKS and given is not None:
            _inside.chunks(self, node, given)
            return None
        if not any(c is not None for c in inputs) or not isinstance(value, Tensor):
            return self.unknown(node)
        if target is operator.getitem and len(inputs) == 1 and given is not None:
            return _inside.indexed(self, node, given)
        rules: list[tuple[set[Any], Callable[[fx.Node, Channels, Tensor], Channels | None]]] = [
            (ops.MAPS, self._elementwise),
            (ops.MASKED, lambda n, c, v: c.shifted()),
            (ops.POOLED, self._resized),
            (ops.PADS, self._padded),
            (ops.SQUEEZES, partial(_inside.squeezed, self)),
            (ops.RESHAPES, self._reshaped),
            (ops.MEANS, self._mean),
            (ops.TRANSPOSES, partial(_inside.transposed, self)),
            (ops.PERMUTES, partial(_inside.permuted, self)),
            (ops.SOFTMAXES, partial(_inside.softmax, self)),
        ]
        for targets, rule in rules:
            if target in targets and given is not None and not any(inputs[1:]):
                return rule(node, given, value)
        if target in ops.SUMS and node.users:  # else in place, and seen by other nodes
            those, others = self._operands(node, value)
            return self._sum(node, [*those, *(None for _ in others)])
        if target is mixed:
            return self._sum(node, self._of(node.args[0]))
        if target in ops.EXPANSIONS:
            return self._expanded(node, value)
        if target in ops.PRODUCTS:
            return self._product(node, value)
        if target in ops.CATS:
            return self._cat(node, value)
        if target in ops.ATTENTION or target in ops.MATMULS:
            return _inside.attended(self, node, value)
        return self.unknown(node)

    def _elementwise(self, node: fx.Node, given: Channels, value: Tensor) -> Channels:
        """An elementwise function: closed units stay 0 if it maps 0 to 0."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _zeros(self.values[n]))
        at_zero = getattr(self, node.op)(node.target, args, kwargs)
        return given.shifted() if at_zero.any() else given

    def _resized(self, node: fx.Node, given: Channels, value: Tensor) -> Channels | None:
        """Pooling of the last axes, as many as its name says, or of all but the first two."""
        module = self.submodules.get(str(node.target)) if node.op == "call_module" else None
        name = getattr(node.target, "__name__", type(module).__name__)
        last = int(name[-2]) if name[-2].isdecimal() else value.ndim - 2
        return given if given.axis < value.ndim - last else self.unknown(node)

    def _padded(self, node: fx.Node, given: Channels, value: Tensor) -> Channels | None:
        """Padding of the axes after that of the units; closed ones stay 0 if it is with 0."""
        args: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False))
        args |= node.kwargs
        if len(args["pad"]) // 2 >= value.ndim - given.axis:  # also along the units
            return self.unknown(node)
        shifted = args.get("mode", "constant") == "constant" and args.get("value")
        return Channels(given.axis, given.ids, given.zero & (not shifted))

    def _expanded(self, node: fx.Node, value: Tensor) -> Channels | None:
        """A tensor with one value for each unit, repeated in the shape of another."""
        those, others = self._operands(node, value)
        return self.unknown(node) if others else self.join(node, those, lambda own, _: own)

    def _reshaped(self, node: fx.Node, given: Channels, value: Tensor) -> Channels | None:
        """A reshape: find the axis of the units in the new shape.

        ``(N, C, H, W)`` to ``(N, C·H·W)``: each unit is repeated H·W times.
        """
        before, after = self.values[node.all_input_nodes[0]].shape, value.shape
        lead = math.prod(before[: given.axis])
        for axis in range(len(after)):
            repeats = after[axis] / before[given.axis]
            if math.prod(after[:axis]) == lead and repeats.is_integer() and repeats >= 1:
                times = int(repeats)
                ids = [u for u in given.ids for _ in range(times)]
                return Channels(axis, ids, given.zero.repeat_interleave(times))
        # (N, L, H·D) to (N, L, H, D): the D units of a head become one
        axis = given.axis
        same = after[:axis] == before[:axis] and len(after) > axis + 1
        if same and after[axis] * after[axis + 1] == before[axis]:
            return _inside.split(self.units, axis, given, after[axis])
        return self.unknown(node)

    def _mean(self, node: fx.Node, given: Channels, value: Tensor) -> Channels | None:
        """A reduction over other axes."""
        args: dict[str, Any] = dict(zip(("input", "dim", "keepdim"), node.args, strict=False))
        args |= node.kwargs
        ndim = self.values[node.all_input_nodes[0]].ndim
        dims = args.get("dim")
        axes = [d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))]
        if given.axis in axes:
            return self.unknown(node)
        gone = 0 if args.get("keepdim") else sum(a < given.axis for a in axes)
        return Channels(given.axis - gone, given.ids, given.zero)

    def _operands(self, node: fx.Node, value: Tensor) -> tuple[list[Channels], list[Any]]:
        """Operands with units along one axis of the result, and the other operands."""
        those, others = [], []
        for arg in (*node.args, *node.kwargs.values()):
            channels = self.channels[arg] if isinstance(arg, fx.Node) else None
            shape = getattr(self.values.get(arg) if isinstance(arg, fx.Node) else arg, "shape", ())
            if channels is not None and len(shape) == value.ndim:
                those.append(channels)
            else:
                others.append(arg)
        return those, others

    def _sum(self, node: fx.Node, terms: Sequence[Channels | None]) -> Channels | None:
        """Join units that are added; the sum is 0 if all are 0."""
        those = [c for c in terms if c is not None]
        if len(those) < len(terms):
            return self.unknown(node)
        return self.join(node, those, operator.and_)

    def _product(self, node: fx.Node, value: Tensor) -> Channels | None:
        """Join units that are multiplied; the product is 0 if either is 0."""
        those, others = self._operands(node, value)
        numbers = all(isinstance(o, (int, float)) for o in others)
        quotient = node.target is operator.truediv and len(those) > 1
        if not numbers or quotient:
            return self.unknown(node)
        return self.join(node, those, operator.or_)

    def _cat(self, node: fx.Node, value: Tensor) -> Channels | None:
        """Concatenate units along their axis; along another axis they must be kept."""
        args: dict[str, Any] = dict(zip(("tensors", "dim"), node.args, strict=False))
        args |= node.kwargs
        parts: Any = args["tensors"]
        if isinstance(parts, fx.Node):
            return self.unknown(node)
        axis = args.get("dim", 0) % value.ndim
        ids: list[int] = []
        zeros: list[Tensor] = []
        for part in parts:
            channels = self.channels[part]
            if channels is None or channels.axis != axis:
                return self.unknown(node)
            ids += channels.ids
            zeros.append(channels.zero)
        return Channels(axis, ids, torch.cat(zeros))


def _zeros(value: Any) -> Any:
    """Zeros like a tensor; other arguments, such as a dtype, as they are."""
    return torch.zeros_like(value) if isinstance(value, Tensor) else value


def _shared(graph: fx.GraphModule) -> set[int]:
    """Parameters shared by several modules, such as tied weights; their units are kept."""
    owners: dict[int, set[int]] = {}
    for module in graph.modules():
        for param in module._parameters.values():
            if param is not None:
                owners.setdefault(id(param), set()).add(id(module))
    return {param for param, users in owners.items() if len(users) > 1}
