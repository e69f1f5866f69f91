"""Ordinary models and habits that are easily forgotten. Truths: by hand, or torch's own run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st

SHELLS = [st.SGD, st.Adam, st.AdamW, st.RMSprop, st.Lion]
X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2))


def loss_of(net: nn.Module) -> Tensor:
    return cross_entropy(net(X), Y)


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: int, hyper: bool = True) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss_of(net).backward()
        opt.step()
        if hyper:
            opt.hyper_step(lambda: loss_of(net))


@pytest.mark.parametrize("shell", SHELLS)
def test_scalar_empty_and_strided_parameters(shell: type) -> None:
    """A learnable temperature is a tensor without dimensions."""
    scale, empty = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.empty(0, 2))
    strided = nn.Parameter(torch.ones(2, 3).t())
    opt = shell([scale, empty, strided], lr=0.01, probe=False)

    def loss() -> Tensor:
        return scale.square() + strided.square().sum()

    start = float(loss().detach())
    for _ in range(20):
        opt.zero_grad()
        loss().backward()
        opt.step()
        opt.hyper_step(loss)
    assert float(loss().detach()) < start
    assert strided.stride() == (1, 3)


def test_a_rate_of_0_set_by_hand_holds_the_weights() -> None:
    net = network()
    opt = st.SGD(net.parameters(), lr=0.01, probe=False)
    train(net, opt, 10)
    opt.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in net.parameters()]
    train(net, opt, 12)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    opt.param_groups[0]["lr"] = 0.05
    assert opt.hparams["lr"] == pytest.approx(0.05)


def test_groups_with_one_lr_tensor_are_tuned_apart() -> None:
    """By hand: the validation loss wants more of one group's steps and less of the other's."""
    ends = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        good, bad = (nn.Parameter(torch.ones(3)) for _ in range(2))
        groups = [{"params": [good]}, {"params": [bad]}]
        opt = st.SGD(groups, lr=lr, per="group", tune=("lr",), probe=False)
        for _ in range(40):
            opt.zero_grad()
            (good.square().sum() + 0.001 * bad.sum()).backward()
            opt.step()
            opt.hyper_step(lambda good=good, bad=bad: good.square().sum() - bad.sum())
        ends.append(opt.hparams["lr"])
        assert float(lr) == 0.01  # the user's own tensor is not written to
    assert ends[0][0] > 0.01 > ends[0][1]
    assert ends[1] == pytest.approx(ends[0])


@pytest.mark.parametrize("shell", [st.SGD, st.RMSprop])
def test_reporting_the_loss_of_a_sound_run_changes_nothing(shell: type) -> None:
    """The sweep goes too far on purpose; reporting is no harm."""
    ends = []
    for told in (False, True):
        net = network()
        opt = shell(net.parameters(), lr=0.01)
        for _ in range(60):
            opt.zero_grad()
            loss = loss_of(net)
            loss.backward()
            opt.step()
            if told:
                opt.report(loss)
        ends.append(opt.hparams)
    assert ends[0] == ends[1]


@pytest.mark.parametrize("first", [3, 7, 8, 12])
def test_a_first_hyper_step_after_a_blow_up_rolls_back(first: int) -> None:
    net = nn.Linear(5, 1)
    opt = st.SGD(net.parameters(), lr=1e30, probe=False)
    for step in range(60):
        opt.zero_grad()
        net(X).square().mean().backward()
        opt.step()
        if step >= first:
            opt.hyper_step(lambda: net(X).square().mean())
    assert all(p.isfinite().all() for p in net.parameters())
    assert opt.hparams["lr"] < 1e30


@pytest.mark.slow
@pytest.mark.parametrize("jump", [0.0, 3.0])
def test_a_few_unlucky_batches_bring_nothing_back(jump: float) -> None:
    """Law: a weight that grows by 0.1 a step is at 300 in the end, unless its loss does jump."""
    weight = nn.Parameter(torch.zeros(()))
    opt = st.SGD([weight], lr=0.1, momentum=0.0, tune=(), probe=False, schedule="constant")
    generator = torch.Generator().manual_seed(0)

    def validation() -> Tensor:
        noise = torch.randn((), generator=generator)
        return 1 + torch.exp(-weight) + jump * torch.sigmoid(weight - 200) + 0.5 * noise

    for _ in range(3000):
        opt.zero_grad()
        (-weight).backward()
        opt.step()
        opt.hyper_step(validation)
    end = float(weight.detach())
    assert end < 290 if jump else end == pytest.approx(300, rel=1e-3)


def test_a_layer_that_lives_in_the_closure_only() -> None:
    net = network()
    opt = st.SGD(net.parameters(), lr=0.01, probe=False)
    for _ in range(12):
        opt.zero_grad()
        loss_of(net).backward()
        opt.step()
        opt.hyper_step(lambda: cross_entropy(nn.BatchNorm1d(2)(net(X)), Y))
    assert opt.hparams["lr"] > 0.01


@pytest.mark.parametrize("total", [1, 2, 3, 5, 8, 9, 12, 20])
@pytest.mark.parametrize("lr", [0.1, 0.5])
def test_a_tiny_run_ends_no_worse_than_it_began(total: int, lr: float) -> None:
    net = network()
    start = float(loss_of(net).detach())
    opt = st.SGD(net.parameters(), lr=lr, momentum=0.9, total_steps=total)
    train(net, opt, total)
    with opt.averaged():
        assert float(loss_of(net).detach()) <= start
    assert float(loss_of(net).detach()) <= start


@pytest.mark.parametrize("steps", range(18, 26))
def test_averaged_within_the_sweep_is_no_worse_than_the_start(steps: int) -> None:
    net = network()
    start = float(loss_of(net).detach())
    opt = st.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, opt, steps)
    with opt.averaged():
        assert float(loss_of(net).detach()) <= start


def test_a_parameter_replaced_in_its_group_is_trained() -> None:
    net = network()
    opt = st.SGD(net.parameters(), lr=0.1, probe=False)
    train(net, opt, 10)
    net[0].weight = opt.param_groups[0]["params"][0] = nn.Parameter(net[0].weight.detach().clone())
    before = net[0].weight.detach().clone()
    train(net, opt, 1)
    assert not torch.equal(net[0].weight, before)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_a_group_without_gradients_is_not_stepped(name: str) -> None:
    """Torch's own run: neither decay nor momentum moves it, and it does not age."""

    def trained(module: object, **options: object) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        groups = [{"params": [p]} for p in params]
        momentum = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
        opt = getattr(module, name)(groups, lr=0.1, weight_decay=0.1, **momentum, **options)
        for step in range(12):
            for param in params:
                param.grad = param.detach() * (1 + step % 3)
            if 4 <= step < 9:
                params[1].grad = None
            opt.step()
        return params

    ours = trained(st, tune=(), probe=False, guard=False)
    torch.testing.assert_close(ours, trained(torch.optim))


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_zero_of_a_noisy_loss_does_not_matter(seed: int) -> None:
    """Law: a constant changes no gradient; losses that begin near 0 have not exploded."""
    generator = torch.Generator().manual_seed(0)
    x, slope = torch.randn(1200, 8, generator=generator), torch.randn(8, 1, generator=generator)
    y = x @ slope + 2 * torch.randn(1200, 1, generator=generator)
    ends = []
    for zero in (0.0, 8.0):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        recorder = st.monitor.InMemory()
        opt = st.AdamW(net.parameters(), total_steps=200, probe=False, log_dir=recorder)

        def loss(low: int, high: int, size: int, net=net, zero=zero) -> Tensor:
            chosen = torch.randint(low, high, (size,))
            return (net(x[chosen]) - y[chosen]).square().mean() - zero

        for _ in range(200):
            opt.zero_grad()
            value = loss(0, 1000, 32)
            value.backward()
            opt.step()
            opt.report(value)
            opt.hyper_step(lambda: loss(1000, 1200, 4))
        opt.flush()
        assert recorder.curve("weights/rewinds") == ([], [])
        ends.append(opt.hparams["lr"])
    assert ends[0] > 2e-3  # it has climbed


