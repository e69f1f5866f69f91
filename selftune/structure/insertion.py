"""Puts gates into layers of torch that have units inside."""

from __future__ import annotations

from torch import nn

from selftune.structure.recurrent import Recurrent, RecurrentLayers, one_layer
from selftune.structure.transformer import Attention, Encoder, EncoderLayer

COMPOSITES = (Attention, EncoderLayer, Encoder, RecurrentLayers)
"""Modules of this library that pruning turns into graphs of modules of torch."""


def with_gates(model: nn.Module) -> nn.Module:
    """Give each attention, encoder layer, LSTM and GRU of a model gates, in place.

    ``nn.MultiheadAttention`` becomes :class:`Attention`, ``nn.TransformerEncoderLayer``
    :class:`EncoderLayer`, ``nn.TransformerEncoder`` :class:`Encoder`, ``nn.LSTM`` and ``nn.GRU``
    :class:`Recurrent`, or :class:`RecurrentLayers` where they have several layers. Outputs stay as
    they are. Gates behind Linear and convolution layers are the user's to place.

    Args:
        model: Of whichever modules.

    Returns:
        The model, or what has become of it.

    Raises:
        ValueError: ``nn.TransformerDecoderLayer`` and options that cannot be gated, by name.

    Examples:
        >>> with_gates(nn.GRU(3, 4)).gates.numel()
        4
    """
    made: nn.Module | None = None
    if isinstance(model, (nn.LSTM, nn.GRU)):
        made = Recurrent(one_layer(model, 0)) if model.num_layers == 1 else RecurrentLayers(model)
    elif isinstance(model, nn.TransformerEncoder):
        made = Encoder(model)
    elif isinstance(model, nn.TransformerEncoderLayer):
        made = EncoderLayer(model)
    elif isinstance(model, nn.MultiheadAttention):
        made = Attention(model)
    elif isinstance(model, nn.TransformerDecoderLayer):
        raise ValueError(
            "nn.TransformerDecoderLayer cannot be gated: write it with selftune.structure.Attention"
        )
    if made is not None:
        return made.train(model.training)
    for name, child in list(model.named_children()):
        setattr(model, name, with_gates(child))
    return model
