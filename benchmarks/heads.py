"""A third of a transformer's heads and feed-forward units removed within its run: what it costs.

A transformer of letters on Shakespeare, two layers of six heads and 384 feed-forward units, trained
by `st.AdamW` for as many gradient evaluations in each row:

- *wide*: as it is;
- *goal*: `structure.with_gates`, and `structure.Goal` of a third less of the parameters that heads
  and feed-forward units have; the evaluations of its closings are taken off the steps.

The loss is that of test windows, in nats a letter.

    SELFTUNE_DATA=... python -m benchmarks.heads [--seeds 0 1 2] [--steps 1000]

Typical output, of one seed (two cores that other programs used too, torch 2.13):

    | wide | goal | ratio | heads kept, % | feed-forward units kept, % | parameters |
    |---|---|---|---|---|---|
    | 1.7299 | 1.7660 | 1.0209 ± 0.0000 | 83 | 58 | 168,224 |
"""

from __future__ import annotations

import argparse
import gzip
import os
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

WIDTH, HEADS, FEED, LAYERS, LENGTH, BATCH = 96, 6, 384, 2, 64, 32
CLOSINGS, BATCHES = 5, 2


class Letters(nn.Module):
    """Embeddings, an encoder that looks back alone, and a head."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, FEED, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        encoder = nn.TransformerEncoder(
            layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        for one in encoder.layers:
            for param in one.parameters():
                if param.ndim > 1:
                    nn.init.xavier_uniform_(param)
        self.encoder, self.head = st.structure.with_gates(encoder), nn.Linear(WIDTH, letters)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        self.register_buffer("mask", mask)
        self.register_buffer("places", torch.arange(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next letter, shape (batch, LENGTH, letters)."""
        return self.head(self.encoder(self.letter(x) + self.place(self.places), self.mask))


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


def run(seed: int, steps: int, shrink: bool) -> tuple[float, float, float, float]:
    """Test loss, shares of heads and of feed-forward units kept, parameters in all."""
    torch.manual_seed(seed)
    data = Data(seed)
    model = Letters(data.letters)
    inner = sum(
        p.numel() for n, p in model.named_parameters()
        if "gates" not in n and ("attention" in n or "linear" in n)
    )  # fmt: skip
    example, goal = data.batch("val", 1)[0], None
    if shrink:
        steps -= CLOSINGS * BATCHES
        whole = sum(p.numel() for n, p in model.named_parameters() if "gates" not in n)
        goal = st.structure.Goal(
            model, example, int(whole - inner / 3), total_steps=steps, closings=CLOSINGS,
            batches=BATCHES,
        )  # fmt: skip
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
        small = st.structure.prune(model, example) if shrink else model
        data = Data(0)  # the same test windows for all
        test = statistics.mean(float(loss_of(small, data.batch("test", 64))) for _ in range(20))
    kept = st.structure.open_gates(model)
    heads = sum(k for n, (k, _) in kept.items() if "attention" in n) / (LAYERS * HEADS)
    feed = sum(k for n, (k, _) in kept.items() if "attention" not in n) / (LAYERS * FEED)
    params = sum(p.numel() for n, p in small.named_parameters() if "gates" not in n)
    return test, heads, feed, params


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    ratios, rows = [], []
    for seed in args.seeds:
        wide, goal = (run(seed, args.steps, shrink) for shrink in (False, True))
        ratios.append(goal[0] / wide[0])
        rows.append((wide[0], *goal))
        print(f"seed {seed}: wide {wide}, goal {goal}, ratio {ratios[-1]:.4f}", flush=True)
    means = [statistics.mean(column) for column in zip(*rows, strict=True)]
    spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
    print("\n| wide | goal | ratio | heads kept, % | feed-forward units kept, % | parameters |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {means[0]:.4f} | {means[1]:.4f} | {statistics.mean(ratios):.4f} ± {spread:.4f} | "
        f"{100 * means[2]:.0f} | {100 * means[3]:.0f} | {means[4]:,.0f} |"
    )


if __name__ == "__main__":
    main()
