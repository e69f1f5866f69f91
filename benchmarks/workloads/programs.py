"""Program text: characters of Python's standard library, a pre-norm transformer."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from benchmarks.workloads._base import Workload
from benchmarks.workloads.text import PRINTABLE, pieces_of, printable

TIME = 64


@cache
def sources(characters: int) -> str:
    """The beginning of each module of the standard library, in alphabetical order, joined.

    The text depends on the version of Python; its length and alphabet do not.

    Raises:
        RuntimeError: The installed sources are shorter than that.
    """
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(p.read_text(encoding="utf-8", errors="replace")[:8000] for p in paths)
    if len(text) < characters:
        raise RuntimeError(
            f"the standard library's sources have {len(text)} characters, {characters} are "
            "needed: use a Python that is installed with its sources"
        )
    return text[:characters]


class CodeTransformer(nn.Module):
    """A causal transformer of torch's encoder layers: norms first, GELU, learned positions.

    Args:
        width: Of the residual stream; feed-forward layers have four times as many units.
        depth: Number of layers.
    """

    def __init__(self, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.characters = nn.Embedding(PRINTABLE, width)
        self.positions = nn.Embedding(TIME, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, PRINTABLE)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(TIME))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, characters, time)."""
        seen = self.characters(x) + self.positions.weight
        return self.head(self.blocks(seen, mask=self.mask, is_causal=True)).transpose(1, 2)


@cache
def code_transformer() -> Workload:
    """8,000 pieces of 64 characters of Python; 16 a batch; a transformer of 360,000 parameters."""
    codes = printable(sources(680_000))
    return Workload(
        name="code-transformer", make_model=CodeTransformer,
        splits=pieces_of(codes, (8000, 800, 1600), TIME), batch_size=16, steps=400,
    )  # fmt: skip