def broken(kind: str, every: int = 1) -> tuple[Tensor, list[float], dict[str, Any], Any]:
    """Weights, steps of rewinds, and hyperparameters of a run that is not finite from step 21 on.

    Args:
        kind: ``"gradients"`` or ``"hypergradients"``, of a loss that is finite.
        every: How often.
    """
    recorder, weight = st.monitor.InMemory(), nn.Parameter(torch.full((3,), 2.0))
    opt = st.SGD([weight], lr=0.01, probe=False, every=5, log_dir=recorder)
    before = opt.hparams
    for step in range(60):
        bad = step >= 20 and (step + 1) % every == 0
        opt.zero_grad()
        loss = weight.square().sum()
        zero = (weight - weight).sum()  # the root of which has no slope
        (loss + zero.sqrt() if bad and kind == "gradients" else loss).backward()
        opt.step()
        worse = bad and kind == "hypergradients"
        opt.hyper_step(
            lambda w=worse: weight.square().sum() + ((weight - weight).sum().sqrt() if w else 0)
        )
        assert bool(weight.isfinite().all())
    opt.flush()
    return weight.detach(), recorder.curve("weights/rewinds")[0], opt.hparams, before


@pytest.mark.parametrize("kind", ["gradients", "hypergradients"])
def test_what_is_not_finite_is_left_out_and_three_in_a_row_bring_the_run_back(kind: str) -> None:
    """Law: every third gradient, or hypergradient, leads nowhere; the third in a row does."""
    weights, back, after, before = broken(kind, every=3 if kind == "gradients" else 15)
    assert back == []
    assert float(weights.abs().max()) < 2.0
    assert after["lr"] != before["lr"]
    assert broken(kind)[1][0] == (23 if kind == "gradients" else 35)


def test_a_penalty_of_ones_own_may_be_named_in_tune() -> None:
    """It was added a second time, and refused."""
    opt = st.AdamW(nn.Linear(2, 1), penalty=st.penalties.ProximalL1(1e-3), tune=("lr", "l1"))
    assert opt.hparams["l1"] == 1e-3


def test_many_groups_whose_rates_change_once_are_no_schedule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(25)))
    opt = st.AdamW([{"params": [*layer.parameters()]} for layer in net], lr=0.01, probe=False)
    for step in range(10):
        for group in opt.param_groups if step == 5 else ():
            group["lr"] *= 0.5
        opt.zero_grad()
        net(torch.ones(4, 2)).square().mean().backward()
        opt.step()
    assert "so it is not tuned" not in caplog.text


@pytest.mark.parametrize("often", [True, False])
def test_a_rate_that_the_loop_writes_at_every_step_is_pointed_out(
    often: bool, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Linear(2, 1)
    opt = st.AdamW(net, lr=0.01, probe=False)
    for step in range(40):
        if often or step % 10 == 0:
            opt.param_groups[0]["lr"] = 0.01 * (1 - step / 40)
        opt.zero_grad()
        net(torch.ones(4, 2)).square().mean().backward()
        opt.step()
    assert caplog.text.count("so it is not tuned") == often
