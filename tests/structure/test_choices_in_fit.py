"""Choices tuned by ``fit``. Truths: closed forms, loops, the branch of the data."""

import copy
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sine import job, loss, wide_job
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import selftune as st
from selftune.structure import Choice, Chooser, prune
from tests.tuner.jobs import Dying, Outage


def fit(model: nn.Module, x: Tensor, y: Tensor, *callbacks: Any, **options: Any) -> Any:
    """A run of 300 steps, evaluated every 5."""
    parts = list(zip(x[:300].split(25), y[:300].split(25), strict=True))
    given = {"hparams": {"lr": 1e-2}, "compile": False}
    given |= {n: options.pop(n) for n in ("compile", "population", "hparams") if n in options}
    options = {"steps": 300, "evaluate_every": 5, "val": [(x[300:], y[300:])]} | options
    train, val = options.pop("train", parts), options.pop("val")
    return st.Tuner(model, F.mse_loss, **given).fit(
        train, val, callbacks=callbacks, progress=False, **options
    )


def test_the_tuner_chooses_the_branch_that_made_the_data() -> None:
    """Convergence; outputs and loss of the pruned model are those of the model."""
    model, x, y = job()
    seen: dict[int, float] = {}
    result = fit(
        model, x, y, Chooser(model).callback(partial(loss, model, x[300:], y[300:])),
        lambda progress: seen.update({progress.step: float(model[1].weights().max())}),
    )  # fmt: skip
    assert model[1].weights().tolist() == [0.0, 1.0, 0.0]
    assert result.best_weights["1.scores"].tolist() == [-100.0, 100.0, -100.0]
    assert seen[25] == pytest.approx(1 / 3)
    assert seen[235] < 1
    assert all(seen[step] == 1 for step in range(240, 301, 5))
    with torch.no_grad():
        pruned = prune(model, x[:1], loss=lambda m: loss(m, x[300:], y[300:]), tolerance=1e-6)
        assert type(pruned[1]).__name__ == "Sine"
        torch.testing.assert_close(pruned(x), model(x))
        assert float(loss(pruned, x[300:], y[300:])) == pytest.approx(result.best_loss, rel=1e-4)


