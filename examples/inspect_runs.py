"""Four runs to look at: one that went well and three that went wrong.

    python examples/inspect_runs.py [--steps 1500] [--log-dir runs/tour]
    tensorboard --logdir runs/tour

- ``good``: an MLP with dropout on scikit-learn's digits.
- ``dead``: an initial learning rate of 1, without learning-rate sweep or guard.
- ``overfitted``: ten validation images, to which the dropout rates overfit.
- ``noise``: two validation images per hyperparameter step, and a fifth of all labels wrong.

``docs/inspect.md`` shows TensorBoard's charts of each. The loss on the test set, which the runs do
not use, is logged as ``Loss/test``.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import selftune as st
from selftune.tuner import Progress


def digits(wrong: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[Tensor]]:
    """800 training images, 500 for validation and the rest for testing; some labels wrong."""
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    noisy = torch.rand(1300) < wrong
    labels = torch.where(noisy, torch.randint(10, (1300,)), y[:1300])
    return (x[:800], labels[:800]), (x[800:1300], labels[800:]), [x[1300:], y[1300:]]


def run(
    name: str, args: argparse.Namespace, *, lr: float = 1e-3, held: int = 500, each: int = 100,
    wrong: float = 0.0, **options: Any,
) -> None:  # fmt: skip
    """Train, and print the report; Ctrl-C ends the tour."""
    train, val, (x, y) = digits(wrong)
    torch.manual_seed(0)
    model = nn.Sequential(
        st.nn.Dropout(0.1, "input"), nn.Linear(64, 128), nn.ReLU(),
        st.nn.Dropout(0.1, "hidden"), nn.Linear(128, 128), nn.ReLU(),
        st.nn.Dropout(0.1, "last"), nn.Linear(128, 10),
    )  # fmt: skip
    folder = f"{args.log_dir}/{name}"
    writer = SummaryWriter(folder)

    def look_on(now: Progress) -> None:
        model.eval()  # fit restores the mode
        with torch.no_grad():
            loss = float(F.cross_entropy(model(x), y))
        writer.add_scalar("Loss/test", loss, now.step)

    tuner = st.Tuner(model, F.cross_entropy, hparams={"lr": lr}, compile=False, **options)
    result = tuner.fit(
        DataLoader(TensorDataset(*train), 64, shuffle=True),
        DataLoader(TensorDataset(*(t[:held] for t in val)), each, shuffle=True),
        steps=args.steps, log_dir=folder, log_every=5, callbacks=[look_on], progress=False,
        pictures_every=max(args.steps // 3, 1),
    )  # fmt: skip
    writer.close()
    print(f"\n{name}: {result}\n{result.report()}")
    if result.ended == "interrupted":
        raise SystemExit(130)


def main() -> None:
    """Run all four."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--log-dir", default="runs/tour")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    run("good", args)
    run("dead", args, lr=1.0, probe=False, guard=False)
    run("overfitted", args, held=10, each=10)
    run("noise", args, each=2, wrong=0.2)


if __name__ == "__main__":
    main()
