"""The optimizer that chooses its rule. Truths: torch's optimizers, the uninterrupted run."""

import copy
import io
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st

THREE = [st.rules.SGD(), st.rules.AdamW(), st.rules.Lion()]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed)).double()
    return x, (x.sum(1) > 0).long()


def train(net: nn.Module, opt: Any, steps: range, *, hyper: bool = True) -> None:
    for step in steps:
        x, y = batch(step)
        opt.zero_grad()
        cross_entropy(net(x), y).backward()
        opt.step()
        if hyper:
            xv, yv = batch(10_000 + step)
            opt.hyper_step(lambda xv=xv, yv=yv: cross_entropy(net(xv), yv))


@pytest.mark.parametrize(
    ("member", "make"),
    [
        (st.rules.SGD(), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)),
        (st.rules.AdamW(), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)),
    ],
)
def test_one_member_is_torchs_optimizer(member: Any, make: Any) -> None:
    net, twin = network(), network()
    opt = st.Mixture(net, [member], lr=0.1, weight_decay=0.1, tune=())
    train(net, opt, range(30), hyper=False)
    train(twin, make(twin.parameters()), range(30), hyper=False)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_after_the_choice_it_steps_as_the_winner_does(name: str) -> None:
    """From the same weights and state, at the settings that ``rule`` names."""
    net = network()
    rule = st.rules.Mixture(THREE, mix_until=10, **{f"mix_{name.lower()}": 5.0})
    opt = st.Mixture(net, rule, tune=(), schedule="constant", total_steps=60)
    train(net, opt, range(9), hyper=False)
    assert opt.rule is None
    train(net, opt, range(9, 10), hyper=False)
    assert opt.rule is not None
    assert opt.rule.name == name
    twin = copy.deepcopy(net)
    plain = opt.rule.make(twin.parameters())
    for theirs, ours in zip(twin.parameters(), net.parameters(), strict=True):
        kept = {k: v.clone() for k, v in opt.state[ours].items()}
        plain.state[theirs] = {
            k: kept[k] for k in ("step", "momentum_buffer", "exp_avg", "exp_avg_sq") if k in kept
        }
        assert not [k for k in kept if "/exp_avg" in k or "/momentum" in k]  # of the others
    for opts, model in ((opt, net), (plain, twin)):
        train(model, opts, range(10, 40), hyper=False)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_the_chosen_rule_ascends_with_maximize(name: str) -> None:
    """As a plain optimizer, too: its step is that of minimising the negated loss."""
    net = network()
    rule = st.rules.Mixture(THREE, mix_until=1, **{f"mix_{name.lower()}": 5.0})
    opt = st.Mixture(net, rule, tune=(), total_steps=9, maximize=True)
    train(net, opt, range(1), hyper=False)
    assert opt.rule is not None
    up, down = (nn.Parameter(torch.ones(3)) for _ in range(2))
    usual = {**opt.rule.settings, "maximize": False}
    plain = st.rules.PlainOptimizer(opt.rule.rule, usual)
    for weights, sign, of in ((up, 1.0, opt.rule), (down, -1.0, plain)):
        made = of.make([weights])
        (sign * weights.sum()).backward()
        made.step()
    assert up.min() > 1
    assert torch.equal(up, down)


def test_the_choice_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    net, recorder = network(), st.monitor.InMemory()
    opt = st.Mixture(net, st.rules.Mixture(THREE, mix_until=20), total_steps=120, log_dir=recorder)
    with caplog.at_level(logging.INFO, "selftune"):
        train(net, opt, range(60))
    assert opt.rule is not None
    found = [m for m in caplog.messages if "is chosen" in m]
    assert len(found) == 1
    assert opt.rule.name.lower() in found[0]
    assert "step 20: " in found[0]


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 0.0])
def test_a_bad_gradient_at_the_choice_postpones_it(factor: float) -> None:
    """Truth: a run whose choice is due one step later has the same rule."""
    net = network()
    rule = st.rules.Mixture(THREE[:2], mix_until=1, mix_sgd=5.0, sgd_momentum=0.0)
    opt = st.Mixture(net, rule, lr=1e-2, tune=(), total_steps=60)
    x, y = batch(0)
    (cross_entropy(net(x), y) * factor).backward()
    opt.step()
    assert opt.rule is None
    train(net, opt, range(1, 2), hyper=False)
    assert opt.rule is not None
    assert opt.rule.name == "SGD"
    assert 1e-4 < opt.rule.settings["lr"] < 10
    assert all(bool(w.isfinite().all()) for w in net.parameters())


