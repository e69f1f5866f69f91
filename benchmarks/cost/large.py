"""A network of GPT-2's smallest size (124 million weights): peak memory and time of a whole step.

    python -m benchmarks.cost.large [--rounds 3]

Baseline: ``forward, backward, step, zero_grad`` of ``torch.optim.AdamW``, on batches of one
sequence of 128 tokens. Ours: ``st.AdamW`` with its defaults for a run of 10,000 steps, and a
``hyper_step`` after every step, of which one in twenty takes a validation pass. Peak memory is the
largest resident size of a process of its own that trains through a short sweep and two
hyperparameter steps, less that of the process before the model. Times are of blocks of steps that
alternate in one process; ours are of twenty steps, with their validation pass.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 50_257, 768, 12, 12, 128


class Language(nn.Module):
    """A causal transformer whose output layer is its embedding, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(1024, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.body = nn.TransformerEncoder(
            layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting each next token."""
        places = torch.arange(tokens.shape[1])
        found = self.body(self.tokens(tokens) + self.places(places), mask=self.mask)
        scores = found[:, :-1] @ self.tokens.weight.T
        return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())


def batch() -> Tensor:
    """One sequence."""
    return torch.randint(VOCABULARY, (1, LENGTH))


def plain() -> Callable[[], None]:
    """A step of torch's optimizer."""
    model = Language()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(batch()).backward()
        opt.step()
        opt.zero_grad()

    return step


def tuned(**options: object) -> Callable[[], None]:
    """A step of ours, and one of the hyperparameters where it is due."""
    model = Language()
    opt = st.AdamW(model, lr=1e-4, **options)

    def step() -> None:
        model(batch()).backward()
        opt.step()
        opt.zero_grad()  # before the validation pass, which then finds their memory free
        opt.hyper_step(lambda: model(batch()))

    return step


def peak(which: str) -> float:
    """Peak memory of a process that trains, in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if which == "plain":
        step, count = plain(), 4
    else:
        step, count = tuned(total_steps=10_000, probe=4, every=5), 16
    for _ in range(count):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def times(rounds: int) -> list[tuple[float, float]]:
    """Seconds a step of both, of every round."""
    base, ours = plain(), tuned(total_steps=10_000, probe=False)
    found = []
    for step in (base, ours):
        step()
    for _ in range(rounds):
        taken = []
        for step, count in ((base, 10), (ours, 20)):
            start = time.perf_counter()
            for _ in range(count):
                step()
            taken.append((time.perf_counter() - start) / count)
        found.append((taken[0], taken[1]))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", choices=("plain", "tuned"), help="measure in this process")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.peak:
        print(peak(args.peak))
        return
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks.cost.large", "--peak"]
    found = {
        which: float(
            subprocess.run([*command, which], cwd=root, check=True, capture_output=True).stdout
        )
        for which in ("plain", "tuned")
    }
    print("| | torch.optim.AdamW | st.AdamW | ratio |\n|---|---|---|---|")
    base, ours = found["plain"], found["tuned"]
    print(f"| peak memory, MB | {base:.0f} | {ours:.0f} | {ours / base:.2f} |", flush=True)
    pairs = times(args.rounds)
    ratios = [b / a for a, b in pairs]
    one, two = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    spread = f"{min(ratios):.2f}…{max(ratios):.2f}"
    print(f"| a step, s | {one:.2f} | {two:.2f} | {statistics.median(ratios):.2f} ({spread}) |")


if __name__ == "__main__":
    main()
