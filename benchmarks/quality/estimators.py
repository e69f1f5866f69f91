"""The scikit-learn estimators with and without an embedding of features, and boosted trees.

    SELFTUNE_DATA=... python -m benchmarks.quality.estimators [--splits 5] [--only energy,yacht]

``SelfTuningRegressor`` and ``SelfTuningClassifier`` with default settings but for ``frequency``, on
tables of the UCI repository and of scikit-learn; a quarter of the examples is for testing. Printed
are means over random splits of the test error: the root mean squared error in standard deviations
of the target, or the log loss; of embeddings and trees, relative to no embedding, with the standard
error of pairs in its logarithm.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import datasets
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from selftune.search.sklearn import SelfTuningClassifier, SelfTuningRegressor

Array = NDArray[Any]
UCI = ("energy", "concrete", "yacht", "power", "wine_red")
LOADED: dict[str, Callable[..., Any]] = {
    "diabetes": datasets.load_diabetes,
    "breast cancer": datasets.load_breast_cancer,
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "digits": datasets.load_digits,
}
FREQUENCIES = (0.0, 0.1, 0.3)


def load(name: str) -> tuple[Array, Array]:
    """Features and targets."""
    if name in LOADED:
        x, y = LOADED[name](return_X_y=True)
        return x, y
    with np.load(Path(os.environ["SELFTUNE_DATA"]) / "uci" / f"{name}.npz") as data:
        return data["x"], data["y"].reshape(len(data["x"]), -1)[:, 0]


def errors(name: str, split: int) -> list[float]:
    """Test errors at the frequencies, and of boosted trees."""
    x, y = load(name)
    train, test, target, truth = train_test_split(x, y, random_state=split, test_size=0.25)
    regression = np.issubdtype(y.dtype, np.floating)
    ours = SelfTuningRegressor if regression else SelfTuningClassifier
    trees = HistGradientBoostingRegressor if regression else HistGradientBoostingClassifier
    eager = {"compile": False}  # compiling takes longer than most of these runs
    models = [ours(frequency=f, random_state=split, tuner=eager) for f in FREQUENCIES]
    found = []
    for model in (*models, trees(random_state=split)):
        model.fit(train, target)
        if regression:
            found.append(float(np.sqrt(np.mean((model.predict(test) - truth) ** 2)) / y.std()))
        else:
            found.append(float(log_loss(truth, model.predict_proba(test))))
    return found


def main() -> None:
    """Fit, and print the table."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--splits", type=int, default=5)
    made.add_argument("--only", help="comma-separated")
    args = made.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    others = [*(f"frequency {f:g}" for f in FREQUENCIES[1:]), "boosted trees"]
    print(f"| table | no embedding | {' | '.join(others)} |\n|{'---|' * (len(others) + 2)}")
    for name in args.only.split(",") if args.only else (*UCI, *LOADED):
        runs = [errors(name, split) for split in range(args.splits)]
        cells = [f"{statistics.mean(r[0] for r in runs):.3f}"]
        for column in range(1, len(runs[0])):
            logs = [math.log(r[column] / r[0]) for r in runs]
            spread = statistics.stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else math.nan
            mean = statistics.mean(r[column] for r in runs)
            cells.append(f"{mean:.3f} ({math.exp(statistics.mean(logs)):.2f} ± {spread:.2f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