def saved(opt: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("at", [15, 20, 21, 50])
@pytest.mark.parametrize("given", [{}, {"mix_sgd": 50.0}, {"mix_lion": 50.0}])
def test_a_saved_run_goes_on_bit_for_bit(at: int, given: dict[str, float]) -> None:
    """Before the choice at step 20, at it and after it, into a fresh optimizer."""

    def begun() -> tuple[nn.Module, st.Mixture]:
        net = network()
        rule = st.rules.Mixture(THREE, mix_until=20, **given)
        return net, st.Mixture(net, rule, total_steps=120)

    net, opt = begun()
    train(net, opt, range(at))
    state, weights = saved(opt), copy.deepcopy(net.state_dict())
    train(net, opt, range(at, 80))
    other, again = begun()
    other.load_state_dict(weights)
    again.load_state_dict(state)
    train(other, again, range(at, 80))
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert opt.hparams == again.hparams
    assert str(opt.rule) == str(again.rule)


@pytest.mark.parametrize(("there", "here"), [(50, 15), (15, 50), (50, 0)])
def test_a_refused_state_changes_nothing(there: int, here: int) -> None:
    """Of another schedule, and of a rule that is chosen on one side alone. Truth: a twin."""

    def begun(schedule: str) -> tuple[nn.Module, st.Mixture]:
        net = network()
        rule = st.rules.Mixture(THREE, mix_until=20)
        return net, st.Mixture(net, rule, total_steps=120, schedule=schedule)

    net, opt = begun("linear")
    train(net, opt, range(there))
    state = saved(opt)
    net, opt = begun("cosine")
    train(net, opt, range(here))
    twin, other = copy.deepcopy((net, opt))
    with pytest.raises(ValueError, match="schedule is linear there and cosine here"):
        opt.load_state_dict(state)
    assert str(opt.rule) == str(other.rule)
    assert opt.hparams == other.hparams
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert opt.state[ours].keys() == other.state[theirs].keys()
    train(net, opt, range(here, 70))
    train(twin, other, range(here, 70))
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("at", [5, 30])
def test_another_step_of_the_choice_is_named(at: int) -> None:
    """If it is given; a default follows the length, which an extension changes. Truth: a twin."""

    def begun(total: int = 80, **until: int) -> st.Mixture:
        return st.Mixture(network(), st.rules.Mixture(THREE, **until), total_steps=total)

    net = network()
    opt = st.Mixture(net, THREE, total_steps=80)
    train(net, opt, range(at))
    state, other, twin = saved(opt), begun(mix_until=40), begun(mix_until=40)
    with pytest.raises(ValueError, match="its mix_until is 20, this optimizer's is 40"):
        other.load_state_dict(state)
    assert (other.hparams, str(other.rule)) == (twin.hparams, "None")
    for fitting in (begun(mix_until=20), begun(120)):
        fitting.load_state_dict(state)
        assert str(fitting.rule) == str(opt.rule)
        assert fitting.param_groups[0]["mix_until"] == 20


def test_an_undecided_state_takes_the_choice_back() -> None:
    net = network()
    opt = st.Mixture(net, THREE, total_steps=120)
    train(net, opt, range(15))
    state, weights = saved(opt), copy.deepcopy(net.state_dict())
    twin, other = copy.deepcopy((net, opt))
    train(net, opt, range(15, 60))
    assert opt.rule is not None
    net.load_state_dict(weights)
    opt.load_state_dict(state)
    assert opt.rule is None
    train(net, opt, range(15, 60))
    train(twin, other, range(15, 60))
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


SCHEDULERS: dict[str, Any] = {
    "closed form": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda s: 0.97**s),
    "recursive": lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.97),
}


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_scheduler_keeps_the_scale_of_the_choice(name: str) -> None:
    """Truth: the winner in torch, at the rate that ``rule`` names times the scheduler's factor."""
    net = network()
    rule = st.rules.Mixture(THREE[:2], mix_until=10, mix_sgd=5.0, sgd_momentum=0.0)
    opt = st.Mixture(net, rule, lr=1e-2, tune=(), total_steps=60, schedule="constant")
    scheduler = SCHEDULERS[name](opt)
    for step in range(10):
        train(net, opt, range(step, step + 1), hyper=False)
        scheduler.step()
    twin = copy.deepcopy(net)
    assert opt.rule is not None
    assert opt.rule.settings["lr"] != pytest.approx(1e-2, rel=0.01)
    plain = opt.rule.make(twin.parameters())  # at the peak
    plain.param_groups[0]["lr"] *= 0.97**10
    decays = torch.optim.lr_scheduler.ExponentialLR(plain, 0.97)
    for step in range(10, 20):
        if step == 15:  # the scale is part of the state
            state = saved(opt)
            other = st.Mixture(net, rule, lr=1e-2, tune=(), total_steps=60, schedule="constant")
            other.load_state_dict(state)
            assert str(other.rule) == str(opt.rule)
        train(net, opt, range(step, step + 1), hyper=False)
        train(twin, plain, range(step, step + 1), hyper=False)
        scheduler.step()
        decays.step()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_one_group_or_two_take_the_same_steps() -> None:
    """Lengths are of all weights together, however they are divided."""
    net, twin = network(), network()
    options: dict[str, Any] = dict(tune=(), total_steps=600)
    one = st.Mixture(net, THREE, **options)
    two = st.Mixture([{"params": list(m.parameters())} for m in (twin[0], twin[2])], THREE,
                     **options)  # fmt: skip
    train(net, one, range(20), hyper=False)
    train(twin, two, range(20), hyper=False)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def ill_scaled(make: Any, steps: int = 200) -> tuple[float, Any]:
    """The loss of a logistic regression whose inputs have scales from 0.01 to 10."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 1, 20)
    truth = torch.randn(20, generator=generator) / scales

    def draw(count: int) -> tuple[Tensor, Tensor]:
        x = scales * torch.randn(count, 20, generator=generator)
        return x, (x @ truth > 0).long()

    torch.manual_seed(0)
    net = nn.Linear(20, 2)
    opt = make(net, total_steps=steps)
    for _ in range(steps):
        (x, y), (xv, yv) = draw(32), draw(64)
        opt.zero_grad()
        cross_entropy(net(x), y).backward()
        opt.step()
        opt.hyper_step(lambda xv=xv, yv=yv: cross_entropy(net(xv), yv))
    x, y = draw(2000)
    with opt.averaged(), torch.no_grad():
        return float(cross_entropy(net(x), y)), opt


def test_inputs_of_many_scales_want_adamw() -> None:
    """Truth: runs of either rule alone."""
    sgd = ill_scaled(lambda net, **options: st.SGD(net, lr=0.01, momentum=0.9, **options))[0]
    adamw = ill_scaled(st.AdamW)[0]
    loss, opt = ill_scaled(lambda net, **options: st.Mixture(net, THREE[:2], **options))
    assert adamw < 0.7 * sgd
    assert opt.rule.name == "AdamW"
    assert loss < 1.2 * adamw


def test_a_well_scaled_quadratic_wants_sgd() -> None:
    """Equal curvatures: the gradient leads straight to the minimum, its signs do not."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(50, 1, bias=False).double()
    target = torch.randn(50, generator=generator).double()

    def loss() -> Tensor:
        noise = torch.randn(50, generator=generator).double()
        gap = net.weight[0] - target
        return (gap.square() / 2 + 0.1 * noise * gap).sum()

    opt = st.Mixture(net, THREE[:2], total_steps=300)
    for _ in range(100):
        opt.zero_grad()
        loss().backward()
        opt.step()
        opt.hyper_step(loss)
    assert opt.rule is not None
    assert opt.rule.name == "SGD"


def test_wrong_calls_are_named() -> None:
    with pytest.raises(ValueError, match="is empty"):
        st.Mixture(network(), [])
    with pytest.raises(TypeError, match="a rule of the library"):
        st.Mixture(network(), [torch.optim.AdamW([torch.ones(1)])])
    with pytest.raises(TypeError, match="no argument momentum"):
        st.Mixture(network(), THREE, momentum=0.5)
    with pytest.raises(ValueError, match="mix_until=0 must be at least 1"):
        st.Mixture([{"params": network().parameters(), "mix_until": 0}], THREE)
