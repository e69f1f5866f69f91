"""The pure steps, against torch.optim, finite differences and hand-derived limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parts import Batch, assert_same, batches, made, net, write
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import selftune as st
from selftune.method import MethodSettings
from selftune.penalties import L1
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps

RULES: dict[str, tuple[st.rules.AbstractRule, dict[str, float]]] = {
    "SGD": (st.rules.SGD(), dict(lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "Adam": (st.rules.Adam(), dict(lr=0.01, weight_decay=1e-3)),
    "AdamW": (st.rules.AdamW(), dict(lr=0.01, weight_decay=0.1)),
    "RMSprop": (st.rules.RMSprop(), dict(lr=0.01, momentum=0.5, weight_decay=1e-3)),
}
SHRINKING = torch.linspace(1, 0, 51, dtype=torch.float64)[:-1]
AS_IT_IS = MethodSettings(unit_gradient=False)


def make(
    model: nn.Module, rule: str = "SGD", values: dict[str, float] | None = None, **parts: Any
) -> tuple[Steps, RunState]:
    step, given = RULES[rule]
    steps, run = made(model, step, values={**given, **(values or {})}, **parts)
    # The first run shares the model's tensors; a copy keeps the tests' models as they are.
    return steps, tree_map(torch.clone, run)


def trained(steps: Steps, run: RunState, data: list[Batch], stride: int = 1) -> RunState:
    """The run after training steps, each stride-th of them tracked."""
    for step, batch in enumerate(data, start=1):
        run, _ = steps.train(run, batch, tracked=step % stride == 0)
    return run


def hypergradients(
    steps: Steps, run: RunState, grads: list[Tensor] | None = None
) -> dict[str, float]:
    """dL/d(raw) by name, along given outer gradients or those of a batch."""
    if grads is None:
        _, grads, _ = steps.outer_gradient(run, batches(1, seed=9)[0])
    signal = steps.signal(run, grads, {})[1]
    return dict(zip(steps.hyper.names, signal.tolist(), strict=True))


@pytest.fixture(params=["eager", "graph"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Numbers that the host looks at, or tensors as in graphs and under torch's transforms."""
    with torch.set_grad_enabled(request.param == "graph"):
        yield


