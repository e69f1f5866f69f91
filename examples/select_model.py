"""Which family of models suits a data set? One search over all of them.

    python examples/select_model.py [--data digits|fashion] [--trials 12] [--log-dir runs/select]

The candidates are an MLP, a CNN, and an LSTM and a Transformer over the rows of the image, each
with a few choices of depth and width. Learning rate, momentum and weight decay are tuned within
each trial. The best model is evaluated on a test set that was not used for tuning or selection.
Fashion-MNIST: 12,000 images from ``$SELFTUNE_DATA``, or through torchvision.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from selftune import search
from selftune.search import families


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8 × 8 digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(
        data.target
    )


def fashion(folder: str | None) -> tuple[Tensor, Tensor]:
    """12,000 images of Fashion-MNIST, which torchvision downloads if the folder has none."""
    if folder and (file := Path(folder) / "fashion_mnist.npz").exists():
        with np.load(file) as data:
            x, y = torch.from_numpy(data["x_train"]), torch.from_numpy(data["y_train"])
    else:
        from torchvision.datasets import FashionMNIST

        data = FashionMNIST(folder or "data", download=True)
        x, y = data.data, data.targets
    return x[:12_000].unsqueeze(1).float() / 255, y[:12_000].long()


def main() -> None:
    """Search, and evaluate the best model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--log-dir", default="runs/select")
    args = parser.parse_args()
    torch.manual_seed(0)
    x, y = digits() if args.data == "digits" else fashion(os.environ.get("SELFTUNE_DATA"))
    order = torch.randperm(len(x))
    train, val, test = order.tensor_split([len(x) * 2 // 3, len(x) * 5 // 6])
    found = search.select(
        [families.MLP, families.CNN, families.LSTM, families.Transformer],
        DataLoader(TensorDataset(x[train], y[train]), 64, shuffle=True),
        DataLoader(TensorDataset(x[val], y[val]), 64, shuffle=True),
        trials=args.trials, steps=args.steps, workers=args.workers, log_dir=args.log_dir,
    )  # fmt: skip
    print(found.table())
    assert found.model is not None
    with torch.no_grad():
        right = float(search.accuracy(found.model(x[test]), y[test]))
    print(f"\n{found.family}, {found.params}: test accuracy {100 * right:.1f} %")
    print(f"tensorboard --logdir {args.log_dir}")


if __name__ == "__main__":
    main()
