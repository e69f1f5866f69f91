"""Losses with random numbers of their own. Law: the same weights have the same loss."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from jobs import loader, net, points
from torch import nn
from torch.nn import functional as F

import selftune as st

VAL = [points(40, seed=1), points(40, seed=2)]


def noisy(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss of which one evaluation says little."""
    return F.cross_entropy(model(batch[0]), batch[1]) * (1 + torch.randn(()))


def by_chance(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss that hardly depends on the weights."""
    return 1e-30 * F.cross_entropy(model(batch[0]), batch[1]) + torch.randn(())


def with_derivatives(model: nn.Module, batch: Any) -> torch.Tensor:
    """The same, with derivatives by inputs, so evaluations need gradients."""
    chance, inputs = torch.randn(()), batch[0].clone().requires_grad_()
    slopes = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)[0]
    return by_chance(model, batch) + 1e-30 * slopes.square().mean() + chance


def fit(objective: Any, rule: str = "SGD", **options: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(st.rules, rule)()
    tuner = st.Tuner(net(), objective=objective, rule=made, guard=False, probe=False)
    options = {"steps": 40, "evaluate_every": 5, "progress": False} | options
    return tuner.fit(loader(), VAL, **options)


@pytest.mark.parametrize("objective", [by_chance, with_derivatives])
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_all_evaluations_draw_the_same_numbers(rule: str, objective: Any) -> None:
    scores = fit(objective, rule).history["score/loss"]
    assert len(scores) == 8
    np.testing.assert_allclose(scores, scores[0], rtol=1e-6)


def test_batches_draw_different_numbers() -> None:
    """Otherwise the mean over batches would not be less noisy than one of them."""
    seen = []

    def objective(model: nn.Module, batch: Any) -> torch.Tensor:
        draw = torch.randn(())
        if not torch.is_grad_enabled():
            seen.append(float(draw))
        return by_chance(model, batch) + draw

    fit(objective, steps=5)
    assert len(set(seen)) >= 2


def test_evaluations_leave_the_random_numbers_of_the_run() -> None:
    """Twin: evaluated twice as often."""
    one, other = fit(noisy), fit(noisy, evaluate_every=10)
    assert one.history["lr"][-1] == other.history["lr"][-1]
    assert math.isfinite(one.best_loss)


def test_a_resumed_run_with_augmented_validation_data_is_not_taken_for_another(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its loss differs from pass to pass."""

    class Augmented(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Any:
            x, y = VAL[0]
            return x[index] + torch.randn(2), y[index]

    val = torch.utils.data.DataLoader(Augmented(), batch_size=20)
    for _ in range(2):
        tuner = st.Tuner(net(), F.cross_entropy, probe=False)
        tuner.fit(loader(), val, steps=20, log_dir=tmp_path, resume=True, progress=False)
    assert "resumed at step 20" in caplog.text
    assert "on the data of this call" not in caplog.text


def test_evaluations_do_not_change_the_run() -> None:
    """Truth: the run that is evaluated once. Shuffled loaders and metrics draw random numbers."""
    ends = []
    for every in (5, 60):
        torch.manual_seed(0)
        val = torch.utils.data.DataLoader(loader(60, 1).dataset, 20, shuffle=True)
        noisy = lambda output, target: float(torch.rand(()) + random.random())  # noqa: E731
        run = st.Tuner(net(dropout=0.2), F.cross_entropy, metrics={"noisy": noisy}, compile=False)
        result = run.fit(loader(shuffle=True), val, steps=60, evaluate_every=every, progress=False)
        ends.append(result)
    assert ends[0].hparams == ends[1].hparams
    for name in ("train_loss", "val_loss"):
        assert np.array_equal(*(end.history[name] for end in ends), equal_nan=True)
