"""Penalties judged beside settled directions. Truths: linear algebra, and the exact response."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor

import selftune as st
from selftune import settled
from selftune.settled import Changes, Settled, beside

SHARP, FLAT = 3, 297
DECAY, RATE = 1e-3, 0.01
CURVATURES = torch.cat([torch.full((SHARP,), 150.0), torch.full((FLAT,), 0.05)]).double()


def alone(products: Tensor) -> Tensor:
    """One process."""
    return products


def test_nothing_is_left_in_the_span_of_changes() -> None:
    """Law: a projection, whatever the lengths of changes, in parts or whole."""
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(4, 60, generator=generator, dtype=torch.float64)
    changes *= torch.tensor([[1e-6], [1.0], [1e3], [0.0]])
    grads = torch.randn(60, generator=generator, dtype=torch.float64)
    left = beside([grads], [changes], torch.zeros(4))[0]
    basis = torch.linalg.qr(changes[:3].T)[0]
    torch.testing.assert_close(left, grads - basis @ (basis.T @ grads))
    parts = beside(list(grads.split(20)), list(changes.split(20, dim=1)), torch.zeros(4))
    torch.testing.assert_close(torch.cat(parts), left)


def test_repeated_changes_are_one() -> None:
    """Law: a span does not depend on how often a vector is in it."""
    change, grads = torch.ones(1, 5), torch.arange(5.0)
    once = beside([grads], [change], torch.zeros(1))[0]
    torch.testing.assert_close(beside([grads], [change.expand(4, 5)], torch.zeros(4))[0], once)
    torch.testing.assert_close(once, grads - 2.0)


def test_the_inverse_is_that_of_the_curvature_that_changes_show() -> None:
    """Closed form: (1/τ + H)⁻¹ g / τ for H = Yᵀ D⁻¹ Y."""
    generator = torch.Generator().manual_seed(1)
    changes = torch.randn(3, 30, generator=generator, dtype=torch.float64)
    grads = torch.randn(30, generator=generator, dtype=torch.float64)
    rises, reach = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64), 0.7
    hessian = changes.T @ torch.diag(1 / rises) @ changes
    exact = torch.linalg.solve(torch.eye(30) / reach + hessian, grads) / reach
    torch.testing.assert_close(beside([grads], [changes], rises / reach)[0], exact)


def slope(weights: Tensor) -> Tensor:
    """Of the training loss, a valley with few sharp directions."""
    return CURVATURES * (weights - 1.0)


def outer(weights: Tensor) -> Tensor:
    """A validation loss whose best weights are larger in flat directions, smaller in sharp ones."""
    best = torch.cat([torch.full((SHARP,), 0.5), torch.full((FLAT,), 3.0)]).double()
    return (CURVATURES * (weights - best).square()).sum() / 2


def trained(steps: int = 400, **options: object) -> tuple[Tensor, st.SGD]:
    """Full batches at a rate that lets sharp directions oscillate; nothing is tuned yet."""
    weights = torch.nn.Parameter(torch.full((SHARP + FLAT,), 0.8, dtype=torch.float64))
    opt = st.SGD(
        [weights], lr=RATE, weight_decay=DECAY, tune=("weight_decay",), probe=False, guard=False,
        hyper_optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0), **options,
    )  # fmt: skip
    for _ in range(steps):
        # Something to keep sharp directions going, as batches do.
        weights.grad = slope(weights.detach())
        weights.grad[:SHARP] += torch.randn(SHARP, generator=noise(opt)).double()
        opt.step()
        opt.hyper_step(lambda: outer(weights))
    return weights, opt


def noise(opt: st.SGD) -> torch.Generator:
    """A generator of its own for every step."""
    return torch.Generator().manual_seed(opt._engine.clock.steps)


def noted(opt: st.SGD) -> Tensor:
    """The changes that are kept."""
    changes = opt._engine.blocks[0].changes
    assert changes is not None
    return changes.kept


def told(opt: st.SGD) -> float:
    """The mean hypergradient of weight decay."""
    return float(opt._engine.tuning.signals()["weight_decay"][0])


def test_decay_follows_the_exact_response(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: −λ w (1/τ + H)⁻¹ ∇L_val, for any τ; without it the sign is wrong."""
    weights, opt = trained()
    with opt.averaged():
        place = weights.detach().clone().requires_grad_()
    (grads,) = torch.autograd.grad(outer(place), place)
    for reach in (10 * RATE, 400 * RATE):
        exact = -DECAY * (place.detach() / (1 / reach + CURVATURES)) @ grads
        assert float(exact) > 0  # more decay would make flat directions worse
    assert told(opt) > 0
    monkeypatch.setattr(settled, "KEPT", 0)
    assert told(trained()[1]) < 0


