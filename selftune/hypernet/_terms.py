"""Terms that sensitivities add to a layer's output, if each example has its own perturbation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Known = dict[str, tuple[Tensor, Tensor]]
"""Gains, shape (out, hyperparameters), and rows, by the parameter's name in the layer."""
Term = Callable[[Any, Tensor, Known, Tensor], Tensor]


def per_channel(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """Values of shape (batch, channels), shaped to be multiplied with a layer's output."""
    shape = [len(values), *[1] * (like.ndim - 1)]
    shape[dim] = values.shape[1]
    return values.view(shape)


def linear(layer: nn.Linear, x: Tensor, known: Known, delta: Tensor) -> Tensor:
    """``(U δ) ∘ (V x) + C δ``, the same for all positions of an example."""
    return _affine(lambda v: F.linear(x, v.view_as(layer.weight)), known, delta, x, -1)


def convolution(layer: _ConvNd, x: Tensor, known: Known, delta: Tensor) -> Tensor:
    """:func:`linear` for a convolution, by channel."""
    return _affine(
        lambda v: layer._conv_forward(x, v.view_as(layer.weight), None), known, delta, x, 1
    )


def transposed(layer: _ConvTransposeNd, x: Tensor, known: Known, delta: Tensor) -> Tensor:
    """A transposed convolution, whose weight's rows belong to the channels of its input."""
    total: Tensor | None = None
    if "weight" in known:
        gains, rows = known["weight"]
        scaled = x * per_channel(delta @ gains.T, x, 1)
        call = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]
        total = call(
            scaled, rows.view_as(layer.weight), None, layer.stride, layer.padding,  # type: ignore[arg-type]
            layer.output_padding, layer.groups, layer.dilation,
        )  # fmt: skip
    return _with_bias(total, known, delta, x, 1)


def embedding(layer: nn.Embedding, words: Tensor, known: Known, delta: Tensor) -> Tensor:
    """Each word's row, scaled by its gain."""
    gains, rows = known["weight"]
    own = torch.einsum("b...n,bn->b...", F.embedding(words, gains), delta)
    if layer.padding_idx is not None:
        own = own * (words != layer.padding_idx)
    return own.unsqueeze(-1) * F.embedding(words, rows)


def batch_norm(layer: _BatchNorm, x: Tensor, known: Known, delta: Tensor) -> Tensor:
    """Change in scale and shift of the normalised batch."""
    own = layer.training or layer.running_mean is None
    mean, variance = (None, None) if own else (layer.running_mean, layer.running_var)
    normal = F.batch_norm(x, mean, variance, training=own, eps=layer.eps)
    return _affine(lambda _: normal, known, delta, normal, 1)


def group_norm(layer: nn.GroupNorm, x: Tensor, known: Known, delta: Tensor) -> Tensor:
    """Change in scale and shift of the normalised groups."""
    normal = F.group_norm(x, layer.num_groups, eps=layer.eps)
    return _affine(lambda _: normal, known, delta, normal, 1)


def layer_norm(layer: nn.LayerNorm, x: Tensor, known: Known, delta: Tensor) -> Tensor:
    """Change in scale and shift of the normalised features."""
    normal = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    shape = (len(x), *[1] * (x.ndim - 1 - len(layer.normalized_shape)), *layer.normalized_shape)
    total = torch.zeros_like(normal)
    if "weight" in known:
        total = normal * (delta @ known["weight"][0].T).view(shape)
    if "bias" in known:
        total = total + (delta @ known["bias"][0].T).view(shape)
    return total


def _affine(
    along: Callable[[Tensor], Tensor], known: Known, delta: Tensor, like: Tensor, dim: int
) -> Tensor:
    """The gains times ``along`` the rows, and the shift."""
    total: Tensor | None = None
    if "weight" in known:
        gains, rows = known["weight"]
        whole = along(rows)
        total = per_channel(delta @ gains.T, whole, dim) * whole
    return _with_bias(total, known, delta, like, dim)


def _with_bias(total: Tensor | None, known: Known, delta: Tensor, like: Tensor, dim: int) -> Tensor:
    if "bias" not in known:
        assert total is not None
        return total
    bias = per_channel(delta @ known["bias"][0].T, like if total is None else total, dim)
    return bias if total is None else total + bias


TERMS: dict[type[nn.Module], Term] = {
    nn.Linear: linear,
    _ConvTransposeNd: transposed,
    _ConvNd: convolution,
    nn.Embedding: embedding,
    _BatchNorm: batch_norm,
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
}
"""Layers with support for a perturbation of each example; the first matching one is used."""
WHOLE = (nn.RNNBase, nn.MultiheadAttention)
"""Layers with support for one perturbation of the batch only."""


def term_of(module: nn.Module) -> Term | None:
    """The term of a layer, if it supports one for each example."""
    return next((term for kind, term in TERMS.items() if isinstance(module, kind)), None)


def primal(x: Any) -> Any:
    """A tensor without its tangent, as a constant."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return forward_ad.unpack_dual(x).primal.detach()
