"""Adds gates inside attention, transformer encoder, LSTM and GRU layers."""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from selftune._arguments import MODULE, checked
from selftune.structure.recurrent import Recurrent, RecurrentLayers, one_layer
from selftune.structure.transformer import Attention, Encoder, EncoderLayer

log = logging.getLogger("selftune")

REPLACED = (
    nn.LSTM, nn.GRU, nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention,
)  # fmt: skip
"""Layers of torch that are replaced."""
OWN = ("forward", "_sa_block", "_ff_block")
"""Their methods that a subclass may replace."""
COMPOSITES = (Attention, EncoderLayer, Encoder, RecurrentLayers)
"""Modules of this library that pruning replaces by graphs of torch modules."""


@checked(model=MODULE)
def with_gates(model: nn.Module) -> nn.Module:
    """Add gates to every attention layer, encoder layer, LSTM and GRU of a model, in place.

    ``nn.MultiheadAttention`` becomes :class:`Attention`, ``nn.TransformerEncoderLayer``
    :class:`EncoderLayer`, ``nn.TransformerEncoder`` :class:`Encoder`, ``nn.LSTM`` and ``nn.GRU``
    :class:`Recurrent`, or :class:`RecurrentLayers` if they have several layers. Outputs do not
    change; dropout of attention weights in encoder layers is removed, with a warning. Weights
    keep their ``requires_grad``, and shared layers remain shared. Place gates after Linear and
    convolution layers yourself.

    Args:
        model: Any module.

    Returns:
        The model, or its gated replacement if the model itself is one of these layers.

    Raises:
        ValueError: The model contains ``nn.TransformerDecoderLayer``, an option that cannot be
            gated, a subclass with a forward of its own, hooks, parametrizations, or a parameter
            that one of these layers shares with another; the message names the layer.

    Examples:
        >>> with_gates(nn.GRU(3, 4)).gates.numel()
        4
    """
    dropped = {
        name or type(module).__name__: module.self_attn.dropout
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer) and module.self_attn.dropout > 0
    }
    if dropped:
        log.warning(
            "with_gates: dropout of attention weights is left out in %s; other dropout is kept",
            ", ".join(f"{name} (dropout={share:g})" for name, share in dropped.items()),
        )
    _check_tied(model)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        return _gated(model, "", {}, replaced)
    except ValueError:
        for parent, name, child in replaced:
            setattr(parent, name, child)
        raise


def _gated(
    model: nn.Module,
    path: str,
    known: dict[int, nn.Module],
    replaced: list[tuple[nn.Module, str, nn.Module]],
) -> nn.Module:
    """A model with gates.

    ``path`` is its name in the whole model, and ``known`` has replacements by the ids of modules.
    ``replaced`` is filled with each module that is replaced, after its parent and its name.
    """
    if id(model) in known:
        return known[id(model)]
    if isinstance(model, (Recurrent, COMPOSITES)):  # has its gates already
        return model
    try:
        made = _replacement(model)
    except ValueError as error:
        if not path:
            raise
        raise ValueError(
            f"{path}: {error}; or pass only the parts of the model without this layer"
        ) from error
    # Only original modules are looked up: a new one may reuse the id of a freed one.
    known[id(model)] = model if made is None else made
    if made is not None:
        return made.train(model.training)
    for name, child in list(model._modules.items()):  # named_children lists shared ones once
        if child is not None:
            made = _gated(child, f"{path}.{name}" if path else name, known, replaced)
            if made is not child:
                replaced.append((model, name, child))
                setattr(model, name, made)
    return model


def _replacement(model: nn.Module) -> nn.Module | None:
    """A layer with gates in place of a layer of torch; None for other modules."""
    _check_usual(model)
    if isinstance(model, (nn.LSTM, nn.GRU)):
        return Recurrent(one_layer(model, 0)) if model.num_layers == 1 else RecurrentLayers(model)
    if isinstance(model, nn.TransformerEncoder):
        return Encoder(model)
    if isinstance(model, nn.TransformerEncoderLayer):
        return EncoderLayer(model)
    if isinstance(model, nn.MultiheadAttention):
        return Attention(model)
    if isinstance(model, nn.TransformerDecoderLayer):
        raise ValueError(
            "nn.TransformerDecoderLayer cannot be gated: write it with selftune.structure.Attention"
        )
    return None


def _check_usual(layer: nn.Module) -> None:
    """Raise an error for a layer that does more than that of torch, which would be lost."""
    for module in layer.modules() if isinstance(layer, REPLACED) else ():
        if module._forward_hooks or module._forward_pre_hooks or is_parametrized(module):
            raise ValueError(
                f"{type(module).__name__} has hooks or a parametrization, which a gated layer "
                "does not have: remove them first"
            )
        kinds = [kind for kind in REPLACED if isinstance(module, kind)]
        if any(
            getattr(type(module), n, None) is not getattr(k, n, None) for k in kinds for n in OWN
        ):
            raise ValueError(
                f"{type(module).__name__} is a subclass of nn.{kinds[0].__name__} with its own "
                "forward, which a gated layer does not have: place gates in it yourself"
            )


def _check_tied(model: nn.Module) -> None:
    """Raise an error for parameters that a replaced layer shares with another layer."""
    layers = [
        (f"{path}." if path else "", module)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, REPLACED)
    ]
    owners: dict[int, set[tuple[int, int]]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        within = [id(module) for path, module in layers if name.startswith(path)]
        known = owners.setdefault(id(param), set())
        known.add((within[0], within[-1]) if within else (0, 0))
        if len(known) > 1:
            raise ValueError(
                f"{name} is shared with another layer, which a gated layer cannot do: give each "
                "its own parameter first"
            )
