"""The pure step, against torch.optim, finite differences and hand-derived limits."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import selftune as st
from selftune.bilevel import Bilevel, Run
from selftune.hypervector import HyperVector
from selftune.penalties import L1
from selftune.tuner._objective import Objective, for_tuning
from selftune.update import Update

RULES: dict[str, Any] = {
    "SGD": (st.rules.SGD(), dict(lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "Adam": (st.rules.Adam(), dict(lr=0.01, weight_decay=1e-3)),
    "AdamW": (st.rules.AdamW(), dict(lr=0.01, weight_decay=0.1)),
    "RMSprop": (st.rules.RMSprop(), dict(lr=0.01, momentum=0.5, weight_decay=1e-3)),
}
SHRINKING = torch.linspace(1, 0, 51, dtype=torch.float64)[:-1]


def net(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(6)] if norm else []
    # A bias before a norm has a gradient of nothing but rounding, which Adam makes large.
    return nn.Sequential(
        nn.Linear(4, 6, bias=not norm), *middle, nn.Tanh(), nn.Linear(6, 2)
    ).double()


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 4, generator=generator).double(),
         torch.randn(8, 2, generator=generator).double())
        for _ in range(count)
    ]  # fmt: skip


def make(
    model: nn.Module,
    rule: str = "SGD",
    loss: Any = F.mse_loss,
    tune: tuple[str, ...] = ("lr",),
    values: dict[str, float] | None = None,
    penalties: tuple[Any, ...] = (),
    **parts: Any,
) -> tuple[Bilevel, Run]:
    step, given = RULES[rule]
    update = Update(step, penalties)
    known = {n: 0.0 for n in update.hparams} | dict(step.defaults) | given | (values or {})
    objective = Objective(model, loss, None)
    every = parts.pop("every", 5)
    bilevel = Bilevel(
        objective, for_tuning(objective, every), update,
        {k: v for k, v in known.items() if k not in tune},
        HyperVector(update.hparams, tune, horizon=1000),
        parts.pop("estimator", st.Trace(stride=every)), parts.pop("storage", None),
        parts.pop("average", st.Average()), parts.pop("rates", torch.ones(1).double()),
        **parts,
    )  # fmt: skip
    # The first run shares the model's tensors; a copy keeps the tests' models as they are.
    return bilevel, tree_map(torch.clone, bilevel.init(known))


@pytest.mark.parametrize("rule", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_training_steps_are_those_of_torch_and_the_average_a_running_mean(rule: str) -> None:
    model = net()
    bilevel, run = make(model, rule, rates=SHRINKING)
    opt = getattr(torch.optim, rule)(model.parameters(), **RULES[rule][1])
    peak, average = RULES[rule][1]["lr"], [p.detach().clone() for p in model.parameters()]
    for step, batch in enumerate(batches(50)):
        observe = step % 5 == 4
        loss, grads, buffers = bilevel.gradient(run, batch)
        run = bilevel.advance(run, loss, grads, buffers, observe=observe)
        opt.param_groups[0]["lr"] = peak * float(SHRINKING[step])
        opt.zero_grad()
        expected = F.mse_loss(model(batch[0]), batch[1])
        expected.backward()
        opt.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        share = max(1 - 0.98**5, min(5 / (step + 2), 1))  # evenly at first
        for mean, param in zip(average, model.parameters(), strict=True):
            mean.lerp_(param.detach(), share * observe)
    for weight, param, mean in zip(run.weights, model.parameters(), average, strict=True):
        torch.testing.assert_close(weight.value, param.detach(), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(weight.average, mean, rtol=1e-11, atol=1e-13)


def linear(output: Tensor, target: Tensor) -> Tensor:
    """A loss without curvature in the last layer's weights."""
    return (output * target).mean()


