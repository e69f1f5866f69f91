"""How often the right activation is chosen, in loops and by the tuner, at several intervals.

A network of one layer of six units with a choice of ReLU, sine and identity, fitted to sin(x) on
300 points; validation on 100. The right activation is the sine. Each seed draws points and weights:

- *loop*: `st.AdamW`, with an update of the scores at each sixtieth of the run;
- *averaged*: the same, with each update within `opt.averaged()`;
- *tuner, n*: `st.Tuner`, with n evaluations.

    python -m benchmarks.choices [--seeds 16] [--steps 300 600]

Typical output (two cores that other programs used too, torch 2.13):

    | steps | loop | averaged | tuner, 60 | tuner, 30 | tuner, 10 | tuner, 5 | seeds |
    |---|---|---|---|---|---|---|---|
    | 300 | 13 | 11 | 11 | 12 | 13 | 13 | 16 |
    | 600 | 15 | 13 | 13 | 15 | 15 | 13 | 16 |
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.structure import Choice, Chooser

BATCH, TRAIN, UPDATES = 25, 300, 60
EVALUATIONS = 60, 30, 10, 5


class Sine(nn.Module):
    """The sine, as an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """sin(x)."""
        return x.sin()


def job(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The network, inputs and targets of a seed."""
    torch.manual_seed(seed)
    x = torch.rand(400, 1) * 12 - 6
    choice = Choice([nn.ReLU(), Sine(), nn.Identity()])
    return nn.Sequential(nn.Linear(1, 6), choice, nn.Linear(6, 1)), x, x.sin()


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean squared error."""
    return F.mse_loss(model(x), y)


def right(model: nn.Sequential) -> bool:
    """Whether the sine was chosen."""
    return bool(model[1].weights()[1] == 1)


def loop(seed: int, steps: int, *, averaged: bool = False) -> bool:
    """Whether a loop chooses the sine."""
    model, x, y = job(seed)
    validation = partial(loss, model, x[TRAIN:], y[TRAIN:])
    opt = st.AdamW(model, lr=1e-2, total_steps=steps)
    chooser = Chooser(model, steps, every=steps // UPDATES)
    for step in range(steps):
        at = slice(step * BATCH % TRAIN, step * BATCH % TRAIN + BATCH)
        opt.zero_grad()
        loss(model, x[at], y[at]).backward()
        opt.step()
        opt.hyper_step(validation)
        with opt.averaged() if averaged else nullcontext():
            updated = chooser.step(validation)
        if updated and chooser.made:
            opt.sync(weights=False)
    return right(model)


def tuner(seed: int, steps: int, evaluations: int) -> bool:
    """Whether the tuner chooses the sine."""
    model, x, y = job(seed)
    parts = list(zip(x[:TRAIN].split(BATCH), y[:TRAIN].split(BATCH), strict=True))
    callback = Chooser(model).callback(partial(loss, model, x[TRAIN:], y[TRAIN:]))
    st.Tuner(model, F.mse_loss, hparams={"lr": 1e-2}, compile=False).fit(
        parts, [(x[TRAIN:], y[TRAIN:])], steps=steps, evaluate_every=steps // evaluations,
        callbacks=[callback], progress=False,
    )  # fmt: skip
    return right(model)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 600])
    args = parser.parse_args()
    rows = {"loop": loop, "averaged": partial(loop, averaged=True)}
    rows |= {f"tuner, {n}": partial(tuner, evaluations=n) for n in EVALUATIONS}
    print(f"| steps | {' | '.join(rows)} | seeds |\n|{'---|' * (len(rows) + 2)}")
    for steps in args.steps:
        counts = [sum(run(seed, steps) for seed in range(args.seeds)) for run in rows.values()]
        print(f"| {steps} | {' | '.join(map(str, counts))} | {args.seeds} |", flush=True)


if __name__ == "__main__":
    main()