@pytest.mark.parametrize("evaluate_every", [5, 20])
def test_the_tuner_gives_the_scores_of_a_loop(evaluate_every: int) -> None:
    """Truth: ``step`` in a loop, at the weights that the tuner showed its callbacks."""
    model, x, y = job()
    weights: dict[int, dict[str, Tensor]] = {}
    ends: dict[int, Tensor] = {}

    def before(progress: Any) -> None:
        weights[progress.step] = {n: p.detach().clone() for n, p in model.named_parameters()}

    def after(progress: Any) -> None:
        ends[progress.step] = model[1].scores.clone()

    callback = Chooser(model).callback(partial(loss, model, x[300:], y[300:]))
    fit(model, x, y, before, callback, after, evaluate_every=evaluate_every)
    other = job()[0]
    chooser = Chooser(other, 300, every=evaluate_every)
    for step in range(1, 301):
        if step >= 30:  # the first tenth of the run has no updates
            shown = weights[-(-step // evaluate_every) * evaluate_every]
            other.load_state_dict(shown, strict=False)
        chooser.step(partial(loss, other, x[300:], y[300:]))
        if step in ends:
            assert torch.equal(other[1].scores, ends[step])


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("traced")
def test_the_tuner_trains_and_validates_with_changed_scores(compiled: bool) -> None:
    """Closed form: (Σ w_k k x / 2)², for fixed weights and scores of 0, (0, 1) and (−50, 50)."""
    model = nn.Sequential(Choice([Times(1.0), Times(3.0)]), nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[1].weight, 0.5)
    losses = []

    def turn(progress: Any) -> None:
        losses.append((progress.train_loss, progress.scores["loss"]))
        scores = (-50.0, 50.0) if progress.step >= 20 else (0.0, 1.0)
        model[0].scores.copy_(torch.tensor(scores))

    result = st.Tuner(
        model, F.mse_loss, rule=st.rules.SGD(), hparams=dict(lr=1e-12), tune=[], probe=False,
        guard=False, compile=compiled,
    ).fit(
        [(torch.ones(4, 1), torch.zeros(4, 1))] * 5, [(torch.ones(2, 1), torch.zeros(2, 1))],
        steps=40, evaluate_every=10, callbacks=[turn], progress=False,
    )  # fmt: skip
    half = float(torch.tensor([0.0, 1.0]).softmax(0) @ torch.tensor([1.0, 3.0])) / 2
    want = [(1.0, 1.0), (half**2, half**2), (2.25, 2.25), (2.25, 2.25)]
    torch.testing.assert_close(losses, want, rtol=1e-6, atol=0)
    assert result.best_loss == pytest.approx(2.25)
    assert result.best_weights["0.scores"].tolist() == [-50.0, 50.0]


@pytest.mark.slow
def test_units_of_other_branches_are_closed_and_not_dead() -> None:
    """Law: three of four branches lose their gradients at a raised rate, without a rewind."""
    model, x, y = wide_job()
    callback = Chooser(model).callback(partial(loss, model, x[300:], y[300:]))
    options = {"hparams": {"lr": 1e-4}, "steps": 600, "evaluate_every": 10}
    result = fit(model, x, y, callback, **options)
    assert model[0].weights().max() == 1
    assert result.hparams["lr"] > 1e-3
    assert list(result.history["rewinds"]) == []


@pytest.mark.slow
def test_an_interrupted_fit_continues_with_the_same_scores(tmp_path: Path) -> None:
    """Truth: the run that was not interrupted; without the state of Adam, equal scores go on."""
    saved: dict[str, Any] = {}

    def run(folder: str, after: float = math.inf, state: Any = None) -> tuple[Any, list[Tensor]]:
        model, x, y = job()
        chooser = Chooser(model)
        if state is not None:
            chooser.load_state_dict(state)
        shown: list[Tensor] = []

        def save(progress: Any) -> None:
            saved.update(copy.deepcopy(chooser.state_dict()), scores=model[1].scores.clone())

        callbacks: list[Callable[[Any], Any]] = [
            lambda progress: shown.append(model[1].scores.clone()),
            chooser.callback(partial(loss, model, x[300:], y[300:])), save,
        ]  # fmt: skip
        train = Dying(list(zip(x[:300].split(25), y[:300].split(25), strict=True)), after)
        result = fit(
            model, x, y, *callbacks, train=train, log_dir=tmp_path / folder, resume=True,
            evaluate_every=15, steps=150,
        )  # fmt: skip
        return result, shown

    whole = run("whole")[0]
    with pytest.raises(Outage):
        run("cut", 85)
    state = dict(saved)
    assert state["taken"] == 75
    assert state["scores"].max() > 0
    shutil.copytree(tmp_path / "cut", tmp_path / "without")
    resumed, shown = run("cut", state=state)
    assert torch.equal(shown[0], state["scores"])
    for name, tensor in whole.best_weights.items():
        assert torch.equal(resumed.best_weights[name], tensor), name
    assert resumed.best_loss == whole.best_loss
    resumed, shown = run("without")
    assert torch.equal(shown[0], state["scores"])
    assert resumed.best_weights["1.scores"].max() == 100


def test_runs_whose_scores_cannot_change_are_named() -> None:
    model, x, y = job()
    closure = partial(loss, model, x[300:], y[300:])
    with pytest.raises(ValueError, match="population=2: a callback closed units or changed scores"):
        fit(model, x, y, Chooser(model).callback(closure), population=2, steps=40)
    model, x, y = job()
    closure = partial(loss, model, x[300:], y[300:])
    train = DataLoader(TensorDataset(x[:300], y[:300]), batch_size=25)
    with pytest.raises(ValueError, match="val=None: a callback tunes choices"):
        fit(model, x, y, Chooser(model).callback(closure), train=train, val=None, steps=40)


def test_a_choice_after_the_last_step_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = job()
    closure = partial(loss, model, x[300:], y[300:])
    fit(model, x, y, Chooser(model).callback(closure), steps=60, evaluate_every=40)
    assert "choice: made after the last of 60 steps" in caplog.text
    assert model[1].weights().max() == 1