def test_flat_directions_are_left_though_weights_move_along_them() -> None:
    """Closed form: two changes along the same direction count as twice its curvature."""
    curvature, reach, count = 0.01, 2.0, 4 * settled.MANY
    place, changes, state = torch.zeros(count).double(), None, Settled()
    state.lay_out(count)
    changes = Changes.none(place)
    move = torch.ones(count).double()
    for step in range(3):
        here = place + step * move
        rise = changes.note(here, curvature * here, None, step % state.slots)
        assert math.isnan(float(rise)) == (step == 0)
    changes.kept[0].zero_()
    pull = torch.tensor([0.0, float(rise), float(rise), 0.0]) / reach
    left = beside([move], [changes.kept], pull)[0]
    twice = 2 * reach * curvature
    torch.testing.assert_close(left, move / (1 + twice))


def test_a_ridge_is_not_taken_for_a_valley() -> None:
    """Law: where the slope falls along the way, nothing is kept."""
    weights = torch.nn.Parameter(torch.full((200,), 0.1))
    opt = st.SGD([weights], lr=0.01, weight_decay=0.1, tune=("weight_decay",), probe=False)
    for _ in range(20):
        weights.grad = -5.0 * weights.detach()
        opt.step()
    assert opt._engine.hypergradients.settled.slots == settled.KEPT
    assert not noted(opt).any()


def test_few_weights_are_judged_as_they_are() -> None:
    """Law: of 49 weights no direction is taken."""
    weights = torch.nn.Parameter(torch.ones(settled.MANY - 1))
    opt = st.SGD([weights], lr=0.01, tune=("weight_decay",), probe=False)
    weights.grad = torch.ones_like(weights)
    opt.step()
    assert opt._engine.hypergradients.settled.slots == 0


def test_decoupled_decay_keeps_no_changes() -> None:
    """Law: AdamW's decay is no penalty, and costs no memory."""
    weights = torch.nn.Parameter(torch.ones(200))
    opt = st.AdamW([weights], lr=0.01, weight_decay=0.1, probe=False)
    weights.grad = torch.ones_like(weights)
    opt.step()
    assert opt._engine.blocks[0].changes is None


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    """Truth: the run that was not interrupted, between two changes."""
    weights, opt = trained(201, every=12)  # noted after 200 steps, asked after 204
    state = copy.deepcopy(opt.state_dict())
    twin = torch.nn.Parameter(weights.detach().clone())
    other = st.SGD(
        [twin], lr=RATE, weight_decay=DECAY, tune=("weight_decay",), probe=False, guard=False,
        hyper_optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0), every=12,
    )  # fmt: skip
    other.load_state_dict(state)
    for _ in range(30):
        for values, stepped in ((weights, opt), (twin, other)):
            values.grad = slope(values.detach())
            values.grad[:SHARP] += torch.randn(SHARP, generator=noise(stepped)).double()
            stepped.step()
            stepped.hyper_step(partial(outer, values))
    assert torch.equal(weights, twin)
    assert told(opt) == told(other)


