"""Removes gates from a model by folding their factors into an adjacent layer's weights."""

from __future__ import annotations

import operator
from inspect import Parameter, signature
from itertools import takewhile

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from selftune.structure._channels import Follower
from selftune.structure._operations import POOLS
from selftune.structure._tracing import hooked
from selftune.structure.gates import Gate, Optional

THROUGH = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
"""Modules with f(g x) = g f(x)."""
THROUGH_POSITIVE = (nn.ReLU, nn.LeakyReLU, *POOLS)
"""Modules with f(g x) = g f(x) for g ≥ 0."""
CONSTANTS = (type(None), bool, int, float, str)
"""Types of defaults that the code of a graph can have."""


def fold(follower: Follower, graph: fx.GraphModule, model: nn.Module) -> None:
    """Replace every gate by an identity, or by its factors if no adjacent layer can absorb it."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in list(modules.items()):
        if isinstance(module, Gate):
            factors, nodes = module.gates.detach().flatten(), calls.get(path, [])
            owned = sum(other is module for other in modules.values()) == 1 and len(nodes) == 1
            done = bool((factors == 1).all()) or (
                owned and (_back(nodes[0], module, follower, calls, modules)
                           or _forward(nodes[0], module, follower, calls, modules))
            )  # fmt: skip
            plain = nn.Identity() if done else scaled(factors.clone(), module.dim, nodes)
            model.set_submodule(path, plain)


def _back(
    node: fx.Node, gate: Gate, follower: Follower,
    calls: dict[str, list[fx.Node]], modules: dict[str, nn.Module],
) -> bool:  # fmt: skip
    """Fold a gate into the rows of the layer before it."""
    factors, at = gate.gates.detach().flatten(), node
    while True:
        if len(at.all_input_nodes) != 1:
            return False
        (at,) = at.all_input_nodes
        module = modules.get(str(at.target)) if at.op == "call_module" else None
        if module is None or len(at.users) > 1:
            return False
        through = THROUGH if bool((factors < 0).any()) else (*THROUGH, *THROUGH_POSITIVE)
        if not isinstance(module, through):
            break
    if not _alone(at, calls, modules) or not _same_axis(follower, at, node):
        return False
    takes = isinstance(module, (nn.Linear, _ConvNd)) and not getattr(module, "transposed", False)
    if takes or (isinstance(module, _BatchNorm) and module.affine):
        _scale(module, "weight", factors, 0)
        _scale(module, "bias", factors, 0)
        return True
    return False


def _forward(
    node: fx.Node, gate: Gate, follower: Follower,
    calls: dict[str, list[fx.Node]], modules: dict[str, nn.Module],
) -> bool:  # fmt: skip
    """Fold a gate into the columns of the layer after it."""
    at = node
    while True:
        if len(at.users) != 1:
            return False
        before, at = at, next(iter(at.users))
        module = modules.get(str(at.target)) if at.op == "call_module" else None
        if module is None:
            return False
        if not isinstance(module, THROUGH):
            break
    if not _alone(at, calls, modules) or not _same_axis(follower, before, node):
        return False
    channels, ndim = follower.channels[node], follower.values[before].ndim
    takes = isinstance(module, nn.Linear) and channels is not None and channels.axis == ndim - 1
    if isinstance(module, _ConvNd) and not module.transposed and module.groups == 1:
        takes = channels is not None and channels.axis == ndim - len(module.kernel_size) - 1
    if takes:
        assert module is not None
        _scale(module, "weight", gate.gates.detach().flatten(), 1)
    return takes


def _alone(node: fx.Node, calls: dict[str, list[fx.Node]], modules: dict[str, nn.Module]) -> bool:
    """Whether a layer is called once and shares no parameters."""
    module = modules[str(node.target)]
    params = {id(p) for p in module.parameters(recurse=False)}
    owners = [m for m in set(modules.values()) for p in m._parameters.values() if id(p) in params]
    names = [name for name, other in modules.items() if other is module]
    read = {str(n.target).rpartition(".")[0] for n in node.graph.nodes if n.op == "get_attr"}
    if hooked(module) or read & {*names}:  # weights are computed, or read elsewhere
        return False
    return len(calls[str(node.target)]) == 1 and len(names) == 1 and {*owners} <= {module}


def _same_axis(follower: Follower, one: fx.Node, other: fx.Node) -> bool:
    a, b = follower.channels[one], follower.channels[other]
    return a is not None and b is not None and (a.axis, len(a.ids)) == (b.axis, len(b.ids))


def _scale(module: nn.Module, name: str, factors: Tensor, axis: int) -> None:
    tensor = getattr(module, name)
    if tensor is not None:
        shape = [1] * tensor.ndim
        shape[axis] = len(factors)
        with torch.no_grad():
            tensor.mul_(factors.view(shape).to(tensor.dtype))


def scaled(factors: Tensor, dim: int, nodes: list[fx.Node]) -> fx.GraphModule:
    """Multiplication by factors along a dimension, as a module of torch operations only."""
    ndims = {len(n.meta["shape"]) for n in nodes}
    root = nn.Module()
    graph = fx.Graph()
    given = graph.placeholder("input")
    if len(ndims) == 1:
        shape = [1] * ndims.pop()
        shape[dim] = len(factors)
        root.register_buffer("factors", factors.view(shape))
        product = graph.call_function(operator.mul, (given, _like(given, graph, nodes)))
    else:  # inputs of several ranks, or of an unknown one: only training calls the gate
        root.register_buffer("factors", factors)
        last = graph.call_function(torch.movedim, (given, dim, -1))
        product = graph.call_function(operator.mul, (last, _like(last, graph, nodes)))
        product = graph.call_function(torch.movedim, (product, -1, dim))
    graph.output(product)
    return fx.GraphModule(root, graph, "Scale")


def _like(given: fx.Node, graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    """The factors of a gate, in the type of inputs that are floating-point numbers."""
    factors = graph.get_attr("factors")
    floating = all(read.meta["floating"] for node in nodes for read in node.all_input_nodes)
    return graph.call_method("type_as", (factors, given)) if floating else factors


def replace_optionals(model: nn.Module, *, whole: bool = False) -> None:
    """Replace every closed Optional by an identity, the others by sums in torch operations only.

    If ``whole``, all are replaced by sums, with gates of 1.
    """
    plains: dict[int, nn.Module] = {}
    optionals = [
        (path, m) for path, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, Optional)
    ]  # fmt: skip
    for path, module in reversed(optionals):  # inner ones first
        if id(module) not in plains and whole:
            plains[id(module)] = as_sum(module.block, 1.0, module.residual)
        elif id(module) not in plains:
            closed = bool(module.closed().all())
            plains[id(module)] = _first(module.block) if closed else _sum(module)
        model.set_submodule(path, plains[id(module)])


def _sum(optional: Optional) -> nn.Module:
    gate = float(optional.gates)
    if gate == 1 and not optional.residual:
        return optional.block
    return as_sum(optional.block, gate, optional.residual)


def _arguments(graph: fx.Graph, block: nn.Module) -> list[fx.Node]:
    """The input, and further arguments of a block, such as masks."""
    try:
        _, *params = signature(block.forward).parameters.values()
    except ValueError:  # of torch.jit.trace
        params = []
    nodes = [graph.placeholder("input")]
    for param in takewhile(_constant, params):
        nodes.append(graph.placeholder(param.name, default_value=param.default))
    return nodes


def _constant(param: Parameter) -> bool:
    """Whether a graph can have an argument, with its default."""
    usual = param.default is param.empty or isinstance(param.default, CONSTANTS)
    return usual and param.kind in (param.POSITIONAL_ONLY, param.POSITIONAL_OR_KEYWORD)


def _first(block: nn.Module) -> nn.Module:
    """What is left of a closed block: the first of its arguments."""
    graph = fx.Graph()
    given, *others = _arguments(graph, block)
    graph.output(given)
    return fx.GraphModule(nn.Module(), graph, "Identity") if others else nn.Identity()


def as_sum(block: nn.Module, gate: float, residual: bool) -> fx.GraphModule:
    """``x + g · block(x)``, or ``(1 − g) · x + g · block(x)``, in torch operations only."""
    root = nn.Module()
    root.add_module("block", block)
    graph = fx.Graph()
    given, *others = _arguments(graph, block)
    output = graph.call_module("block", (given, *others))
    if not residual:
        kept = graph.call_function(operator.mul, (given, 1 - gate))
        given = kept
    if gate != 1:
        output = graph.call_function(operator.mul, (output, gate))
    graph.output(graph.call_function(operator.add, (given, output)))
    return fx.GraphModule(root, graph, "Residual")
