"""Attention and encoder layers with a gate for each head and each feed-forward unit."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from selftune._arguments import Instance, checked
from selftune.structure.gates import Gate


class Attention(nn.Module):
    """Multi-head attention with a gate for each head: ``out(concat_h g_h · head_h)``.

    Weights are copied from an existing layer, and outputs are the same. :func:`prune` removes
    closed heads: their rows in the query, key and value projections and their columns in the
    output projection.

    Args:
        attention: The layer from which weights and sizes are copied.

    Raises:
        ValueError: The layer uses ``add_bias_kv``, ``add_zero_attn`` or attention dropout.

    Examples:
        >>> plain = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> bool(torch.allclose(Attention(plain)(x, x, x)[0], plain(x, x, x)[0], atol=1e-6))
        True
    """

    @checked(attention=Instance((nn.MultiheadAttention,), "a torch.nn.MultiheadAttention"))
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
        weights: Sequence[Any] = (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
        if a.in_proj_weight is not None:
            weights = a.in_proj_weight.chunk(3)
        biases = (None,) * 3 if a.in_proj_bias is None else a.in_proj_bias.chunk(3)
        layers = [_linear(w, b) for w, b in zip(weights, biases, strict=True)]
        for layer, weight in zip(layers, weights, strict=True):
            # Parts of one weight require a gradient if it does, even under no_grad.
            source = weight if a.in_proj_weight is None else a.in_proj_weight
            layer.weight.requires_grad_(source.requires_grad)
            if a.in_proj_bias is not None:
                layer.bias.requires_grad_(a.in_proj_bias.requires_grad)
        self.query, self.key, self.value = layers
        self.gate = Gate(a.num_heads)
        self.gate.to(weights[0].device, weights[0].dtype)
        self.out = _linear(a.out_proj.weight, a.out_proj.bias)
        for name, param in self.out.named_parameters():
            param.requires_grad_(a.out_proj.get_parameter(name).requires_grad)
        self.head_dim, self.batch_first = a.head_dim, a.batch_first
        # Types of the masks for which the layer is traced: see mask_types_noted.
        self.mask_types: dict[str, torch.dtype] = {}

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = False, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """As ``nn.MultiheadAttention(...)(..., need_weights=False)``, for batched inputs.

        Args:
            query: Shape (batch, length, embed_dim), with the batch second if not ``batch_first``.
            key: Likewise.
            value: Likewise.
            key_padding_mask: Shape (batch, length of keys): True where a key is masked, or floats
                that are added to the scores.
            need_weights: Must be False; attention weights are not returned.
            attn_mask: Shape (length of queries, length of keys): True where a key is masked, or
                floats that are added to the scores.
            average_attn_weights: Has no effect, because no weights are returned.
            is_causal: Whether ``attn_mask`` is causal; without a mask, whether to apply a causal
                mask.

        Raises:
            ValueError: ``need_weights=True``, inputs are unbatched, each head has its own mask, or
                ``is_causal`` and ``key_padding_mask`` are given without ``attn_mask``.
        """
        if need_weights is True:
            raise ValueError("need_weights=True: gated attention returns none; pass False")
        if isinstance(query, Tensor) and query.ndim != 3:
            raise ValueError(
                f"query of shape {tuple(query.shape)}: gated attention takes batched inputs of "
                "three dimensions; add the batch dimension with unsqueeze"
            )
        if isinstance(attn_mask, Tensor) and attn_mask.ndim != 2:
            raise ValueError(
                f"attn_mask of shape {tuple(attn_mask.shape)} cannot be used with gates: pass "
                "one mask of shape (length of queries, length of keys) for all heads"
            )
        given = (query, key, value)
        if not self.batch_first:
            given = tuple(t.transpose(0, 1) for t in given)  # type: ignore[assignment]
        layers = (self.query, self.key, self.value)
        q, k, v = (
            layer(t).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer, t in zip(layers, given, strict=True)
        )
        mask = _added("attn_mask", attn_mask, self.mask_types, q)
        padding = _added("key_padding_mask", key_padding_mask, self.mask_types, q)
        if padding is not None:
            if mask is None and is_causal is True:
                raise ValueError(
                    "is_causal=True with key_padding_mask needs attn_mask, the causal mask"
                )
            padding = padding.unsqueeze(1).unsqueeze(1)  # (batch, 1, 1, keys)
        causal = is_causal if mask is None else False
        if mask is None or padding is None:
            mask = padding if mask is None else mask
        else:
            mask = mask + padding
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        output = self.out(self.gate(heads).transpose(1, 2).flatten(2))
        return (output if self.batch_first else output.transpose(0, 1)), None


class EncoderLayer(nn.Module):
    """A ``nn.TransformerEncoderLayer`` with a gate for each head and each feed-forward unit.

    Args:
        layer: The layer from which weights and sizes are copied.

    Raises:
        ValueError: The attention of the layer cannot be gated.

    Examples:
        >>> plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> bool(torch.allclose(EncoderLayer(plain)(x), plain(x), atol=1e-6))
        True
    """

    @checked(layer=Instance((nn.TransformerEncoderLayer,), "a torch.nn.TransformerEncoderLayer"))
    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        attention = copy.copy(layer.self_attn)
        # Only attention weights lose their dropout; later layers keep theirs.
        attention.dropout = 0.0
        self.attention = Attention(attention)
        layer = copy.deepcopy(layer)
        self.linear1, self.linear2 = layer.linear1, layer.linear2
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        self.dropout, self.dropout1, self.dropout2 = layer.dropout, layer.dropout1, layer.dropout2
        batch_dim = 0 if self.attention.batch_first else 1
        self.gate = Gate(layer.linear1.out_features, dim=-1, batch_dim=batch_dim)
        self.gate.to(layer.linear1.weight.device, layer.linear1.weight.dtype)
        self.activation, self.norm_first = layer.activation, layer.norm_first

    def forward(
        self, src: Tensor, src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None, is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        """As ``nn.TransformerEncoderLayer``.

        Args:
            src: Shape (batch, length, d_model), with the batch second if not ``batch_first``.
            src_mask: Shape (length, length): True where a position is masked, or floats that are
                added to the scores.
            src_key_padding_mask: Shape (batch, length), likewise.
            is_causal: Whether ``src_mask`` is causal; without a mask, whether to apply a causal
                mask.
        """
        masks = (src_key_padding_mask, src_mask, is_causal)
        if self.norm_first:
            x = src + self._attend(self.norm1(src), *masks)
            return x + self._feed(self.norm2(x))
        x = self.norm1(src + self._attend(src, *masks))
        return self.norm2(x + self._feed(x))

    def _attend(
        self, x: Tensor, padding: Tensor | None, mask: Tensor | None, causal: bool
    ) -> Tensor:  # fmt: skip
        attended = self.attention(
            x, x, x, key_padding_mask=padding, attn_mask=mask, is_causal=causal
        )
        return self.dropout1(attended[0])

    def _feed(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.gate(self.activation(self.linear1(x))))
        return self.dropout2(self.linear2(hidden))


class Encoder(nn.Module):
    """A ``nn.TransformerEncoder`` of gated layers.

    Args:
        encoder: The encoder from which the layers and the final norm are copied.
    """

    @checked(encoder=Instance((nn.TransformerEncoder,), "a torch.nn.TransformerEncoder"))
    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        made = {id(x): EncoderLayer(x) for x in encoder.layers}  # shared layers remain shared
        self.layers = nn.ModuleList(made[id(x)] for x in encoder.layers)
        self.norm = copy.deepcopy(encoder.norm)

    def forward(
        self, src: Tensor, mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None, is_causal: bool | None = False,
    ) -> Tensor:  # fmt: skip
        """As ``nn.TransformerEncoder``; ``is_causal`` as in :class:`EncoderLayer`."""
        causal = operator.eq(is_causal, True)  # None is False; also as an input of a graph
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, causal)
        return src if self.norm is None else self.norm(src)


@contextmanager
def mask_types_noted(model: nn.Module) -> Iterator[None]:
    """Record the types of masks passed to layers in the block, for later tracing."""

    def note(module: Attention, args: Any, kwargs: dict[str, Any]) -> None:
        masks = dict(zip(("key_padding_mask", "need_weights", "attn_mask"), args[3:], strict=False))
        masks |= kwargs
        names = ("key_padding_mask", "attn_mask")
        module.mask_types = {n: masks[n].dtype for n in names if masks.get(n) is not None}

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, Attention):
                hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        yield


def _added(
    name: str, mask: Any, noted: dict[str, torch.dtype], like: Tensor
) -> Any:  # fmt: skip
    """A mask as a term added to the scores: −inf where it is True.

    A graph has no branches, so it is traced for the recorded type of mask, and asserts it.
    """
    if mask is None:
        return None
    traced = isinstance(mask, fx.Proxy)
    kind = noted.get(name) if traced else mask.dtype
    if kind is None:
        torch._assert(mask == None, f"{name}: pruned with an example without a mask")  # noqa: E711
        return None
    if kind == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
    if traced:
        torch._assert(mask.is_floating_point(), f"{name}: pruned with an example of a float mask")
    elif not kind.is_floating_point:
        raise ValueError(f"{name} of type {kind} must be bool or floating-point")
    return mask


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outs, ins = weight.shape
    made = nn.Linear(ins, outs, bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made
