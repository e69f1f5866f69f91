"""Removes units and blocks with closed gates: a smaller dense model with the same outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from selftune._arguments import FUNCTION, MODULE, NONE, SHARE, Number, checked
from selftune.structure._channels import Follower
from selftune.structure._folding import fold, replace_optionals
from selftune.structure._tracing import Tracer, call, original, plain_copy
from selftune.structure.choice import Choice, choose
from selftune.structure.gates import AbstractGated, gated
from selftune.structure.insertion import COMPOSITES
from selftune.structure.recurrent import Recurrent

log = logging.getLogger("selftune")

TOLERANCE = 1e-5
"""Largest difference of outputs, relative to the largest output, or 1 if that is below."""


@checked(
    model=MODULE, threshold=SHARE, loss=FUNCTION | NONE, tolerance=Number(least=0, finite=False)
)
def prune(
    model: nn.Module, example: Any, *, threshold: float = 1e-2,
    loss: Callable[[nn.Module], Any] | None = None, tolerance: float = 0.01,
) -> nn.Module:  # fmt: skip
    """Remove closed units and blocks; returns a smaller model made of torch modules only.

    The outputs are those of ``model`` with closed gates set to exactly 0. Units with closed gates
    are removed from all layers that share them: rows of the layer that produces them, entries of
    norms, columns of the layers that read them. In residual connections, a unit is removed if it is
    closed in every summand, and is 0 otherwise. Factors of open gates are folded into adjacent
    weights; closed :class:`Optional` blocks become identities. If none of the units of a gate can
    be removed (before a LayerNorm or ``nn.LSTM``), its factors and units are kept.

    The graph is that of ``torch.fx.symbolic_trace``: data-dependent control flow cannot be
    traced. Hard-coded shapes in ``forward`` (``x.view(-1, 512)``) do not fit the smaller model; use
    ``x.flatten(1)``.

    Args:
        model: A model with gates. It is not modified.
        example: An input, or a tuple of inputs, of the size that the model is used with, if layers
            depend on it.
        threshold: A gate is closed if |g| is at most this value. The averaged gates at the end of a
            run reach exactly 0 only about a hundred steps after the gates themselves.
        loss: Required for models with :class:`Choice`: a function that takes the model and returns
            its loss, evaluated before and after each choice is replaced by one branch.
        tolerance: Maximum relative increase of that loss.

    Returns:
        A copy of the model with smaller layers, in the same training or evaluation mode.

    Raises:
        ValueError: The model has no gates, the example does not fit, its outputs are not finite or
            have no tensors, or the model cannot be traced.
        RuntimeError: The smaller model fails or has different outputs, or replacing the choices
            raises the loss by more than ``tolerance``.

    Examples:
        >>> from selftune.structure import Gate
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Gate(8), nn.Linear(8, 1))
        >>> with torch.no_grad():
        ...     net[2].gates[2:] = 0.0
        >>> prune(net, torch.zeros(1, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Identity()
          (3): Linear(in_features=2, out_features=1, bias=True)
        )
    """
    model = original(model)
    if isinstance(model, AbstractGated):
        raise ValueError(f"model is a {type(model).__name__} itself: pass the model it is part of")
    if not any(isinstance(m, (AbstractGated, Choice)) for m in model.modules()):
        raise ValueError(
            "model has no gates: put selftune.structure.Gate after the units that may be removed, "
            "selftune.structure.Optional around blocks, or use selftune.structure.with_gates"
        )
    inputs = example if isinstance(example, tuple) else (example,)
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.inference_mode(False), torch.no_grad():  # weights made in it cannot be trained
        pruned = plain_copy(model)
        for _, module in gated(pruned):
            module.gates[module.closed(threshold)] = 0.0
        pruned = choose(pruned, loss, tolerance)
        before = call(pruned, inputs)
        outputs = _tensors(before)
        if not outputs:
            raise ValueError(
                f"model: its output, a {type(before).__name__}, has no tensors that can be "
                "compared with those of a smaller model: return tensors, or tuples, dictionaries "
                "or dataclasses of them"
            )
        if not all(bool(t.isfinite().all()) for t in outputs):
            raise ValueError(
                "model: its outputs on the example are not finite, so those of a smaller model "
                "cannot be compared: check its weights for NaN"
            )
        replace_optionals(pruned)
        if any(isinstance(m, (AbstractGated, COMPOSITES)) for m in pruned.modules()):
            pruned = _remove(pruned, inputs)
        _check(outputs, pruned, inputs)
    for name, module in pruned.named_modules():
        module.training = modes.get(name, model.training)
    return pruned


def _remove(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """Fold gates and remove closed units, in place."""
    graph = fx.GraphModule(model, Tracer().of(model, inputs))
    follower = Follower(graph, 0.0)
    follower.run(*inputs)
    for node, value in follower.values.items():
        node.meta["shape"] = getattr(value, "shape", ())
        node.meta["floating"] = isinstance(value, torch.Tensor) and value.is_floating_point()
    units = follower.units
    gone = units.removed(
        lambda path: log.warning("%s: all units are closed; one is kept", path or "the model")
    )
    _name_kept(follower, gone)
    units.remove(gone)
    fold(follower, graph, model)
    return _as_graphs(model)


def _as_graphs(model: nn.Module) -> nn.Module:
    """Convert modules of this library to graphs of torch modules."""
    plains: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Recurrent):
            if id(module) not in plains:
                plains[id(module)] = module.plain()
            model.set_submodule(path, plains[id(module)])
    done = ""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, COMPOSITES) or (done and path.startswith(done)):
            continue
        graph = Tracer().of(module)
        for node in graph.nodes:
            node.type = None  # annotations that are strings cannot be saved
        graph._tracer_cls = None  # would be saved with the graph
        traced = fx.GraphModule(module, graph, type(module).__name__)
        if not path:
            return traced
        model.set_submodule(path, traced)
        done = f"{path}."
    return model


def _name_kept(follower: Follower, gone: set[int]) -> None:
    """Log gates with closed units that are kept because other layers need them."""
    kept: list[str] = []
    known = {cut.path for cut in follower.units.cuts.values() if cut.name == "gates"}
    for path, module in gated(follower.module):
        count = int(module.closed().sum())
        kept += [f"{path} ({count})"] * (count > 0 and path not in known)
    for cut in follower.units.cuts.values():
        if isinstance(cut.module, AbstractGated) and cut.name == "gates":
            closed = cut.module.closed().tolist()
            stay = sum(
                c and follower.units.root(u) not in gone
                for c, u in zip(closed, cut.ids, strict=True)
            )
            kept += [f"{cut.path} ({stay})"] * (stay > 0)
    if kept:
        log.info(
            "closed units kept because other layers need them, or as the last of a layer: %s",
            ", ".join(kept),
        )


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of nested tuples, dictionaries and dataclasses."""
    tensors: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, Mapping):  # of classes unknown to torch
            tensors += _tensors(list(leaf.values()))
        elif is_dataclass(leaf):
            tensors += _tensors([getattr(leaf, f.name) for f in fields(leaf)])
    return tensors


def _check(before: list[Tensor], model: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        after = model(*inputs)
    except Exception as error:
        raise RuntimeError(
            f"the smaller model fails: {error}. Shapes written as numbers in forward do not fit "
            "it: write x.flatten(1) for x.view(-1, 512), and x.unflatten(-1, (-1, head_dim)) for "
            "heads"
        ) from error
    for old, new in zip(before, _tensors(after), strict=True):
        if not old.is_floating_point():
            continue
        allowed = TOLERANCE * max(1.0, float(old.abs().max())) if old.numel() else 0.0
        if old.dtype in (torch.float16, torch.bfloat16):
            allowed *= 1e3
        same = old.shape == new.shape
        worst = float((old - new).abs().max()) if same and old.numel() else 0.0
        if not same or not worst <= allowed:
            raise RuntimeError(
                f"the smaller model has different outputs (shape {tuple(new.shape)}, largest "
                f"difference {worst:.2g}): its forward uses an unsupported operation"
            )
