"""Adds gates inside attention, transformer encoder, LSTM and GRU layers."""

from __future__ import annotations

import logging

from torch import nn

from selftune._arguments import MODULE, checked
from selftune.structure.recurrent import Recurrent, RecurrentLayers, one_layer
from selftune.structure.transformer import Attention, Encoder, EncoderLayer

log = logging.getLogger("selftune")

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
        ValueError: The model contains ``nn.TransformerDecoderLayer`` or an option that cannot be
            gated; the message names the layer and the option.

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

    Args:
        model: The model.
        path: Its name in the whole model.
        known: Replacements of modules by their ids.
        replaced: Filled with each module that is replaced, after its parent and its name.
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
    """A layer with gates in place of a layer of torch; None for other modules.

    Raises:
        ValueError: It has an option that cannot be gated.
    """
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
