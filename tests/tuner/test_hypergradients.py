"""Hypergradients of the pure steps. Truths: finite differences, rows of sensitivities, twins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parts import RULES, batches, make, net, trained
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.method import MethodSettings
from selftune.penalties import L1
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps

AS_IT_IS = MethodSettings(unit_gradient=False)


def hypergradients(
    steps: Steps, run: RunState, grads: list[Tensor] | None = None
) -> dict[str, float]:
    """dL/d(raw) by name, along given outer gradients or those of a batch."""
    if grads is None:
        _, grads, _ = steps.outer_gradient(run, batches(1, seed=9)[0])
    signal = steps.signal(run, grads, {})[1]
    return dict(zip(steps.hyper.names, signal.tolist(), strict=True))


def linear(output: Tensor, target: Tensor) -> Tensor:
    """A loss without curvature in the last layer's weights."""
    return (output * target).mean()


def hypergradient_after(
    count: int, raw: Tensor | None, parts: dict[str, Any], *, steady: bool = False
) -> tuple[float, dict[str, float], Tensor]:
    """Outer loss, hypergradients and raw values after steps at fixed hyperparameters."""
    model = nn.Linear(4, 2).double()
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            param.copy_(torch.randn(param.shape, generator=generator))
    steps, run = make(model, loss=linear, settings=AS_IT_IS, **parts)
    if raw is not None:
        hyper = run.hyper._replace(raw=raw)
        run = run._replace(method=run.method._replace(hyper=hyper))
    run = trained(steps, run, batches(1) * count if steady else batches(count))
    steps.outer.loss_fn = F.mse_loss
    loss, grads, _ = steps.outer_gradient(run, batches(1, seed=9)[0])
    return float(loss), hypergradients(steps, run, grads), run.hyper.raw


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("rule", "tune", "values"),
    [
        ("SGD", ("lr", "momentum"), dict(weight_decay=0.0)),
        ("SGD", ("decay",), dict(weight_decay=0.0, decay=0.01)),
        ("AdamW", ("lr", "beta1", "weight_decay"), {}),
        ("RMSprop", ("lr", "momentum"), dict(weight_decay=0.0)),
    ],
)
def test_hypergradients_are_finite_differences_where_the_loss_has_no_curvature(
    rule: str, tune: tuple[str, ...], values: dict[str, float]
) -> None:
    """Truth: central differences of the outer loss after whole runs, but for their rounding."""
    parts: dict[str, Any] = dict(rule=rule, tune=tune, values=values, every=1)
    parts["estimator"] = st.Trace(discount=1.0, closed_forms=False)
    _, found, raw = hypergradient_after(30, None, parts)
    for at, name in enumerate(found):
        ends = []
        for sign in (1, -1):
            moved = raw.clone()
            moved[at] += sign * 1e-5
            ends.append(hypergradient_after(30, moved, parts)[0])
        assert found[name] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9)


def test_hypergradients_are_taken_along_an_outer_gradient_of_length_1() -> None:
    """Closed form: those along the gradient as it is, divided by its length."""
    found = []
    for settings in (AS_IT_IS, MethodSettings()):
        steps, run = make(net(), tune=("lr", "momentum", "weight_decay"), settings=settings)
        run = trained(steps, run, batches(20), stride=5)
        _, grads, _ = steps.outer_gradient(run, batches(1, seed=9)[0])
        found.append(steps.signal(run, grads, {})[1])
        found.append(steps.signal(run, [1e-6 * g for g in grads], {})[1])
    length = math.sqrt(sum(float(g.square().sum()) for g in grads))
    torch.testing.assert_close(found[2], found[0] / length)
    torch.testing.assert_close(found[1], 1e-6 * found[0])
    torch.testing.assert_close(found[3], found[2])


def test_the_decay_needs_no_row_beside_the_rate() -> None:
    """Truth: the row itself, in proportion to that of the rate."""
    values = dict(weight_decay=0.0, decay=0.01)
    both = dict(rule="SGD", tune=("lr", "decay"), values=values, every=1, estimator=st.Trace())
    rows = {**both, "estimator": st.Trace(closed_forms=False)}
    for count in (50, 200):
        _, found, _ = hypergradient_after(count, None, both, steady=True)
        _, exact, _ = hypergradient_after(count, None, rows, steady=True)
        ratio = exact["decay"] / exact["lr"]
        assert found["decay"] / found["lr"] == pytest.approx(ratio, rel=0.12)


def hypergradients_by_form(
    rule: str, tune: tuple[str, ...], values: dict[str, float], count: int, along: str
) -> list[dict[str, float]]:
    """Hypergradients by closed forms and by rows, of the same run."""
    found = []
    for closed in (True, False):
        estimator = st.Trace(closed_forms=closed)
        steps, run = make(net(), rule, tune=tune, values=values, every=1, estimator=estimator)
        run = trained(steps, run, batches(count))
        found.append(hypergradients(steps, run, run.averages if along == "average" else None))
    return found


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_weight_decay_needs_no_row_where_it_shrinks_weights(rule: str) -> None:
    """Truth: the row itself; equal but for what weights move within the average's reach."""
    tune, values = ("lr", "weight_decay"), dict(lr=1e-3)
    closed, row = hypergradients_by_form(rule, tune, values, 100, "average")
    assert closed["weight_decay"] == pytest.approx(row["weight_decay"], rel=0.05)


@pytest.mark.parametrize("rule", list(RULES))
def test_the_rate_needs_no_row(rule: str) -> None:
    """Truth: the row itself, up to what decay shrinks of it."""
    values = dict(weight_decay=1e-6)
    for count in (3, 50):
        closed, row = hypergradients_by_form(rule, ("lr",), values, count, "gradient")
        assert closed["lr"] == pytest.approx(row["lr"], rel=1e-4)


def test_tracking_every_fifth_step_of_a_steady_run_changes_nothing() -> None:
    """Twin: every step is tracked."""
    model = nn.Linear(4, 2).double()
    with torch.no_grad():  # far from 0, where the sign in the L1 gradient would turn
        for param in model.parameters():
            param.add_(100.0)
    found = []
    for stride in (1, 5):
        steps, run = make(
            model, loss=linear, tune=("lr", "momentum", "l1"), penalties=(L1(1e-3),),
            values=dict(momentum=0.5, weight_decay=0.0, l1=1e-3), every=stride,
            average=st.Average(rho=0.0),
        )  # fmt: skip
        run = trained(steps, run, batches(1) * 150, stride=stride)
        found.append(hypergradients(steps, run, [torch.ones_like(w) for w in run.weights]))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_half_precision_sensitivities_lose_little() -> None:
    """Twin: those in the precision of the weights."""
    found = []
    for storage in (None, torch.bfloat16):
        steps, run = make(
            net(), tune=("lr", "momentum", "weight_decay"), storage=storage,
            estimator=st.Trace(stride=5),
        )  # fmt: skip
        run = trained(steps, run, batches(100), stride=5)
        found.append(hypergradients(steps, run))
    assert found[1] == pytest.approx(found[0], rel=0.05)
