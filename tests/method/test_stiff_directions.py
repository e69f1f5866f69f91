"""Outer gradients beside stiff directions. Truths: linear algebra, and the exact sensitivity."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import selftune as st
from selftune.control import Action
from selftune.method import MethodSettings, StiffSettings
from selftune.method.stiff_directions import Secants, Stiffness, deflate

SHARP, FLAT = 3, 297
DECAY, RATE = 1e-3, 0.01
CURVATURES = torch.cat([torch.full((SHARP,), 150.0), torch.full((FLAT,), 0.05)]).double()
PAIRS, MANY = StiffSettings().pairs, StiffSettings().weights


def alone(products: Tensor) -> Tensor:
    """One process."""
    return products


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_nothing_is_left_in_the_span_of_changes() -> None:
    """Law: a projection, whatever the lengths of changes, in parts or whole, of any shape."""
    changes, grads = normal(4, 60), normal(60, seed=1)
    changes *= torch.tensor([[1e-6], [1.0], [1e3], [0.0]])
    left = deflate([grads], [changes], torch.zeros(4))[0]
    basis = torch.linalg.qr(changes[:3].T)[0]
    torch.testing.assert_close(left, grads - basis @ (basis.T @ grads))
    parts = deflate(list(grads.split(20)), list(changes.split(20, dim=1)), torch.zeros(4))
    torch.testing.assert_close(torch.cat(parts), left)
    whole = deflate([grads.view(5, 12)], [changes.view(4, 5, 12)], torch.zeros(4))[0]
    torch.testing.assert_close(whole, left.view(5, 12))


def test_repeated_changes_are_one() -> None:
    """Law: a span does not depend on how often a vector is in it."""
    change, grads = torch.ones(1, 5), torch.arange(5.0)
    once = deflate([grads], [change], torch.zeros(1))[0]
    torch.testing.assert_close(deflate([grads], [change.expand(4, 5)], torch.zeros(4))[0], once)
    torch.testing.assert_close(once, grads - 2.0)


@pytest.mark.parametrize("rank", range(5))
def test_changes_that_combine_others_take_nothing_more_off(rank: int) -> None:
    """Truth: the projection by a singular value decomposition, of any rank and order."""
    grads = normal(40, seed=9)
    for seed in range(20):
        changes = normal(4, rank, seed=seed) @ normal(rank, 40, seed=seed + 100)
        basis = torch.linalg.svd(changes, full_matrices=False)[2][:rank]
        left = deflate([grads], [changes], torch.zeros(4))[0]
        torch.testing.assert_close(left, grads - basis.T @ (basis @ grads), rtol=0, atol=1e-6)


def test_the_inverse_is_that_of_the_curvature_that_changes_show() -> None:
    """Closed form: (1/τ + H)⁻¹ g / τ for H = Yᵀ D⁻¹ Y."""
    changes, grads = normal(3, 30, seed=1), normal(30, seed=2)
    rises, time = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64), 0.7
    hessian = changes.T @ torch.diag(1 / rises) @ changes
    exact = torch.linalg.solve(torch.eye(30) / time + hessian, grads) / time
    torch.testing.assert_close(deflate([grads], [changes], rises / time)[0], exact)


def test_a_flat_change_leaves_a_sharp_one_its_due() -> None:
    """Closed form: orthogonal changes of curvature h take off τ h / (1 + τ h) each."""
    curvatures, time = torch.tensor([150.0, 1e-5], dtype=torch.float64), 0.5
    left = deflate([torch.ones(2).double()], [curvatures.diag()], curvatures / time)[0]
    torch.testing.assert_close(left, 1 / (1 + time * curvatures))


def test_members_of_a_population_are_deflated_each_for_itself() -> None:
    """Twin: one call a member, one of whose changes are dependent."""
    changes, grads, pull = normal(3, 4, 30), normal(3, 30, seed=1), normal(3, 4, seed=2).abs()
    changes[1, 2], pull[1] = changes[1, 0], 0.0
    mapped = torch.func.vmap(lambda g, y, p: deflate([g], [y], p)[0])(grads, changes, pull)
    for member, found in enumerate(mapped):
        single = deflate([grads[member]], [changes[member]], pull[member])[0]
        torch.testing.assert_close(found, single)


def test_processes_that_hold_parts_of_the_weights_deflate_as_one() -> None:
    """Twin: one process with both parts; ``reduce`` adds the products of the other process."""
    changes, grads, pull = normal(4, 60), normal(60, seed=1), normal(4, seed=2).abs()
    sent: list[Tensor] = []

    def part(at: slice, reduce: Any) -> Tensor:
        return deflate([grads[at]], [changes[:, at]], pull, reduce=reduce)[0]

    part(slice(20), lambda products: sent.append(products) or products)
    left = part(slice(20, None), lambda products: products + sent[0])
    torch.testing.assert_close(left, part(slice(None), alone)[20:])


def test_flat_directions_are_left_though_weights_move_along_them() -> None:
    """Closed form: two changes along the same direction count as twice its curvature."""
    curvature, time = 0.01, 2.0
    move = torch.ones(PAIRS * MANY).double()
    secants, stiffness = Secants.begin(0 * move, PAIRS), Stiffness.begin(PAIRS, move.device)
    for step in range(3):
        here = step * move
        stiffness = stiffness.observe([secants], [here], [curvature * here], [None], [move], alone)
        assert int((stiffness.rises > 0).sum()) == step  # the first gradient is no change yet
    left = deflate([move], [secants.changes], stiffness.rises / time)[0]
    torch.testing.assert_close(left, move / (1 + 2 * time * curvature))


@pytest.mark.parametrize(("weights", "pairs"), [(49, 0), (50, 1), (199, 3), (10**6, 4)])
def test_there_are_fifty_weights_for_each_pair(weights: int, pairs: int) -> None:
    """Law: of 49 weights no direction is taken."""
    assert StiffSettings().slots(weights) == pairs
    assert StiffSettings(pairs=0).slots(weights) == 0


# in the optimizers


def slope(weights: Tensor) -> Tensor:
    """Of the training loss, a valley with few sharp directions."""
    return CURVATURES * (weights - 1.0)


def outer(weights: Tensor) -> Tensor:
    """A validation loss whose best weights are larger in flat directions, smaller in sharp ones."""
    best = torch.cat([torch.full((SHARP,), 0.5), torch.full((FLAT,), 3.0)]).double()
    return (CURVATURES * (weights - best).square()).sum() / 2


def made(weights: Tensor, **options: Any) -> st.SGD:
    """An optimizer that tunes nothing yet."""
    return st.SGD(
        [weights], lr=RATE, weight_decay=DECAY, tune=("weight_decay",), probe=False, guard=False,
        hyper_optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0), **options,
    )  # fmt: skip


def train(weights: Tensor, opt: st.SGD) -> None:
    """A step on a full batch at a rate that lets sharp directions oscillate."""
    weights.grad = slope(weights.detach())
    # Something to keep sharp directions going, as batches do.
    weights.grad[:SHARP] += torch.randn(SHARP, generator=noise(opt)).double()
    opt.step()
    opt.hyper_step(partial(outer, weights))


def trained(steps: int = 400, **options: Any) -> tuple[Tensor, st.SGD]:
    weights = torch.nn.Parameter(torch.full((SHARP + FLAT,), 0.8, dtype=torch.float64))
    opt = made(weights, **options)
    for _ in range(steps):
        train(weights, opt)
    return weights, opt


def noise(opt: st.SGD) -> torch.Generator:
    """A generator of its own for every step."""
    return torch.Generator().manual_seed(opt._engine.clock.steps)


def changes_of(opt: st.SGD) -> Tensor:
    """The changes that are kept."""
    return torch.cat([s.changes for b in opt._engine.blocks for s in b.secants], dim=1)


def told(opt: st.SGD) -> float:
    """The mean hypergradient of weight decay."""
    return float(opt._engine.shifts.state.mean)


def test_decay_follows_the_exact_sensitivity() -> None:
    """Truth: −λ w (1/τ + H)⁻¹ ∇L_val, for any τ; without it the sign is wrong."""
    weights, opt = trained()
    with opt.averaged():
        place = weights.detach().clone().requires_grad_()
    (grads,) = torch.autograd.grad(outer(place), place)
    for time in (10 * RATE, 400 * RATE):
        exact = -DECAY * (place.detach() / (1 / time + CURVATURES)) @ grads
        assert float(exact) > 0  # more decay would make flat directions worse
    assert told(opt) > 0
    without = MethodSettings(stiff=StiffSettings(pairs=0))
    assert told(trained(settings=without)[1]) < 0


def test_a_ridge_is_not_taken_for_a_valley() -> None:
    """Law: where the slope falls along the move, nothing is kept."""
    weights = torch.nn.Parameter(torch.full((200,), 0.1))
    opt = st.SGD([weights], lr=0.01, weight_decay=0.1, tune=("weight_decay",), probe=False)
    for _ in range(20):
        weights.grad = -5.0 * weights.detach()
        opt.step()
    assert changes_of(opt).shape == (PAIRS, 200)
    assert not changes_of(opt).any()


@pytest.mark.parametrize(("shell", "weights"), [(st.SGD, MANY - 1), (st.AdamW, 200)])
def test_few_weights_and_decoupled_decay_keep_no_changes(shell: Any, weights: int) -> None:
    """Law: they cost no memory; AdamW's decay is no penalty."""
    param = torch.nn.Parameter(torch.ones(weights))
    opt = shell([param], lr=0.01, weight_decay=0.1, tune=("weight_decay",), probe=False)
    param.grad = torch.ones_like(param)
    opt.step()
    assert opt._engine.blocks[0].secants == []


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    """Truth: the run that was not interrupted, between two changes."""
    weights, opt = trained(201, every=12)  # noted after 200 steps, asked after 204
    state = copy.deepcopy(opt.state_dict())
    twin = torch.nn.Parameter(weights.detach().clone())
    other = made(twin, every=12)
    other.load_state_dict(state)
    for _ in range(30):
        train(weights, opt)
        train(twin, other)
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
    first, second = changes_of(opt).split(100, 1)
    assert first.all()
    assert not second.any()
    for _ in range(5):
        before = step(both=True)
    changed = opt.state[params[1]]["secant/changes"].abs().amax(0)
    weights = torch.full((100,), 0.5) * 0.97**19, still * 0.97**4
    torch.testing.assert_close(changed, 3.0 * (weights[0] - weights[1]))
    assert not torch.equal(before, still)


