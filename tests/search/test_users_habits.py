"""What users do around a search: Ctrl-C, modules beside the script, random splits, threads.

Truths: the points of a grid, torch's own generator, scikit-learn's logistic regression, an error.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from selftune import search
from selftune.search.sklearn import SelfTuningClassifier, SelfTuningRegressor

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
BATCHES = [(x, x.sum(1, keepdim=True)) for x in X.split(16)]


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """Python ignores Ctrl-C in processes that a shell starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    """Ctrl-C; the main thread may notice it a little later."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.0)


def build(space: search.Space) -> nn.Module:
    width = space.suggest_categorical("width", (4, 8))
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))


@pytest.mark.parametrize("seed", range(3))
def test_a_grid_tries_the_point_that_ctrl_c_interrupted(seed: int, tmp_path: Path) -> None:
    """Truth: it is the best one."""
    calls: list[int] = []
    best: list[int] = []

    def objective(space: search.Space) -> float:
        calls.append(space.suggest_int("a", 1, 6))
        if len(calls) == 4:  # the first call counts the points
            best.append(calls[-1])
            press()
        return float([calls[-1]] != best)

    options: Any = dict(progress=False, sampler="grid", storage=tmp_path / "journal", seed=seed)
    search.select(objective, **options)  # the best so far
    found = search.select(objective, **options)
    assert (found.value, found.params["a"]) == (0.0, best[0])
    tried = [t.params["a"] for t in found.study.trials if t.state.name == "COMPLETE"]
    assert sorted(tried) == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_in_the_first_trial_is_no_error() -> None:
    def objective(space: search.Space) -> float:
        press()
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        search.select(objective, trials=3, progress=False)


SCRIPT = """
import pathlib, sys
import torch
from torch.nn import functional as F
from selftune import search
from beside import build

sys.path.append(pathlib.Path("elsewhere"))  # which Python ignores

if __name__ == "__main__":
    torch.manual_seed(0)
    batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(64, 4).split(16)]
    found = search.select(build, batches[:3], batches[3:], trials=2, epochs=1, workers=2,
                          loss_fn=F.mse_loss, progress=False)
    print("found", found.params["width"])
"""
BESIDE = """
from torch import nn

def build(space):
    width = space.suggest_categorical("width", (4, 8))
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))
"""


@pytest.mark.slow
def test_workers_find_modules_beside_the_script(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "beside.py").write_text(BESIDE)
    done = subprocess.run(
        [sys.executable, str(folder / "script.py")], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "found" in done.stdout, done.stderr[-500:]


class Broken:
    """An object that a worker cannot load."""

    def __reduce__(self) -> Any:
        return os.strerror, ("no number",)


@pytest.mark.slow
def test_workers_that_cannot_begin_are_named() -> None:
    """Truth: an error, at once and not after many tries."""
    broken = Broken()

    def build_broken(space: search.Space) -> nn.Module:
        return nn.Linear(4, 1 if broken else 2)

    with pytest.raises(RuntimeError, match="the first 2 workers ended before a trial"):
        search.select(
            build_broken, BATCHES[:3], BATCHES[3:], trials=4, epochs=1, workers=2,
            loss_fn=F.mse_loss, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("candidates", [build, "auto"])
def test_searches_leave_the_generator_alone(candidates: Any) -> None:
    """Truth: splits that follow each other without a search."""
    pairs = TensorDataset(X, X.sum(1, keepdim=True))

    def splits(between: bool) -> list[list[int]]:
        torch.manual_seed(0)
        found = []
        for _ in range(3):
            found.append(torch.randperm(64).tolist())
            if between:
                search.select(
                    candidates, DataLoader(pairs, 16, shuffle=True), BATCHES, trials=1, epochs=1,
                    loss_fn=F.mse_loss, progress=False,
                )  # fmt: skip
        return found

    assert splits(between=True) == splits(between=False)


def test_estimators_in_threads_are_reproducible() -> None:
    """Truth: the same fit alone; and the user's generator."""
    x = np.random.RandomState(0).randn(120, 3)
    found: dict[int, Any] = {}

    def fit(number: int) -> None:
        made = SelfTuningRegressor(epochs=5, width=8, depth=1, tuner={"compile": False})
        found[number] = made.fit(x, x[:, 0]).predict(x[:2]).tolist()

    fit(0)
    state = torch.get_rng_state()
    threads = [threading.Thread(target=fit, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [16, 250])
def test_balanced_weights_are_balanced_at_every_batch_size(batch_size: int) -> None:
    """Truth: logistic regression with balanced weights, on features without information."""
    rng = np.random.RandomState(0)
    x, new = rng.randn(2000, 3), rng.randn(2000, 3)
    y = np.zeros(2000, int)
    y[:40] = 1
    truth = LogisticRegression(class_weight="balanced").fit(x, y).predict_proba(new)[:, 1].mean()
    model = SelfTuningClassifier(
        depth=0, epochs=10, batch_size=batch_size, class_weight="balanced"
    ).fit(x, y)
    assert model.predict_proba(new)[:, 1].mean() == pytest.approx(truth, abs=0.06)


class Pressed(nn.Linear):
    """A linear model, in whose hundredth pass Ctrl-C is pressed."""

    def __init__(self, passes: list[int]) -> None:
        super().__init__(4, 1)
        self.passes = passes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes[-1] += 1
        if self.passes[-1] == 100:
            os.kill(os.getpid(), signal.SIGINT)
        return super().forward(x).squeeze(1)


def test_ctrl_c_ends_a_cross_validation() -> None:
    """Truth: the number of fits."""
    passes: list[int] = []

    def module(shape: search.Shape) -> nn.Module:
        passes.append(0)
        return Pressed(passes)

    x = np.random.RandomState(0).randn(100, 4)
    model = SelfTuningRegressor(module=module, epochs=100, tuner={"compile": False})
    with pytest.raises(KeyboardInterrupt):
        cross_val_score(model, x, x[:, 0], cv=3)
    assert len(passes) == 1
    assert passes[0] < 2000


def test_examples_of_another_shape_are_refused() -> None:
    """Truth: an error (the last dimension was broadcast)."""
    rng = np.random.RandomState(0)
    model = SelfTuningRegressor(epochs=2).fit(rng.randn(60, 4, 5), rng.randn(60))
    for shape in ((3, 4, 1), (3, 4, 6), (3, 4)):
        with pytest.raises(ValueError, match=r"those of fit had \(4, 5\)"):
            model.predict(rng.randn(*shape))


def test_words_and_classes_of_validation_batches_are_known() -> None:
    """Truth: the trials finish (all of them failed)."""
    torch.manual_seed(0)
    x = torch.randint(0, 50, (64, 6))
    y = (x[:, 0] > 25).long()
    x_val, y_val = x[:16].clone(), y[:16].clone()
    x_val[3, 2], y_val[0] = 57, 2
    train = list(zip(x.split(16), y.split(16), strict=True))
    found = search.select(
        [search.families.LSTM], train, [(x_val, y_val)], trials=1, epochs=1, progress=False
    )
    assert found.model(x_val).shape == (16, 3)


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.zeros(8, 3, dtype=torch.bool), "bool"), (torch.tensor([[1, -2]]), "word index -2")],
)
def test_inputs_that_no_family_takes_are_named_first(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search.select("auto", [(x, torch.zeros(len(x)))], 0.5, epochs=1, progress=False)


@pytest.mark.parametrize("candidates", ["auto", [search.families.MLP]])
def test_families_without_data_are_named(candidates: Any) -> None:
    with pytest.raises(ValueError, match="train=None"):
        search.select(candidates, trials=1, epochs=1, progress=False)
