"""Attention and encoder layers with a gate for each head and for each unit between."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selftune.structure.gates import Gate


class Attention(nn.Module):
    """Multi-head attention with a gate for each head: ``out(concat_h g_h · head_h)``.

    It has the outputs of the layer that it is made from, whose weights it copies.
    :func:`prune` removes closed heads: their rows of the projections of queries, keys and values,
    and their columns of the last one.

    Args:
        attention: Of which it takes weights and sizes.

    Raises:
        ValueError: ``add_bias_kv``, ``add_zero_attn`` or dropout of the attention weights.

    Examples:
        >>> plain = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> bool(torch.allclose(Attention(plain)(x, x, x)[0], plain(x, x, x)[0], atol=1e-6))
        True
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        a = attention
        refused = {
            "add_bias_kv=True": a.bias_k is not None,
            "add_zero_attn=True": a.add_zero_attn,
            f"dropout={a.dropout}": a.dropout > 0,
        }
        for name, given in refused.items():
            if given:
                raise ValueError(
                    f"nn.MultiheadAttention({name}) cannot be gated: pass one without it"
                )
        inputs = (a.embed_dim, a.kdim, a.vdim)
        weights: Sequence[Any] = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
        if a.in_proj_weight is not None:
            weights = a.in_proj_weight.chunk(3)
        biases = (None,) * 3 if a.in_proj_bias is None else a.in_proj_bias.chunk(3)
        layers = [
            _linear(size, a.embed_dim, w, b)
            for size, w, b in zip(inputs, weights, biases, strict=True)
        ]
        self.query, self.key, self.value = layers
        self.gate = Gate(a.num_heads)
        self.gate.to(weights[0].device, weights[0].dtype)
        self.out = _linear(a.embed_dim, a.embed_dim, a.out_proj.weight, a.out_proj.bias)
        self.head_dim, self.batch_first = a.head_dim, a.batch_first

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """As ``nn.MultiheadAttention(...)(..., need_weights=False)``, of batches.

        Args:
            query: Shape (batch, length, embed_dim), or as ``batch_first`` says.
            key: Likewise.
            value: Likewise.
            attn_mask: As of ``F.scaled_dot_product_attention``: added to the scores, or True where
                a position takes part.
            is_causal: Whether positions see those before them alone, in place of a mask.
        """
        given = (query, key, value)
        if not self.batch_first:
            given = tuple(t.transpose(0, 1) for t in given)  # type: ignore[assignment]
        layers = (self.query, self.key, self.value)
        q, k, v = (
            layer(t).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, t in zip(layers, given, strict=True)
        )
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        output = self.out(self.gate(heads).transpose(1, 2).flatten(2))
        return (output if self.batch_first else output.transpose(0, 1)), None


class EncoderLayer(nn.Module):
    """A ``nn.TransformerEncoderLayer`` with a gate for each head and each feed-forward unit.

    Args:
        layer: Of which it takes weights and sizes.

    Raises:
        ValueError: Attention that cannot be gated.

    Examples:
        >>> plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> bool(torch.allclose(EncoderLayer(plain)(x), plain(x), atol=1e-6))
        True
    """

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        attention = copy.copy(layer.self_attn)
        # Of the attention weights; what the layers after it drop is kept.
        attention.dropout = 0.0
        self.attention = Attention(attention)
        layer = copy.deepcopy(layer)
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        self.dropout, self.dropout1, self.dropout2 = layer.dropout, layer.dropout1, layer.dropout2
        self.gate = Gate(layer.linear1.out_features, dim=-1)
        self.gate.to(layer.linear1.weight.device, layer.linear1.weight.dtype)
        self.activation, self.norm_first = layer.activation, layer.norm_first

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As the layer, without ``src_key_padding_mask``.

        Args:
            src: Shape (batch, length, d_model), or as ``batch_first`` says.
            src_mask: As of ``F.scaled_dot_product_attention``.
            is_causal: Whether positions see those before them alone, in place of a mask.
        """
        if self.norm_first:
            x = src + self._attend(self.norm1(src), src_mask, is_causal)
            return x + self._feed(self.norm2(x))
        x = self.norm1(src + self._attend(src, src_mask, is_causal))
        return self.norm2(x + self._feed(x))

    def _attend(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return self.dropout1(self.attention(x, x, x, mask, causal)[0])

    def _feed(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.gate(self.activation(self.linear1(x))))
        return self.dropout2(self.linear2(hidden))


class Encoder(nn.Module):
    """A ``nn.TransformerEncoder`` of gated layers.

    Args:
        encoder: Of which it takes layers and the last norm.
    """

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(x) for x in encoder.layers)
        self.norm = copy.deepcopy(encoder.norm)

    def forward(self, src: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As the encoder, without ``src_key_padding_mask``."""
        for layer in self.layers:
            src = layer(src, mask, is_causal)
        return src if self.norm is None else self.norm(src)


def _linear(ins: int, outs: int, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(ins, outs, bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made
