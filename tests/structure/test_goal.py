"""Goals for size. Truths: sizes of the pruned model, losses without units, a search by hand."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import selftune as st
from selftune.structure import (
    Gate,
    Goal,
    Optional,
    open_gates,
    parameter_groups,
    prune,
    with_gates,
)
from selftune.structure._saliency import saliency


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), Gate(12), nn.Linear(12, 1))


def residual() -> nn.Sequential:
    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), Gate(10), nn.Linear(10, 8))

    return nn.Sequential(
        nn.Linear(6, 8), Optional(branch()), Optional(nn.Linear(8, 8), residual=False),
        Gate(8), nn.Linear(8, 1),
    )  # fmt: skip


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Gate(6), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), Gate(8), nn.Flatten(), nn.Linear(72, 3),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(5, 6)),
    "residual": (residual, lambda: torch.randn(5, 6)),
    "cnn": (cnn, lambda: torch.randn(5, 1, 8, 8)),
}


def multiply_adds(model: nn.Module, x: Tensor) -> float:
    """Of Linear and convolution layers, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


def loss_of(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: model(x).square().mean()


@pytest.mark.parametrize("kind", ["parameters", "multiply_adds"])
@pytest.mark.parametrize("name", MODELS)
def test_the_size_is_that_of_the_pruned_model(name: str, kind: str) -> None:
    """Truth: parameters counted, and multiply-adds counted by hooks, of the pruned model."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    goal = Goal(model, x, 0.6, of=kind)
    assert goal.size()["parameters"] == sum(
        p.numel() for n, p in model.named_parameters() if "gates" not in n
    )
    for share in (0.1, 0.15, 0.2):
        goal.close(loss_of(model, x), share)
        pruned = prune(model, x)
        assert goal.size()["parameters"] == sum(p.numel() for p in pruned.parameters())
        assert goal.size()["multiply_adds"] == multiply_adds(pruned, x[:1])
    whole = Goal(make(), x, 1.0).size()[kind]
    assert 0.3 * whole < goal.size()[kind] <= 0.6 * whole


@pytest.mark.parametrize("name", MODELS)
def test_one_example_is_enough(name: str) -> None:
    """Truth: the same model after a goal that saw several."""
    make, inputs = MODELS[name]
    ends = []
    for count in (5, 1):
        torch.manual_seed(0)
        model, x = make(), inputs()
        Goal(model, x[:count], 0.4, of="multiply_adds").close(loss_of(model, x), 1.0)
        pruned = prune(model, x[:count])
        ends.append([p.shape for p in pruned.parameters()])
    assert ends[0] == ends[1]


def test_both_sizes_or_an_absolute_one() -> None:
    """Law: each is at most what was asked for."""
    torch.manual_seed(0)
    model, x = cnn(), torch.randn(5, 1, 8, 8)
    goal = Goal(model, x, 0.5, of=("parameters", "multiply_adds"))
    whole = goal.size()
    goal.close(loss_of(model, x), 1.0)
    assert all(goal.size()[k] <= 0.5 * whole[k] for k in whole)
    goal = Goal(mlp(), torch.zeros(1, 6), budget=60)
    assert goal.size()["parameters"] == 97


def test_saliency_is_the_rise_of_the_loss() -> None:
    """Closed form: ½ E (w x)² for a linear model at its minimum, with residuals of variance 1."""
    torch.manual_seed(0)
    model = nn.Sequential(Gate(2), nn.Linear(2, 1, bias=False)).double()
    x = torch.randn(40_000, 2, dtype=torch.float64) * torch.tensor([1.0, 0.3])
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.5, -1.0]]))
        y = model(x) + torch.randn(len(x), 1, dtype=torch.float64)
    found = saliency(model, lambda: F.mse_loss(model(x), y) / 2)["0"]
    want = torch.tensor([0.5**2 * 1.0, 1.0 * 0.3**2], dtype=torch.float64) / 2
    torch.testing.assert_close(found, want, rtol=0.05, atol=0.0)


def test_useless_units_go_first() -> None:
    """Truth: units whose outgoing weights are 0."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(64, 6)
    with torch.no_grad():
        model[3].weight[0, ::2] = 0.0
    Goal(model, x, 0.51, closings=1).close(loss_of(model, x), 1.0)
    assert model[2].mask.tolist() == [0.0, 1.0] * 6


def test_the_tolerance_bounds_the_rise_of_the_loss() -> None:
    """Truth: the losses before and after, and that one unit more would cost too much."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(64, 6)
    y = torch.randn(64, 1)

    def loss() -> Tensor:
        return F.mse_loss(model(x), y)

    before = float(loss().detach())
    goal = Goal(model, x, tolerance=0.02, batches=1)
    goal.close(loss, 1.0)
    after, (left, _) = float(loss().detach()), open_gates(model)["2"]
    assert before < after <= 1.02 * before
    assert 1 <= left < 12
    assert goal.size()["parameters"] == 8 * left + 1


def test_everything_closed_leaves_a_floor(caplog: pytest.LogCaptureFixture) -> None:
    """Count: one unit in each layer, however much loss may be given up."""
    model, x = cnn(), torch.randn(5, 1, 8, 8)
    goal = Goal(model, x, tolerance=1e9)
    with caplog.at_level(logging.WARNING, "selftune"):
        for _ in range(3):
            goal.close(loss_of(model, x), 1.0)
    assert [k for k, _ in open_gates(model).values()] == [1, 1]
    assert sum("all units but one" in r.getMessage() for r in caplog.records) == 1
    prune(model, x)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "needs budget="),
    "above": (dict(budget=1000), "the model has only 97 parameters"),
    "zero": (dict(budget=0.0), "must be above 0"),
    "below": (dict(budget=0.01), "has 9 parameters of 97"),
    "two": (dict(budget=50, of=("parameters", "multiply_adds")), "two sizes need a share"),
    "of": (dict(budget=0.5, of="flops"), "of='flops' must be one of"),
    "tolerance": (dict(tolerance=-1.0), "tolerance=-1.0"),
    "window": (dict(budget=0.5, start=0.6, end=0.3), "start=0.6, end=0.3"),
    "closings": (dict(budget=0.5, closings=0), "closings=0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_goals_are_named(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Goal(mlp(), torch.zeros(1, 6), **options)


def test_models_that_cannot_shrink_are_named() -> None:
    with pytest.raises(ValueError, match="no gates"):
        Goal(nn.Linear(2, 2), torch.zeros(1, 2), 0.5)
    with pytest.raises(ValueError, match="no unit"):
        Goal(nn.Sequential(nn.Linear(2, 2), Gate(2)), torch.zeros(1, 2), 0.5)
    goal = Goal(mlp(), torch.zeros(1, 6), 0.5, total_steps=1)
    other = mlp()
    with pytest.raises(ValueError, match="does not depend on the gates of 2"):
        goal.step(lambda: other(torch.ones(1, 6)).mean())
    with pytest.raises(ValueError, match="total_steps=None"):
        Goal(mlp(), torch.zeros(1, 6), 0.5).step(lambda: torch.ones(()))


def job() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), Gate(40), nn.Linear(40, 1))
    x = torch.randn(460, 8)
    return model, x, x[:, :3].sin().sum(1, keepdim=True) + 0.1 * torch.randn(460, 1)


def test_the_optimizers_end_at_the_budget() -> None:
    """Convergence: a quarter of the units is as good as all on three of eight inputs."""
    losses: list[float] = []
    rows: list[dict[str, float]] = []

    def record(values: dict[str, float], step: int) -> None:
        rows.append(values)

    for budget in (None, 0.25):
        model, x, y = job()
        opt = st.AdamW(parameter_groups(model), lr=1e-2, total_steps=300, model=model)
        goal = None if budget is None else Goal(
            model, x[:1], budget, total_steps=300,
            recorder=record,
        )  # fmt: skip

        def closure(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.mse_loss(model(x[400:]), y[400:])

        for step in range(300):
            at = slice(step % 20 * 20, step % 20 * 20 + 20)
            opt.zero_grad()
            F.mse_loss(model(x[at]), y[at]).backward()
            opt.step()
            opt.hyper_step(closure)
            if goal is not None:
                goal.step(closure)
        with opt.averaged(), torch.no_grad():
            pruned = prune(model, x[:1])
            losses.append(float(F.mse_loss(pruned(x[400:]), y[400:])))
    assert pruned[0].out_features == 9
    assert losses[1] < 1.3 * losses[0]
    assert goal is not None
    assert goal.price > 0
    shares = [r["structure/parameters"] for r in rows if "structure/parameters" in r]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] <= 0.25


def test_the_tuner_ends_at_the_budget() -> None:
    """Count: the best weights that it leaves in the model have the size that was asked for."""
    model, x, y = job()
    parts = list(zip(x[:400].split(20), y[:400].split(20), strict=True))
    goal = Goal(model, x[:1], 0.25)
    tuner = st.Tuner(model, F.mse_loss, hparams=dict(lr=1e-2), compile=False)
    result = tuner.fit(
        parts, [(x[400:], y[400:])], steps=300, evaluate_every=15, progress=False,
        callbacks=[goal.callback(lambda: F.mse_loss(model(x[400:]), y[400:]))],
    )  # fmt: skip
    assert open_gates(model)["2"] == (9, 40)
    with torch.no_grad():
        pruned = prune(model, x[:1])
        assert float(F.mse_loss(pruned(x[400:]), y[400:])) == pytest.approx(
            result.best_loss, rel=1e-4
        )
    assert result.best_loss < 0.1


def test_the_callback_closes_until_the_end_of_the_goal() -> None:
    """Law: with a tolerance, masks stay as they are after the first evaluation at 80 %."""
    model, x, y = job()
    parts = list(zip(x[:400].split(20), y[:400].split(20), strict=True))
    goal = Goal(model, x[:1], tolerance=0.5)
    seen: dict[int, int] = {}
    st.Tuner(model, F.mse_loss, hparams=dict(lr=1e-2), compile=False).fit(
        parts, [(x[400:], y[400:])], steps=150, evaluate_every=20, progress=False,
        callbacks=[
            goal.callback(lambda: F.mse_loss(model(x[400:]), y[400:])),
            lambda progress: seen.update({progress.step: open_gates(model)["2"][0]}),
        ],
    )  # fmt: skip
    assert list(seen) == [20, 40, 60, 80, 100, 120, 140, 150]
    assert {seen[step] for step in (20, 40, 60)} == {40}
    assert seen[120] < 40
    assert len({seen[step] for step in seen if step >= 120}) == 1


def test_a_large_model_ends_at_the_budget() -> None:
    """Count: of 1,000 units with 8 parameters each and a bias, 4,000 or fewer are 499."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 1000), Gate(1000), nn.Linear(1000, 1)), torch.randn(5, 6)
    goal = Goal(model, x, 0.5)
    goal.close(loss_of(model, x), 1.0)
    assert open_gates(model) == {"1": (499, 1000)}


def test_a_population_is_refused() -> None:
    model, x, y = job()
    parts = list(zip(x[:400].split(20), y[:400].split(20), strict=True))
    goal = Goal(model, x[:1], 0.25)
    tuner = st.Tuner(model, F.mse_loss, population=2)
    with pytest.raises(ValueError, match="population=2"):
        tuner.fit(
            parts, [(x[400:], y[400:])], steps=40, evaluate_every=10, progress=False,
            callbacks=[goal.callback(lambda: F.mse_loss(model(x[400:]), y[400:]))],
        )  # fmt: skip


def test_goals_go_on_from_a_saved_state() -> None:
    """Truth: the goal that was not interrupted."""
    ends = []
    for cut in (False, True):
        torch.manual_seed(0)
        model, x = mlp(), torch.randn(64, 6)
        goal = Goal(model, x, 0.5, total_steps=100)
        for step in range(100):
            if cut and step == 12:
                saved, weights = goal.state_dict(), model.state_dict()
                model = mlp()
                model.load_state_dict(weights)
                goal = Goal(model, x, 0.5, total_steps=100)
                goal.load_state_dict(saved)
            goal.step(loss_of(model, x))
        ends.append(model[2].mask.tolist())
    assert ends[0] == ends[1]
    assert 0 in ends[0]


def test_multiply_adds_by_hand() -> None:
    """Count: 6 channels of 36 pixels with 9 weights, 8 of 9 with 54, and 72 × 3."""
    sizes = Goal(cnn(), torch.zeros(2, 1, 8, 8), 1.0).size()
    assert sizes["multiply_adds"] == 6 * 36 * 9 + 8 * 9 * 54 + 72 * 3
    assert sizes["parameters"] == 60 + 12 + 440 + 219


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "sequence first"])
def test_multiply_adds_are_those_of_an_example(first: bool) -> None:
    """Count: 10 positions of 8 × 32 and 32 × 4 weights; an encoder alike in both layouts."""
    gate = Gate(32, dim=-1, batch_dim=0 if first else 1)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), gate, nn.Linear(32, 4))
    x = torch.zeros(3, 10, 8)
    sizes = Goal(model, x if first else x.transpose(0, 1), 1.0).size()
    assert sizes["multiply_adds"] == 10 * (8 * 32 + 32 * 4)
    flat = nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 32), Gate(32), nn.Linear(32, 4))
    assert Goal(flat, x, 1.0).size()["multiply_adds"] == 10 * (8 * 32 + 32 * 4)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=first)
    sizes = Goal(with_gates(layer), x if first else x.transpose(0, 1), 1.0).size()
    assert sizes["multiply_adds"] == 10 * (4 * 8 * 8 + 2 * 8 * 16)
    attended = with_gates(Attended(nn.MultiheadAttention(8, 2, batch_first=first)))
    block = Optional(nn.Linear(8, 8), batch_dim=0 if first else 1)
    for model, layers in ((attended, 4), (nn.Sequential(block), 1)):
        sizes = Goal(model, x if first else x.transpose(0, 1), 1.0).size()
        assert sizes["multiply_adds"] == 10 * layers * 8 * 8


class Attended(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("total", [1, 2, 7, 12, 22, 52])
def test_short_runs_end_at_the_budget(total: int) -> None:
    """Truth: the budget, where the last closing is rounded to a step before ``end``."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(5, 6)
    goal = Goal(model, x, 0.5, total_steps=total)
    whole = goal.size()["parameters"]
    for _ in range(total):
        goal.step(loss_of(model, x))
    assert goal.size()["parameters"] <= 0.5 * whole


def test_a_tolerance_without_its_state_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Truth: a goal that was not interrupted, whose state another one loads."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(64, 6)
    goal = Goal(model, x, tolerance=0.3)
    goal.close(loss_of(model, x), 0.6)
    assert 0 in model[2].mask
    goal.close(loss_of(model, x), 0.7)
    resumed = Goal(model, x, tolerance=0.3)
    resumed.load_state_dict(goal.state_dict())
    with caplog.at_level(logging.WARNING, "selftune"):
        resumed.close(loss_of(model, x), 1.0)
        assert "counts from" not in caplog.text
        Goal(model, x, tolerance=0.3).close(loss_of(model, x), 1.0)
    assert "tolerance=0.3 counts from the current loss" in caplog.text
