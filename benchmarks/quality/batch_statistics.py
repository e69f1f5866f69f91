"""BatchNorm's statistics at the end of a run whose validation passes are in training mode.

    python -m benchmarks.quality.batch_statistics [--without] [--evaluation] [--tuner] [--seeds 5]

Test losses of the last weights, in ``averaged()``, and there with statistics of the training set
(torch's ``update_bn``): networks with BatchNorm for two regressions and for digits, 600 steps.
``--without`` leaves out the passes at the end that collect statistics for the final weights, and
``--evaluation`` runs validation passes in evaluation mode. ``--tuner`` trains by ``st.Tuner``; its
last weights are not known.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import selftune as st
from selftune.optim._outer import OuterLoss

Data = tuple[Tensor, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]
SIZES = [900, 300, 4000]  # training, validation, test

STARTS = {"AdamW": {"lr": 3e-3}, "SGD": {"lr": 0.02, "momentum": 0.9}}


def product(size: int, seed: int) -> Data:
    """``Σ x + x₀ x₁`` with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    noise = 0.1 * torch.randn(size, 1, generator=generator)
    return x, x[:, :1] * x[:, 1:2] + x.sum(1, keepdim=True) + noise


def friedman(size: int, seed: int) -> Data:
    """Friedman's first function, scaled."""
    x, y = make_friedman1(size, 10, noise=0.5, random_state=seed)
    return torch.tensor(x).float() * 3.46 - 1.73, (torch.tensor(y).float()[:, None] - 14.4) / 5


def digits(size: int, seed: int) -> Data:
    """Parts of scikit-learn's digits."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    part = order.split([900, 300, 597])[seed - 1]
    return torch.tensor(data.data).float()[part] / 16, torch.tensor(data.target)[part]


def mlp(inputs: int) -> nn.Module:
    """Two layers of 64 units."""
    layers = [nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU()]
    layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1)]
    return nn.Sequential(*layers)


def cnn(inputs: int) -> nn.Module:
    """Two convolutions."""
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)]
    layers += [nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


JOBS = {
    "product": (product, mlp, F.mse_loss),
    "friedman1": (friedman, mlp, F.mse_loss),
    "digits": (digits, cnn, F.cross_entropy),
}


@torch.no_grad()
def loss_of(net: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor) -> float:
    """The loss in evaluation mode."""
    net.eval()
    loss = float(loss_fn(net(x), y))
    net.train()
    return loss


def tuned(job: str, rule: str, seed: int, steps: int = 600) -> tuple[float, float, float]:
    """Test losses of a tuner's model, and after ``update_bn``; the first one is not known."""
    data, make, loss_fn = JOBS[job]
    parts = [data(size, part) for part, size in enumerate(SIZES, 1)]
    torch.manual_seed(seed)
    net = make(parts[0][0].shape[1])
    drawn = torch.Generator().manual_seed(seed)
    train, val = (
        DataLoader(TensorDataset(*part), size, shuffle=True, generator=drawn)
        for part, size in zip(parts, (50, 100), strict=False)
    )
    tuner = st.Tuner(
        net, loss_fn, rule=getattr(st.rules, rule)(), hparams=STARTS[rule], compile=False
    )
    tuner.fit(train, val, steps=steps, progress=False)
    own = loss_of(net, loss_fn, *parts[2])
    update_bn([parts[0][0]], net)
    return float("nan"), own, loss_of(net, loss_fn, *parts[2])


def run(
    job: str, rule: str, seed: int, steps: int = 600, *, evaluation: bool = False
) -> tuple[float, float, float]:
    """Test losses of the last weights, in ``averaged()``, and there after ``update_bn``."""
    data, make, loss_fn = JOBS[job]
    x, y = zip(*(data(size, part) for part, size in enumerate(SIZES, 1)), strict=True)
    torch.manual_seed(seed)
    net = make(x[0].shape[1])
    opt = getattr(st, rule)(net, **STARTS[rule], total_steps=steps)
    drawn, drawn_val = (torch.Generator().manual_seed(seed + s) for s in (100, 0))

    def test() -> float:
        return loss_of(net, loss_fn, x[2], y[2])

    def closure() -> Tensor:
        some = torch.randperm(SIZES[1], generator=drawn_val)[:100]
        net.train(not evaluation)
        loss = loss_fn(net(x[1][some]), y[1][some])
        net.train()
        return loss

    for _ in range(steps):
        some = torch.randint(SIZES[0], (50,), generator=drawn)
        opt.zero_grad()
        loss_fn(net(x[0][some]), y[0][some]).backward()
        opt.step()
        opt.hyper_step(closure)
    last = test()
    with opt.averaged():
        own = test()
        update_bn([(x[0],)], net)
        return last, own, test()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluation", action="store_true")
    parser.add_argument("--tuner", action="store_true")
    args = parser.parse_args()
    train = tuned if args.tuner else partial(run, evaluation=args.evaluation)
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    if args.without:
        patch.object(OuterLoss, "_settle", lambda *_: None).start()
    print("| job | optimizer | last | `averaged()` (highest) | after `update_bn` |")
    print("|---|---|---|---|---|")
    for job in JOBS:
        for rule in STARTS:
            last, own, exact = zip(*(train(job, rule, s) for s in range(args.seeds)), strict=True)
            means = [statistics.mean(losses) for losses in (last, own, exact)]
            print(f"| {job} | {rule} | {means[0]:.4f} | {means[1]:.4f} ({max(own):.4f}) "
                  f"| {means[2]:.4f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