def hypergradient_after(
    steps: int, raw: Tensor | None, parts: dict[str, Any], *, steady: bool = False
) -> Any:
    """Outer loss and hypergradient after some steps at fixed raw hyperparameters."""
    model = nn.Linear(4, 2).double()
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            param.copy_(torch.randn(param.shape, generator=generator))
    bilevel, run = make(model, loss=linear, **parts)
    if raw is not None:
        run = run._replace(hyper=run.hyper._replace(raw=raw))
    for batch in batches(1) * steps if steady else batches(steps):
        loss, grads, buffers = bilevel.gradient(run, batch)
        run = bilevel.advance(run, loss, grads, buffers, observe=True)
    bilevel.outer.loss_fn = F.mse_loss
    loss, grads, _ = bilevel.outer_gradient(run, batches(1, seed=9)[0])
    return float(loss), bilevel.hypergradient(run, grads), run.hyper.raw


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
    parts: dict[str, Any] = dict(rule=rule, tune=tune, values=values, every=1)
    parts["estimator"] = st.Trace(discount=1.0, closed_forms=False)
    _, found, raw = hypergradient_after(30, None, parts)
    for at in range(len(tune)):
        ends = []
        for sign in (1, -1):
            moved = raw.clone()
            moved[at] += sign * 1e-5
            ends.append(hypergradient_after(30, moved, parts)[0])
        assert float(found[at]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_the_decay_needs_no_row_beside_the_rate() -> None:
    values = dict(weight_decay=0.0, decay=0.01)
    both = dict(rule="SGD", tune=("lr", "decay"), values=values, every=1, estimator=st.Trace())
    rows = {**both, "estimator": st.Trace(closed_forms=False)}
    for steps in (50, 300):
        _, found, _ = hypergradient_after(steps, None, both, steady=True)
        _, exact, _ = hypergradient_after(steps, None, rows, steady=True)
        assert float(found[1] / found[0]) == pytest.approx(float(exact[1] / exact[0]), rel=0.12)


def hypergradients_by_form(
    rule: str, tune: tuple[str, ...], values: dict[str, float], steps: int, along: str
) -> list[Tensor]:
    """Hypergradients by closed forms and by rows, of the same run."""
    found = []
    for closed in (True, False):
        estimator = st.Trace(closed_forms=closed)
        bilevel, run = make(net(), rule, tune=tune, values=values, every=1, estimator=estimator)
        for batch in batches(steps):
            loss, grads, buffers = bilevel.gradient(run, batch)
            run = bilevel.advance(run, loss, grads, buffers, observe=True)
        _, grads, _ = bilevel.outer_gradient(run, batches(1, seed=9)[0])
        vectors = [w.average for w in run.weights] if along == "average" else grads
        found.append(bilevel.hypergradient(run, vectors))
    return found


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_weight_decay_needs_no_row_where_it_shrinks_weights(rule: str) -> None:
    """Truth: the row itself; equal but for what weights move within the average's reach."""
    tune, values = ("lr", "weight_decay"), dict(lr=1e-3)
    closed, row = hypergradients_by_form(rule, tune, values, 200, "average")
    assert float(closed[1]) == pytest.approx(float(row[1]), rel=0.05)


@pytest.mark.parametrize("rule", list(RULES))
def test_the_rate_needs_no_row(rule: str) -> None:
    """Truth: the row itself, up to what decay shrinks of it."""
    values = dict(weight_decay=1e-6)
    for steps in (3, 100):
        closed, row = hypergradients_by_form(rule, ("lr",), values, steps, "gradient")
        assert float(closed[0]) == pytest.approx(float(row[0]), rel=1e-4)


def test_observing_every_fifth_step_of_a_steady_run_changes_nothing() -> None:
    model = nn.Linear(4, 2).double()
    with torch.no_grad():  # far from 0, where the sign in the L1 gradient would turn
        for param in model.parameters():
            param.add_(100.0)
    batch = batches(1)[0]
    found = []
    for stride in (1, 5):
        bilevel, run = make(
            model, loss=linear, tune=("lr", "momentum", "l1"), penalties=(L1(1e-3),),
            values=dict(momentum=0.5, weight_decay=0.0), every=stride, average=st.Average(rho=0.0),
        )  # fmt: skip
        for step in range(1, 301):
            loss, grads, buffers = bilevel.gradient(run, batch)
            seen = step % stride == 0
            run = bilevel.advance(run, loss, grads, buffers, observe=seen)
        found.append(bilevel.hypergradient(run, [torch.ones_like(g) for g in grads]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_half_precision_tangents_lose_little() -> None:
    found = []
    for storage in (None, torch.bfloat16):
        bilevel, run = make(
            net(), tune=("lr", "momentum", "weight_decay"), storage=storage,
            estimator=st.Trace(stride=5),
        )  # fmt: skip
        for step, batch in enumerate(batches(100), start=1):
            loss, grads, buffers = bilevel.gradient(run, batch)
            run = bilevel.advance(run, loss, grads, buffers, observe=step % 5 == 0)
        _, grads, _ = bilevel.outer_gradient(run, batches(1, seed=9)[0])
        found.append(bilevel.hypergradient(run, grads))
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0)


def test_a_step_changes_nothing_it_is_given() -> None:
    bilevel, run = make(net(norm=True), "AdamW", tune=("lr", "beta1", "weight_decay"))
    held = tree_map(torch.clone, run)
    after, told = bilevel.tune(run, *batches(2))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(run), tree_leaves(held), strict=True))
    assert int(after.step) == int(after.age) == 1
    assert told.shape == (6,)
    assert not torch.equal(after.buffers[0], run.buffers[0])
    assert not torch.equal(after.average_buffers[0], run.average_buffers[0])


