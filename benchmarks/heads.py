"""A third of a transformer's heads and feed-forward units removed within its run: what it costs.

A transformer of letters on Shakespeare, two layers of six heads and 384 feed-forward units (or as
many as ``--feed``), trained by `st.AdamW` for as many gradient evaluations in each row:

- *wide*: as it is;
- *small*: from the start with as many feed-forward units fewer as make it that much smaller;
- *goal, closed by 20 %*: `structure.with_gates`, and `structure.Goal` of a third less of the
  parameters that heads and feed-forward units have; the evaluations of its closings are taken off
  the steps;
- *goal, closed by 80 %*: the same, closed later in the run.

The loss is that of test windows, in nats a letter.

    SELFTUNE_DATA=... python -m benchmarks.heads [--seeds 0 1 2] [--steps 1000] [--feed 384]

A run of 1,000 steps takes 75 seconds. Typical output (torch 2.13):

    | | test loss | ratio | heads kept, % | feed-forward units kept, % | parameters |
    |---|---|---|---|---|---|
    | wide | 1.7444 | 1.0000 ± 0.0000 | 100 | 100 | 242,561 |
    | small | 1.7709 | 1.0152 ± 0.0060 | 100 | 50 | 168,449 |
    | goal, closed by 20 % | 1.7816 | 1.0214 ± 0.0067 | 86 | 57 | 168,229 |
    | goal, closed by 80 % | 1.7741 | 1.0170 ± 0.0013 | 78 | 59 | 165,962 |
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

WIDTH, HEADS, FEED, LAYERS, LENGTH, BATCH = 96, 6, 384, 2, 64, 32


class Letters(nn.Module):
    """Embeddings, an encoder that looks back alone, and a head."""

    def __init__(self, letters: int, feed: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, feed, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        encoder = nn.TransformerEncoder(
            layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        for one in encoder.layers:
            for param in one.parameters():
                if param.ndim > 1:
                    nn.init.xavier_uniform_(param)
        self.encoder, self.head = st.structure.with_gates(encoder), nn.Linear(WIDTH, letters)
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        self.register_buffer("future", future)
        self.register_buffer("places", torch.arange(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next letter, shape (batch, LENGTH, letters)."""
        return self.head(self.encoder(self.letter(x) + self.place(self.places), self.future))


class Data:
    """Windows of the text: nine tenths to train on, and a twentieth each to tune and to test."""

    def __init__(self, seed: int) -> None:
        file = Path(os.environ["SELFTUNE_DATA"]) / "tinyshakespeare.txt.gz"
        text = gzip.decompress(file.read_bytes()).decode()
        known = {c: i for i, c in enumerate(sorted(set(text)))}
        self.letters, numbers = len(known), torch.tensor([known[c] for c in text])
        a, b = int(0.9 * len(numbers)), int(0.95 * len(numbers))
        self.parts = {"train": numbers[:a], "val": numbers[a:b], "test": numbers[b:]}
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, part: str, size: int = BATCH) -> tuple[Tensor, Tensor]:
        """Random windows, and the letters after each of theirs."""
        text = self.parts[part]
        at = torch.randint(len(text) - LENGTH - 1, (size, 1), generator=self._generator)
        windows = text[at + torch.arange(LENGTH + 1)]
        return windows[:, :-1], windows[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Nats a letter."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        small: Whether it has fewer feed-forward units from the start.
        goal: Options of `structure.Goal`; None without a goal.
    """

    small: bool = False
    goal: dict[str, float] | None = None


ROWS = {
    "wide": Row(),
    "small": Row(small=True),
    "goal, closed by 20 %": Row(goal={}),
    "goal, closed by 80 %": Row(goal={"start": 0.3, "end": 0.8, "closings": 10, "batches": 4}),
}
GOAL = {"closings": 5, "batches": 2}


@dataclass(frozen=True)
class Found:
    """What a run ended with: its test loss, shares of units kept, and parameters in all."""

    loss: float
    heads: float
    feed: float
    parameters: int


def parameters(model: nn.Module, *parts: str) -> int:
    """How many, gates left out; only those whose name has one of the parts, if there are any."""
    return sum(
        p.numel() for n, p in model.named_parameters()
        if "gates" not in n and (not parts or any(part in n for part in parts))
    )  # fmt: skip


def third(model: nn.Module) -> float:
    """A third of the parameters that heads and feed-forward units have."""
    return parameters(model, "attention", "linear") / 3


def run(seed: int, steps: int, row: Row, feed: int = FEED) -> Found:
    """One run of a net that has, or would have if it were wide, that many feed-forward units."""
    data, wide = Data(seed), feed
    if row.small:
        unit = LAYERS * (2 * WIDTH + 1)  # its parameters
        feed -= int(third(Letters(data.letters, feed)) / unit)
    torch.manual_seed(seed)
    model = Letters(data.letters, feed)
    example, goal = data.batch("val", 1)[0], None
    if row.goal is not None:
        options: dict[str, Any] = {**GOAL, **row.goal}
        steps -= options["closings"] * options["batches"]
        budget = int(parameters(model) - third(model))
        goal = st.structure.Goal(model, example, budget, total_steps=steps, **options)
    opt = st.AdamW(
        st.structure.parameter_groups(model), lr=1e-3, weight_decay=0.01, total_steps=steps,
        model=model,
    )  # fmt: skip

    def closure() -> Tensor:
        return loss_of(model, data.batch("val"))

    for _ in range(steps):
        opt.zero_grad()
        loss = loss_of(model, data.batch("train"))
        loss.backward()
        opt.step()
        opt.report(loss)
        opt.hyper_step(closure)
        if goal is not None and goal.step(closure):
            opt.sync(weights=False)
    with opt.averaged(), torch.no_grad():
        small = st.structure.prune(model, example) if goal else model
        data = Data(0)  # the same test windows for all
        test = statistics.mean(float(loss_of(small, data.batch("test", 64))) for _ in range(40))
    kept = st.structure.open_gates(model)
    heads = sum(k for n, (k, _) in kept.items() if "attention" in n) / (LAYERS * HEADS)
    units = sum(k for n, (k, _) in kept.items() if "attention" not in n) / (LAYERS * wide)
    return Found(test, heads, units, parameters(small))


def line(name: str, found: Sequence[Found], wide: Sequence[Found]) -> str:
    """A row of the table: means over the seeds, and the ratio with its standard error."""
    loss, heads, feed, size = (
        statistics.mean(column) for column in zip(*map(astuple, found), strict=True)
    )
    ratios = [a.loss / b.loss for a, b in zip(found, wide, strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else math.nan
    return (
        f"| {name} | {loss:.4f} | {statistics.mean(ratios):.4f} ± {error:.4f} "
        f"| {100 * heads:.0f} | {100 * feed:.0f} | {size:,.0f} |"
    )


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--feed", type=int, default=FEED, help="feed-forward units of each layer")
    args = parser.parse_args()
    found: dict[str, list[Found]] = {name: [] for name in ROWS}
    for seed in args.seeds:
        for name, row in ROWS.items():
            found[name].append(run(seed, args.steps, row, args.feed))
            print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
    print("\n| | test loss | ratio | heads kept, % | feed-forward units kept, % | parameters |")
    print("|---|---|---|---|---|---|")
    for name, runs in found.items():
        print(line(name, runs, found["wide"]))


if __name__ == "__main__":
    main()
