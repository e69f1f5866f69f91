"""The pure steps, against torch.optim, closed forms, twins and laws."""

from __future__ import annotations

import math

import pytest
import torch
from parts import RULES, Batch, assert_same, batches, made, make, net, trained, write
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from selftune.tuner._run_state import RunState

SHRINKING = torch.linspace(1, 0, 51, dtype=torch.float64)[:-1]


# the step of the weights


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"Lion"}))  # which torch does not have
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
    assert told.shape == (2 + 3 + 3 + 3,)
    values = torch.stack(list(steps.hyper.values(after.hyper.raw).values()))
    torch.testing.assert_close(told[2:5], values)
    torch.testing.assert_close(told[5:8], after.hyper.raw)
    torch.testing.assert_close(told[8:], held[2].hyper.raw)
    assert not torch.equal(after.buffers[0], held[2].buffers[0])
    assert not torch.equal(after.average_buffers[0], held[2].average_buffers[0])
    assert torch.equal(middle.average_buffers[0], held[2].average_buffers[0])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("where", ["loss", "weights"])
@pytest.mark.parametrize("rule", list(RULES))
def test_a_step_that_is_not_finite_is_stepped_over(where: str, tracked: bool, rule: str) -> None:
    """Law: it is counted and told, and changes nothing else."""
    steps, run = make(net(norm=True), rule, tune=("lr", "weight_decay"))
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