@pytest.mark.parametrize("apart", [False, True])
def test_weights_without_a_gradient_take_no_part(apart: bool) -> None:
    """Closed form: a change is 3 Δw since there was a gradient last, in one group or in two."""
    params = [torch.nn.Parameter(torch.full((100,), 0.5)) for _ in range(2)]
    groups = [{"params": [p]} for p in params] if apart else params
    estimator = st.Trace(stride=5)
    opt = st.SGD(groups, lr=0.01, tune=("weight_decay",), probe=False, estimator=estimator)

    def step(*, both: bool) -> Tensor:
        params[0].grad = 3.0 * params[0].detach()
        params[1].grad = 3.0 * params[1].detach() if both else None
        opt.step()
        return params[1].detach().clone()

    for _ in range(20):
        step(both=True)
    for _ in range(20):
        still = step(both=False)
    first, second = torch.cat([b.changes.kept for b in opt._engine.blocks], 1).split(100, 1)
    assert first.all()
    assert not second.any()
    for _ in range(5):
        before = step(both=True)
    changed = opt.state[params[1]]["change"].abs().amax(0)
    weights = torch.full((100,), 0.5) * 0.97**19, still * 0.97**4
    torch.testing.assert_close(changed, 3.0 * (weights[0] - weights[1]))
    assert not torch.equal(before, still)


@pytest.mark.parametrize(("schedule", "share"), [("constant", 1.0), ("linear", 0.5)])
def test_time_is_the_rate_summed_over_steps(schedule: str, share: float) -> None:
    """Law: τ grows by η at every step, whatever the schedule."""
    weights = torch.nn.Parameter(torch.ones(200))
    opt = st.SGD(
        [weights], lr=RATE, weight_decay=DECAY, tune=("weight_decay",), probe=False, guard=False,
        schedule=schedule, total_steps=1000, every=10,
        hyper_optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0),
    )  # fmt: skip
    for _ in range(1000):
        weights.grad = torch.zeros_like(weights)
        opt.step()
        opt.hyper_step(lambda: weights.sum())
    time = float(opt._engine.hypergradients.settled.time)
    assert time == pytest.approx(1000 * RATE * share, rel=0.1)


def test_a_flat_change_leaves_a_sharp_one_its_due() -> None:
    """Closed form: orthogonal changes of curvature h take off τ h / (1 + τ h) each."""
    curvatures, reach = torch.tensor([150.0, 1e-5], dtype=torch.float64), 0.5
    left = beside([torch.ones(2).double()], [curvatures.diag()], curvatures / reach)[0]
    torch.testing.assert_close(left, 1 / (1 + reach * curvatures))


def test_a_run_on_training_gradients_alone_notes_its_own_weights() -> None:
    """Truth: the weights before each fourth step, while hyper steps look at travelled ways."""
    weights = torch.nn.Parameter(torch.ones(200))
    opt = st.SGD([weights], lr=0.01, weight_decay=DECAY, probe=False)
    for step in range(1, 201):
        if step % 4 == 0:
            before = weights.detach().clone()
        weights.grad = weights.detach() + 0.1 * torch.randn(200, generator=noise(opt))
        opt.step()
    assert torch.equal(opt.state[weights]["last"], before)


def test_a_roll_back_forgets_changes() -> None:
    """Law: a fresh start knows nothing."""
    weights, opt = trained()
    settled_ = opt._engine.hypergradients.settled
    assert noted(opt).any()
    assert settled_.time > 0
    opt._engine.guard = st.optim._base.Guard()
    opt._engine.roll_back("tried", worsened=True)
    assert not noted(opt).any()
    assert opt.state[weights]["last_grad"].isnan().all()
    assert settled_.time == 0


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu() -> None:
    """Truth: the same run on a CPU; one parameter never has a gradient."""

    def run(device: str) -> float:
        params = [torch.nn.Parameter(torch.full((200,), 0.8, device=device)) for _ in range(2)]
        opt = st.SGD(params, lr=RATE, weight_decay=DECAY, tune=("weight_decay",), probe=False)
        for _ in range(50):
            params[0].grad = 3.0 * (params[0].detach() - 1)
            opt.step()
            opt.hyper_step(lambda: (params[0] - 2).square().sum())
        return opt.hparams["weight_decay"]

    assert run("cuda") == pytest.approx(run("cpu"), rel=1e-4)
