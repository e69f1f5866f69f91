"""Gates in training. Truths: a step by hand, the other driver, gradients of the model without."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.penalties import Gates
from selftune.structure import Gate, Optional, open_gates, parameter_groups, prune

Batch = tuple[Tensor, Tensor]
STEPS, LOOK = 120, 100


def job(seed: int = 0) -> tuple[nn.Module, list[Batch], Batch]:
    """A regression on three of eight inputs with a net that is far too wide."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), Gate(40), nn.Linear(40, 1)).double()
    x = torch.randn(460, 8, dtype=torch.float64)
    y = x[:, :3].sin().sum(1, keepdim=True) + 0.1 * torch.randn(460, 1, dtype=torch.float64)
    return model, list(zip(x[:400].split(20), y[:400].split(20), strict=True)), (x[400:], y[400:])


def train(opt: st.optim.SelfTuningOptimizer, model: nn.Module, batches: list[Batch], val: Batch,
          steps: int = STEPS) -> None:  # fmt: skip
    for step in range(steps):
        x, y = batches[step % len(batches)]
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.report(loss)
        opt.hyper_step(lambda: F.mse_loss(model(val[0]), val[1]))


def test_open_gates_change_nothing() -> None:
    """Truth: the model without gates, and the block itself."""
    x = torch.randn(3, 5, 4)
    assert torch.equal(Gate(5)(x), x)
    assert torch.equal(Gate(4, dim=-1)(x), x)
    block = nn.Linear(4, 4)
    torch.testing.assert_close(Optional(block)(x), x + block(x))
    torch.testing.assert_close(Optional(block, residual=False)(x), block(x))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"Gate\(4, dim=1\) got an input of shape \(3, 5\)"):
        Gate(4)(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"turns shape \(3, 5\) into \(3, 2\)"):
        Optional(nn.Linear(5, 2))(torch.ones(3, 5))
    with pytest.raises(ValueError, match="units=0"):
        Gate(0)


def test_a_step_by_hand() -> None:
    """Truth: g − η (∇g + λ sign g) for gates, w − η ∇w for all else, in one group."""
    model, batches, _ = job()
    x, y = batches[0]
    params = dict(model.named_parameters())
    loss = F.mse_loss(model(x), y)
    grads = dict(zip(params, torch.autograd.grad(loss, params.values()), strict=True))
    want = {n: p.detach() - 0.3 * grads[n] for n, p in params.items()}
    want["2.gates"] = want["2.gates"] - 0.3 * 0.7
    opt = st.SGD(model.parameters(), lr=0.3, penalty=Gates(0.7), tune=())
    F.mse_loss(model(x), y).backward()
    opt.step()
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), want[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_both_drivers_tune_the_same_strength(rule: str) -> None:
    """Truth: each is the other's twin, to 1e-9 in float64, until a run ends."""
    names, bounds = ("lr", "weight_decay", "gates"), {"lr": (1e-6, 1e-2)}
    start = dict(lr=3e-3, weight_decay=1e-4) | (dict(momentum=0.9) if rule == "SGD" else {})
    options = dict(penalty=Gates(0.05), tune=names, bounds=bounds, guard=False)
    model, batches, val = job()
    opt = getattr(st, rule)(model, total_steps=STEPS, **options, **start)
    train(opt, model, batches, val, LOOK)
    twin, batches, val = job()
    looks: dict[int, dict[str, float]] = {}
    tuner = st.Tuner(
        twin, F.mse_loss, rule=getattr(st.rules, rule)(), hparams=start, compile=False, **options
    )
    tuner.fit(
        batches, [val], steps=STEPS, progress=False, evaluate_every=20,
        callbacks=[lambda p: looks.update({p.step: dict(p.hparams)}) and None],
    )  # fmt: skip
    assert looks[LOOK]["gates"] != pytest.approx(0.05, rel=1e-3)
    for name in names:
        assert opt.hparams[name] == pytest.approx(looks[LOOK][name], rel=1e-9), name


@pytest.mark.slow
def test_useless_units_are_closed_and_useful_ones_are_not() -> None:
    """Convergence: most of 40 units go, and the pruned net's loss stays near the wide net's."""
    losses, left = [], []
    for strength in (None, 0.02):
        model, batches, val = job()
        penalty = None if strength is None else Gates(strength)
        groups = parameter_groups(model)
        opt = st.AdamW(groups, lr=1e-2, penalty=penalty, total_steps=600, tune=("lr",))
        train(opt, model, batches, val, 600)
        with opt.averaged(), torch.no_grad():
            pruned = prune(model, val[0])
            losses.append(float(F.mse_loss(pruned(val[0]), val[1])))
            left.append(open_gates(model, 1e-2)["2"][0])
    assert 3 <= left[1] <= 20 < left[0]
    assert losses[1] < 1.5 * losses[0]


@pytest.mark.slow
def test_a_population_and_joined_weights_agree_on_gates() -> None:
    """Law: gates close in every layout of the weights: joined, one by one, and mapped."""
    for options in (dict(population=2), dict(compile=False)):
        model, batches, val = job()
        tuner = st.Tuner(
            model, F.mse_loss, hparams=dict(lr=1e-2), penalty=Gates(0.3), tune=("lr",), **options
        )
        tuner.fit(batches, [val], steps=150, progress=False)
        assert float(model[2].gates.detach().abs().mean()) < 0.8


def test_runs_go_on_from_a_saved_state() -> None:
    """Truth: the run that was not interrupted."""
    ends = []
    for cut in (False, True):
        model, batches, val = job()
        opt = st.AdamW(parameter_groups(model), lr=3e-3, penalty=Gates(0.3), total_steps=80)
        train(opt, model, batches, val, 40)
        if cut:
            saved, weights = opt.state_dict(), model.state_dict()
            model = job()[0]
            model.load_state_dict(weights)
            opt = st.AdamW(parameter_groups(model), lr=3e-3, penalty=Gates(0.3), total_steps=80)
            opt.load_state_dict(saved)
        train(opt, model, batches, val, 40)
        ends.append((opt.hparams["gates"], [p.detach().clone() for p in model.parameters()]))
    assert ends[0][0] == ends[1][0]
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.equal(a, b)