def test_a_loss_that_is_not_finite_is_stepped_over() -> None:
    bilevel, run = make(net(norm=True))
    run, _ = bilevel.train(run, batches(1)[0])
    inputs, targets = batches(1)[0]
    after, loss = bilevel.tune(run, (inputs * math.nan, targets), batches(1)[0])
    assert math.isnan(float(loss[0]))
    assert int(after.step) == 2
    assert int(after.age) == 1
    before, now = ([w._asdict() for w in r.weights] for r in (run, after))
    for a, b in zip(tree_leaves(before), tree_leaves(now), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(after.buffers[0], run.buffers[0])


def test_outer_gradients_that_are_not_finite_leave_hyperparameters_alone() -> None:
    bilevel, run = make(net())
    run, _ = bilevel.train(run, batches(1)[0])
    inputs, targets = batches(1)[0]
    after, _ = bilevel.tune(run, (inputs, targets), (inputs * math.inf, targets))
    assert torch.equal(after.hyper.raw, run.hyper.raw)


@pytest.mark.parametrize(
    ("limited", "turns", "climbs"), [(True, False, True), (True, True, False), (False, True, True)]
)
def test_the_rate_climbs_where_weights_are_led(limited: bool, turns: bool, climbs: bool) -> None:
    """Law: hypergradients ask for more at every step; in the first tenth of the run they get it."""
    bilevel, run = make(net(), tune=("lr",), values={"momentum": 0.0}, limited=limited)
    rates = []
    for step in range(400):
        slope = -1e-3 if turns and step // 20 % 2 else 1e-3
        grads = [torch.full_like(w.value, slope) for w in run.weights]
        run = bilevel.advance(run, torch.ones(()), grads, run.buffers)
        if step % 5 == 4:
            run = bilevel.stepped(run, torch.tensor([-1.0]).double(), run.average_buffers)
            rates.append(float(bilevel.hyper.values(run.hyper.raw)["lr"]))
    assert rates[18] > 1.5 * rates[0]
    assert (rates[-1] > 1.5 * rates[25]) == climbs


@pytest.mark.parametrize("limited", [True, False])
def test_a_member_of_a_population_is_a_run_of_its_own(limited: bool) -> None:
    bilevel, run = make(
        net(norm=True), "AdamW", tune=("lr", "beta1", "weight_decay"), limited=limited
    )
    other = run._replace(hyper=bilevel.hyper.move(run.hyper, "lr", 1.0))
    many = tree_map(lambda *t: torch.stack(t), run, other)
    mapped = torch.func.vmap(bilevel.tune, in_dims=(0, None, None), randomness="different")
    alone = [run, other]
    for batch in batches(10):
        many, _ = mapped(many, batch, batch)
        alone = [bilevel.tune(r, batch, batch)[0] for r in alone]
    for member, single in enumerate(alone):
        for a, b in zip(tree_leaves(many), tree_leaves(single), strict=True):
            torch.testing.assert_close(a[member], b, rtol=1e-7, atol=1e-9)
