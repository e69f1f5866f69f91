"""The graph of a model, in which gates and modules of torch are single nodes."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from selftune._modes import every_random_kept
from selftune.structure.gates import Gate
from selftune.structure.recurrent import Recurrent
from selftune.structure.transformer import mask_types_noted

log = logging.getLogger("selftune")

HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks that compute a weight before each pass."""
NUMPYS = {"axis": "dim", "keepdims": "keepdim"}
"""NumPy's names of arguments, which torch's functions take too."""


def hooked(module: nn.Module) -> bool:
    """Whether a hook computes the weights of a layer, from tensors of the same size."""
    return any(isinstance(hook, HOOKS) for hook in module._forward_pre_hooks.values())


class Tracer(fx.Tracer):
    """Traces into the user's modules; torch's modules and gates are leaves."""

    proxy_buffer_attributes = True  # a buffer may be sliced by the length of an input

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is a node of the graph."""
        own = isinstance(m, (Gate, Recurrent))
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """The node of a call, or those inside it."""
        # A slice of an nn.Sequential is a new module, which the model does not have a name for.
        if isinstance(m, nn.Sequential):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def of(self, model: nn.Module, inputs: tuple[Any, ...] | None = None) -> fx.Graph:
        """The graph of a model.

        Arguments after ``inputs`` have their defaults; without inputs, all arguments of ``forward``
        are inputs of the graph.
        """
        fixed = None if inputs is None else _fixed(model, inputs)
        try:
            graph = self.trace(model, fixed)
        except Exception as error:
            raise ValueError(
                f"model cannot be traced by torch.fx: {error}. Prune the part of it that has the "
                "gates, or move data-dependent control flow out of forward"
            ) from error
        for node in graph.nodes:
            if node.op == "call_method" or _of_torch(node.target):
                node.kwargs = {NUMPYS.get(k, k): v for k, v in node.kwargs.items()}
        if inputs is not None:
            self._check_training(model, graph, fixed)
        return graph

    def _check_training(self, model: nn.Module, graph: fx.Graph, fixed: Any) -> None:
        """Warn of layers that are called in training only, whose units are not followed."""
        try:  # on a copy, because the forward of training may change buffers and attributes
            with every_random_kept():
                trained = Tracer().trace(copy.deepcopy(model).train(), fixed)
        except Exception:  # the forward compares values, for example, so nothing is known
            return
        known, called = (
            {str(n.target) for n in g.nodes if n.op == "call_module"} for g in (graph, trained)
        )
        # Others, such as dropout, have no parameters that would have to be cut.
        missed = [n for n in sorted(called - known) if [*model.get_submodule(n).parameters()]]
        if missed:
            log.warning(
                "%s: called in training mode only, so its inputs are not cut with the units of "
                "other layers. If they have gates, training of the pruned model fails there: "
                "prune the part of the model without these layers", ", ".join(missed),
            )  # fmt: skip


def _of_torch(target: Any) -> bool:
    return callable(target) and getattr(torch, getattr(target, "__name__", ""), None) is target


def original(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` has wrapped, or the model itself."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parametrized tensors are parameters.

    Not ``remove_parametrizations``, which changes the class that the copy shares with the model.
    """
    try:
        copied = copy.deepcopy(model).eval()
    except RuntimeError as error:
        names = [n or "model" for n, layer in model.named_modules() if hooked(layer)]
        if not names:
            raise
        raise ValueError(
            f"weights of {', '.join(names)} are set by hooks, and torch cannot copy the model: use "
            "torch.nn.utils.parametrizations.weight_norm or spectral_norm, or make pruned weights "
            "permanent by torch.nn.utils.prune.remove"
        ) from error
    for module in list(copied.modules()):
        if not parametrize.is_parametrized(module):
            continue
        values = {}
        for name, parts in module.parametrizations.items():  # type: ignore[operator, union-attr]
            value = getattr(module, name).detach()
            params = list(parts.parameters())
            trained = any(p.requires_grad for p in params)
            values[name] = nn.Parameter(value, requires_grad=trained) if params else value
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", hook).__module__ == parametrizations.__name__:
                del module._load_state_dict_pre_hooks[key]  # weight_norm's cannot be pickled
        for name, value in values.items():
            parameter = isinstance(value, nn.Parameter)
            (module.register_parameter if parameter else module.register_buffer)(name, value)
    return copied


def _fixed(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments of ``forward`` that the graph has as constants: None, and defaults after inputs."""
    params = list(inspect.signature(model.forward).parameters.values())
    fixed = {p.name: p.default for p in params[len(inputs) :] if p.default is not p.empty}
    return fixed | {p.name: None for p, x in zip(params, inputs, strict=False) if x is None}


def call(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The model's output on an example."""
    try:
        with mask_types_noted(model):
            return model(*inputs)
    except Exception as error:
        shapes = [tuple(t.shape) for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        raise ValueError(
            f"example of shape {', '.join(map(str, shapes))} does not fit the model: {error}"
        ) from error
