"""Colour images: clothes in random colours before pieces of photographs; a vision transformer.

Made of real images, because no colour images with labels come with the libraries: a pixel of a
Fashion-MNIST image is how much of the garment's colour covers the photograph behind it
(as in MNIST-M, Ganin et al. 2016). Backgrounds of the three parts are of disjoint blocks.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.workloads._base import Batch, Workload
from benchmarks.workloads.images import as_pixels, load_fashion_mnist
from benchmarks.workloads.photographs import blocks, crops


def _painted(clothes: Tensor, found: Tensor, seed: int) -> Tensor:
    """Standardised images in grey, painted before windows of blocks; shape (n, 3, 28, 28)."""
    generator = torch.Generator().manual_seed(seed)
    cover = as_pixels(clothes)
    colours = torch.rand(len(clothes), 3, 1, 1, generator=generator)
    behind = crops(found, len(clothes), clothes.shape[-1], seed)
    return (cover * colours + (1 - cover) * behind - 0.5) / 0.25


@cache
def coloured_clothes() -> dict[str, Batch]:
    """8,000 images to train on, 2,000 to validate, 4,000 to test."""
    x, y, test_x, test_y = load_fashion_mnist()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))[:10_000]
    found = blocks().split((360, 60, 100))
    parts = [order[:8000], order[8000:]]
    return {
        "train": (_painted(x[parts[0]], found[0], 1), y[parts[0]]),
        "val": (_painted(x[parts[1]], found[1], 2), y[parts[1]]),
        "test": (_painted(test_x[:4000], found[2], 3), test_y[:4000]),
    }


class ColourViT(nn.Module):
    """A vision transformer with a class token: 16 patches of 7 × 7 pixels.

    Args:
        width: Of the residual stream.
        depth: Number of layers.
    """

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 7, stride=7)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(17, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, 10)."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.blocks(tokens)[:, 0])


@cache
def colour_vit() -> Workload:
    """8,000 colour images; a vision transformer of 112,000 parameters."""
    return Workload(
        name="colour-vit", make_model=ColourViT, splits=coloured_clothes(), batch_size=64,
        steps=500,
    )  # fmt: skip