# the step of the weights


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rule", list(RULES))
def test_training_steps_are_those_of_torch_and_the_average_a_running_mean(rule: str) -> None:
    """Truth: torch's optimizer, and the average by hand, even at first."""
    model = net()
    steps, run = make(model, rule, rates=SHRINKING)
    opt = getattr(torch.optim, rule)(model.parameters(), **RULES[rule][1])
    peak, average = RULES[rule][1]["lr"], [p.detach().clone() for p in model.parameters()]
    for step, batch in enumerate(batches(50)):
        tracked = step % 5 == 4
        run, told = steps.train(run, batch, tracked=tracked)
        opt.param_groups[0]["lr"] = peak * float(SHRINKING[step])
        opt.zero_grad()
        with torch.enable_grad():
            expected = F.mse_loss(model(batch[0]), batch[1])
            expected.backward()
        opt.step()
        assert float(told[0]) == pytest.approx(float(expected.detach()), rel=1e-12)
        assert told[1] == 1
        assert math.isnan(told[2]) != tracked
        share = max(1 - 0.98**5, min(5 / (step + 3), 1))  # evenly at first, but the start twice
        with torch.no_grad():
            for mean, param in zip(average, model.parameters(), strict=True):
                mean.lerp_(param, share * tracked)
    params = [p.detach() for p in model.parameters()]
    assert_same(run.weights, params, rtol=1e-11, atol=1e-13)
    assert_same(run.averages, average, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("way")
def test_units_that_no_example_switches_on_are_not_live() -> None:
    """Closed form: a ReLU far below 0 passes no gradient to its row of weights."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(5.0)[:2] = -1e3
    steps, run = make(model)
    told = steps.train(run, batches(1)[0], tracked=True)[1]
    assert told[2:].tolist() == [4, 2]


@pytest.mark.parametrize("joined", [False, True])
def test_eager_steps_are_those_of_graphs(joined: bool) -> None:
    """Twin: the same steps, taken with numbers or with tensors, joined or not."""
    runs = []
    for graph in (False, True):
        steps, run = make(
            net(width=60), tune=("lr", "decay", "momentum", "weight_decay"), every=2,
            values=dict(decay=1e-3), guarded=True, rates=SHRINKING, joined=joined,
        )  # fmt: skip
        assert run.method.secants  # weights enough for stiff directions
        with torch.set_grad_enabled(graph):
            for step, batch in enumerate(batches(50), start=1):
                run, _ = steps.train(run, batch, tracked=step % 2 == 0)
                if step % 2 == 0:
                    run, _ = steps.tune(run, batches(1, seed=step)[0])
        runs.append(run)
    assert_same(*runs, rtol=1e-6, atol=1e-9)


def test_joined_weights_step_as_single_ones() -> None:
    """Twin: one vector of which parameters are views, and one tensor for each."""
    steps, run = made(net(), RULES["AdamW"][0], joined=True)
    twin, other = make(net(), "AdamW", values={"weight_decay": 0.01, "lr": 1e-3})
    views = dict(steps.inner.named_parameters())
    with torch.no_grad():
        for step, batch in enumerate(batches(12), start=1):
            tracked = step % 3 == 0
            write(run, steps.train(run, batch, tracked=tracked)[0])
            other, _ = twin.train(other, batch, tracked=tracked)
            if tracked:
                write(run, steps.tune(run, batch)[0])
                other, _ = twin.tune(other, batch)
    assert_same(steps.views(run.averages), other.averages, rtol=1e-9, atol=1e-12)
    assert_same([views[n].data for n in steps.params], other.weights, rtol=1e-9, atol=1e-12)
    steps.release()
    run.weights[0].zero_()
    assert all(views[n].any() for n in steps.params), "parameters own their tensors again"


# hypergradients


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
    for count in (50, 300):
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
    closed, row = hypergradients_by_form(rule, tune, values, 200, "average")
    assert closed["weight_decay"] == pytest.approx(row["weight_decay"], rel=0.05)


@pytest.mark.parametrize("rule", list(RULES))
def test_the_rate_needs_no_row(rule: str) -> None:
    """Truth: the row itself, up to what decay shrinks of it."""
    values = dict(weight_decay=1e-6)
    for count in (3, 100):
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
        run = trained(steps, run, batches(1) * 300, stride=stride)
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


# the step of the hyperparameters, and what cannot be taken


@pytest.mark.usefixtures("way")
def test_steps_leave_model_and_batches_as_they_are() -> None:
    """Law: a run is all that they change, and it counts them."""
    model, data = net(norm=True), batches(2)
    steps, run = make(model, "AdamW", tune=("lr", "beta1", "weight_decay"))
    held = tree_map(torch.clone, ([*model.parameters(), *model.buffers()], data, run))
    middle, told = steps.train(run, data[0], tracked=True)
    assert told.shape == (2 + sum(p.ndim > 1 for p in model.parameters()),)
    after, told = steps.tune(middle, data[1])
    assert_same(([*model.parameters(), *model.buffers()], data), held[:2])
    assert int(after.step) == int(after.age) == 1
    assert told.shape == (2 + 3 + 3,)
    values = torch.stack(list(steps.hyper.values(after.hyper.raw).values()))
    torch.testing.assert_close(told[2:5], values)
    torch.testing.assert_close(told[5:], held[2].hyper.raw)
    assert not torch.equal(after.buffers[0], held[2].buffers[0])
    assert not torch.equal(after.average_buffers[0], held[2].average_buffers[0])
    assert torch.equal(middle.average_buffers[0], held[2].average_buffers[0])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("where", ["loss", "weights"])
def test_a_step_that_is_not_finite_is_stepped_over(where: str, tracked: bool) -> None:
    """Law: it is counted and told, and changes nothing else."""
    steps, run = make(net(norm=True), tune=("lr", "momentum", "weight_decay"))
    run = trained(steps, run, batches(3))
    before = tree_map(torch.clone, run)
    inputs, targets = batches(1)[0]
    if where == "weights":  # a gradient that is not finite, of a loss that is
        steps.inner.loss_fn = lambda output, target: (output - output).sqrt().sum()
    batch = (inputs * math.nan, targets) if where == "loss" else (inputs, targets)
    after, told = steps.train(run, batch, tracked=tracked)
    assert math.isfinite(told[0]) == (where == "weights")
    assert told[1] == 0
    assert (int(after.step), int(after.age)) == (4, 3)
    assert_same(after._replace(step=before.step, age=before.age), before)


@pytest.mark.usefixtures("way")
def test_outer_gradients_that_are_not_finite_leave_hyperparameters_alone() -> None:
    """Law: raw values stay, and the log says that hypergradients were not finite."""
    steps, run = make(net())
    run = trained(steps, run, batches(1))
    raw = run.hyper.raw.clone()
    inputs, targets = batches(1)[0]
    after, told = steps.tune(run, (inputs * math.inf, targets))
    assert torch.equal(after.hyper.raw, raw)
    assert told[1] == 0


@pytest.mark.parametrize(
    ("guarded", "turns", "climbs"), [(True, False, True), (True, True, False), (False, True, True)]
)
def test_the_rate_climbs_where_weights_drift(guarded: bool, turns: bool, climbs: bool) -> None:
    """Law: hypergradients ask for more at every step; in the first tenth of the run they get it."""
    steps, run = make(net(), values={"momentum": 0.0}, guarded=guarded)
    rates = []
    for step in range(400):
        slope = -1e-3 if turns and step // 20 % 2 else 1e-3
        grads = [torch.full_like(w, slope) for w in run.weights]
        run, _ = steps.advance(run, (torch.ones(()), grads, run.buffers), tracked=False)
        if step % 5 == 4:
            method, _ = steps.method.hyper_step(
                run.method, torch.tensor([-1.0]), run.weights, steps.hyper.frame(), run.step
            )
            run = run._replace(method=method)
            rates.append(float(steps.hyper.values(run.hyper.raw)["lr"]))
    assert rates[18] > 1.5 * rates[0]
    assert (rates[-1] > 1.5 * rates[25]) == climbs


def test_answers_of_another_estimator_stand_for_their_names() -> None:
    """Law: each name's hypergradient is its own estimator's, in the order of the shifts."""
    steps, run = make(net(), tune=("lr", "weight_decay"))
    run = trained(steps, run, batches(5))
    grads = [torch.ones_like(w) for w in run.weights]
    rows = steps.signal(run, grads, {})[1]
    answered = steps.signal(run, grads, {"lr": torch.tensor(7.0)})[1]
    assert answered.tolist() == [7.0, float(rows[1])]


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_a_member_of_a_population_is_a_run_of_its_own(rule: str, guarded: bool) -> None:
    """Twins: each member alone; with weights enough for stiff directions."""
    memory = "momentum" if rule == "SGD" else "beta1"
    steps, run = make(
        net(norm=True, width=20), rule, tune=("lr", memory, "weight_decay"), guarded=guarded
    )
    raw = steps.hyper.move(run.hyper.raw, "lr", 1.0, steps.hyper.frame())
    other = run._replace(method=run.method._replace(hyper=run.hyper._replace(raw=raw)))
    alone = [tree_map(torch.clone, r) for r in (run, other)]
    many = tree_map(lambda *t: torch.stack(t), *alone)

    def both(run: RunState, batch: Batch) -> RunState:
        return steps.tune(steps.train(run, batch, tracked=True)[0], batch)[0]

    mapped = torch.func.vmap(both, in_dims=(0, None), randomness="different")
    for batch in batches(10):
        many = mapped(many, batch)
        alone = [both(r, batch) for r in alone]
    for member, single in enumerate(alone):
        mine = tree_map(lambda t, member=member: t[member], many)
        assert_same(mine, single, rtol=1e-7, atol=1e-9)