@pytest.mark.parametrize(("schedule", "share"), [("constant", 1.0), ("linear", 0.5)])
def test_time_is_the_rate_summed_over_steps(schedule: str, share: float) -> None:
    """Law: τ grows by η at every step, whatever the schedule."""
    weights = torch.nn.Parameter(torch.ones(200))
    opt = made(weights, schedule=schedule, total_steps=1000, every=10)
    for _ in range(1000):
        weights.grad = torch.zeros_like(weights)
        opt.step()
        opt.hyper_step(lambda: weights.sum())
    time = float(opt._engine.store.stiffness.time)
    assert time == pytest.approx(1000 * RATE * share, rel=0.1)


def test_a_run_on_training_gradients_alone_notes_its_own_weights() -> None:
    """Truth: the weights before each fourth step, while hyper steps look at the displacement."""
    weights = torch.nn.Parameter(torch.ones(200))
    opt = st.SGD([weights], lr=0.01, weight_decay=DECAY, probe=False)
    for step in range(1, 201):
        if step % 4 == 0:
            before = weights.detach().clone()
        weights.grad = weights.detach() + 0.1 * torch.randn(200, generator=noise(opt))
        opt.step()
    assert torch.equal(opt.state[weights]["secant/last_params"], before)


def test_a_rewind_forgets_changes() -> None:
    """Law: a fresh start knows nothing."""
    weights, opt = trained()
    engine = opt._engine
    assert changes_of(opt).any()
    assert engine.store.stiffness.time > 0
    with torch.no_grad():
        engine.carry_out(Action(rewind={"lr": -1.0}, reason="tried"))
    assert not changes_of(opt).any()
    assert opt.state[weights]["secant/last_grads"].isnan().all()
    assert engine.store.stiffness.time == 0


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
