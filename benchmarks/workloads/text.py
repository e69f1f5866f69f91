"""Text: characters of Shakespeare, words of Wikipedia."""

from __future__ import annotations

import gzip
from collections import Counter
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.workloads._base import Batch, Workload, folder

TIME = 32
PRINTABLE = 97


def _read(name: str) -> str:
    return gzip.decompress((folder() / f"{name}.txt.gz").read_bytes()).decode()


def pieces_of(codes: Tensor, counts: tuple[int, int, int], time: int = TIME) -> dict[str, Batch]:
    """Train, val and test from pieces of ``time`` tokens in random order."""
    pieces = codes[: len(codes) // (time + 1) * (time + 1)].view(-1, time + 1)
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
    parts = zip(("train", "val", "test"), pieces[: sum(counts)].split(counts), strict=True)
    return {name: (p[:, :-1].contiguous(), p[:, 1:].contiguous()) for name, p in parts}


class Transformer(nn.Module):
    """A causal transformer of two blocks with LayerNorm before each part."""

    def __init__(self, words: int, width: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(TIME, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, words)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(TIME))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, words, time)."""
        seen = self.words(x) + self.places.weight
        return self.head(self.blocks(seen, mask=self.mask, is_causal=True)).transpose(1, 2)


class LSTM(nn.Module):
    """One layer of LSTM between an embedding and a softmax."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, words, time)."""
        return self.head(self.lstm(self.words(x))[0]).transpose(1, 2)


class GRU(nn.Module):
    """One layer of GRU between an embedding and a softmax."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, words, time)."""
        return self.head(self.gru(self.words(x))[0]).transpose(1, 2)


def shakespeare() -> str:
    """The text, 1,115,394 characters."""
    return _read("tinyshakespeare")


def printable(raw: str) -> Tensor:
    """Codes of printable ASCII and the newline, below ``PRINTABLE``; 0 for any other character."""
    index = {c: i for i, c in enumerate("\n" + "".join(map(chr, range(32, 127))), start=1)}
    return torch.tensor([index.get(c, 0) for c in raw])


def characters(raw: str) -> Tensor:
    """Indices of the characters of a text among its distinct ones, in their order."""
    index = {c: i for i, c in enumerate(sorted(set(raw)))}
    return torch.tensor([index[c] for c in raw])


@cache
def _characters() -> dict[str, Batch]:
    return pieces_of(characters(shakespeare()), (8000, 1500, 4000))


@cache
def shakespeare_transformer() -> Workload:
    """8,000 pieces of 32 characters; a transformer of 76,000 parameters."""
    return Workload(
        name="shakespeare-transformer", make_model=lambda: Transformer(65),
        splits=_characters(), batch_size=32, steps=500,
    )  # fmt: skip


@cache
def shakespeare_lstm() -> Workload:
    """8,000 pieces of 32 characters; an LSTM of 142,000 parameters."""
    return Workload(
        name="shakespeare-lstm", make_model=lambda: LSTM(65, 96),
        splits=_characters(), batch_size=32, steps=500,
    )  # fmt: skip


@cache
def wikitext_lstm(vocabulary: int = 2000) -> Workload:
    """8,000 pieces of 32 words, rare ones joined into one; an LSTM of 290,000 parameters."""
    words = _read("wikitext2.train").split()[:500_000]
    index = {w: i + 1 for i, (w, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    return Workload(
        name="wikitext-lstm", make_model=lambda: LSTM(vocabulary, 64),
        splits=pieces_of(torch.tensor([index.get(w, 0) for w in words]), (8000, 1000, 1000)),
        batch_size=32, steps=300,
    )  # fmt: skip


@cache
def wikitext_gru() -> Workload:
    """4,000 pieces of 64 characters of Wikipedia; a GRU of 75,000 parameters."""
    codes = printable(_read("wikitext2.train")[:400_000])
    return Workload(
        name="wikitext-gru", make_model=lambda: GRU(PRINTABLE, 96),
        splits=pieces_of(codes, (4000, 700, 1400), 64), batch_size=32, steps=400,
    )  # fmt: skip
