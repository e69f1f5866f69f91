"""Tabular data: a self-tuned network as a scikit-learn estimator.

    python examples/tabular.py [--uci energy|concrete|yacht|power|wine_red] [--epochs 60]

It is compared with ridge regression and gradient boosting, on scikit-learn's diabetes data or, with
``--uci``, on a data set of the UCI repository from ``uci`` in the folder
``SELFTUNE_DATA`` (or ``data``).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import train_test_split

from selftune.search.sklearn import SelfTuningRegressor


def main() -> None:
    """Fit and compare three models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uci", choices=("energy", "concrete", "yacht", "power", "wine_red"))
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()
    if args.uci is None:
        x, y = load_diabetes(return_X_y=True)
    else:
        folder = Path(os.environ.get("SELFTUNE_DATA", "data")) / "uci"
        with np.load(folder / f"{args.uci}.npz") as data:
            x, y = data["x"], data["y"]
    parts = train_test_split(x, y, test_size=0.2, random_state=0)
    net = SelfTuningRegressor(epochs=args.epochs, batch_size=32)
    for model in (RidgeCV(), HistGradientBoostingRegressor(random_state=0), net):
        model.fit(parts[0], parts[2])
        error = np.sqrt(np.mean((model.predict(parts[1]) - parts[3]) ** 2))
        print(f"{type(model).__name__:>30}  test RMSE {error:.4g}")
    ended = ", ".join(f"{name}={value:.3g}" for name, value in net.hparams_.items())
    print(f"final hyperparameters: {ended}")


if __name__ == "__main__":
    main()
