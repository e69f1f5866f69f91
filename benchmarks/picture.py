"""Draws the README's picture, docs/img/first.png: loss and learning rate, plain and self-tuned.

    python -m benchmarks.picture [--seeds 3] [--steps 2000]

The job of ``examples/digits.py``: scikit-learn's 8×8 digits, 15 % of the training labels wrong,
an MLP of two hidden layers, SGD with momentum 0.9, batches of 64. Four runs a seed: torch's SGD
with cosine annealing from learning rates of 0.001, 0.01 and 0.1, and ``st.SGD`` from 0.01,
evaluated at its averaged weights. Thin lines are seeds 0, 1 and 2, thick lines their mean. No run
is stopped early; ``examples/digits.py`` compares with early stopping, where 0.1 is the best plain
rate. Takes about a minute; needs matplotlib and scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

FILE = Path(__file__).parents[1] / "docs" / "img" / "first.png"
EVERY = 25  # steps between two points of a line
Curve = list[tuple[int, float, float]]  # step, test loss, learning rate


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """1,000 images to train on (noisy labels), 400 to validate, 397 to test (clean labels)."""
    data = load_digits()
    images, labels = torch.tensor(data.data).float() / 16 - 0.3, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    noisy = labels[:1000].clone()
    wrong = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.15
    random = torch.Generator().manual_seed(2)
    noisy[wrong] = torch.randint(10, (int(wrong.sum()),), generator=random)
    return {
        "train": (images[:1000], noisy),
        "val": (images[1000:1400], labels[1000:1400]),
        "test": (images[1400:], labels[1400:]),
    }


def run(
    data: dict[str, tuple[Tensor, Tensor]], seed: int, steps: int, lr: float, tuned: bool
) -> Curve:
    """Train once; return the test loss and the learning rate along the run."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    if tuned:
        opt: torch.optim.Optimizer = st.SGD(model, lr=lr, momentum=0.9, total_steps=steps)
    else:
        opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    draw = torch.Generator().manual_seed(seed)

    def batch(part: str) -> tuple[Tensor, Tensor]:
        inputs, targets = data[part]
        index = torch.randint(len(inputs), (64,), generator=draw)
        return inputs[index], targets[index]

    def test_loss() -> float:
        with torch.no_grad():
            return F.cross_entropy(model(data["test"][0]), data["test"][1]).item()

    curve: Curve = []
    for step in range(1, steps + 1):
        x, y = batch("train")
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        rate = opt.param_groups[0]["lr"]
        opt.step()
        if isinstance(opt, st.SGD):
            rate = opt.param_groups[0]["lr"]  # after the step: the rate of that step
            xv, yv = batch("val")
            opt.hyper_step(lambda: F.cross_entropy(model(xv), yv))  # noqa: B023 - called at once
        else:
            cosine.step()
        if step % EVERY == 0:
            if isinstance(opt, st.SGD):
                with opt.averaged():
                    loss = test_loss()
            else:
                loss = test_loss()
            curve.append((step, loss, rate))
    return curve


def main() -> None:
    """Train, draw, and print the losses at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for label, colour, lr, tuned in (
        ("torch.optim.SGD, lr 0.001, cosine", "tab:green", 0.001, False),
        ("torch.optim.SGD, lr 0.01, cosine", "tab:gray", 0.01, False),
        ("torch.optim.SGD, lr 0.1, cosine", "tab:blue", 0.1, False),
        ("st.SGD from lr 0.01", "tab:orange", 0.01, True),
    ):
        curves = torch.tensor([run(data, s, args.steps, lr, tuned) for s in range(args.seeds)])
        print(f"{label}: {', '.join(f'{c[-1, 1]:.3f}' for c in curves)}", flush=True)
        for curve in curves:
            left.plot(curve[:, 0], curve[:, 1], color=colour, lw=0.6, alpha=0.5)
            right.plot(curve[:, 0], curve[:, 2], color=colour, lw=0.6, alpha=0.5)
        mean = curves.mean(0)
        left.plot(mean[:, 0], mean[:, 1], color=colour, lw=2, label=label)
        rate = curves[..., 2].clamp(min=1e-6).log().mean(0).exp()
        right.plot(mean[:, 0], rate, color=colour, lw=2)
    left.set(xlabel="training step", ylabel="test loss", yscale="log", ylim=(0.15, 2.5))
    left.set_yticks([0.2, 0.3, 0.5, 1.0, 2.0], ["0.2", "0.3", "0.5", "1", "2"])
    left.minorticks_off()
    right.set(xlabel="training step", ylabel="learning rate", yscale="log", ylim=(1e-4, 1))
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FILE, dpi=110)


if __name__ == "__main__":
    main()
