"""Operations through which units are tracked, by their effect on the units."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
RESIZING = (
    nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
"""Modules that change the axes after that of the units, and map 0 to 0."""
ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Softsign, nn.Softshrink,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.Sigmoid, nn.Softplus, nn.Hardsigmoid, nn.LogSigmoid,
)  # fmt: skip
"""Elementwise modules."""
MAPS: set[Any] = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.tanh,
    F.hardtanh, F.hardswish, F.dropout, F.dropout1d, F.dropout2d, torch.relu, torch.tanh,
    torch.abs, torch.clone, torch.square, torch.neg, operator.neg, "relu", "tanh", "abs", "clone",
    "contiguous", "relu_", "float", "to", "square", "neg",
    torch.sigmoid, F.sigmoid, F.softplus, F.hardsigmoid, "sigmoid", torch.exp, "exp",
}  # fmt: skip
"""Elementwise functions and methods."""
POOLED: set[Any] = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
}  # fmt: skip
SUMS: set[Any] = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_"}
PRODUCTS: set[Any] = {operator.mul, operator.imul, operator.truediv, torch.mul, "mul", "mul_"}
RESHAPES: set[Any] = {torch.flatten, torch.reshape, "flatten", "reshape", "view", "unflatten"}
MEANS: set[Any] = {torch.mean, torch.sum, torch.amax, "mean", "sum", "amax"}
PADS: set[Any] = {F.pad}
SQUEEZES: set[Any] = {torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze"}
EXPANSIONS: set[Any] = {"expand_as"}
CATS: set[Any] = {torch.cat, torch.concat}
SIZES: set[Any] = {getattr, "size", "dim", len, "numel"}
"""Operations that read a shape, which adapts to the remaining units, unless they return a tensor
(``x.mT``)."""
TRANSPOSES: set[Any] = {torch.transpose, torch.swapaxes, "transpose", "swapaxes"}
PERMUTES: set[Any] = {torch.permute, "permute"}
SOFTMAXES: set[Any] = {F.softmax, torch.softmax, "softmax"}
MASKED: set[Any] = {torch.masked_fill, "masked_fill"}
CHUNKS: set[Any] = {torch.chunk, "chunk"}
MATMULS: set[Any] = {torch.matmul, operator.matmul, "matmul"}
ATTENTION: set[Any] = {F.scaled_dot_product_attention}
