"""Values given as 0, before and after the first validation loss. Truth: torch; ``from_zero``."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st

BATCHES = torch.randn(120, 8, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def loss(net: nn.Module, step: int = 0) -> Tensor:
    return (net(BATCHES[step]) - BATCHES[step].sum(1, keepdim=True)).square().mean()


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: int, hyper: bool = False) -> None:
    for step in range(steps):
        opt.zero_grad()
        loss(net, step).backward()
        opt.step()
        if hyper:
            opt.hyper_step(lambda: loss(net))


@pytest.mark.parametrize(
    ("make", "names"),
    [(st.SGD, ("momentum", "weight_decay")), (st.Adam, ("weight_decay",))],
)
def test_stays_0_without_a_validation_loss(
    make: Any, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    net = network()
    opt = make(net.parameters(), lr=1e-2)
    with caplog.at_level(logging.WARNING, "selftune"):
        train(net, opt, 120)
    for name in names:
        assert opt.hparams[name] == 0
        assert opt.param_groups[0][name] == 0
    assert opt.hparams["lr"] != 1e-2
    told = [r.getMessage() for r in caplog.records if "not tuned: " in r.getMessage()]
    assert len(told) == 1
    assert all(name in told[0] for name in names)


def test_is_tuned_from_the_first_validation_loss_on() -> None:
    net = network()
    opt = st.SGD(net.parameters(), lr=1e-2)
    train(net, opt, 60)
    opt.hyper_step(lambda: loss(net))
    assert opt.hparams["momentum"] == pytest.approx(0.1)
    assert opt.param_groups[0]["momentum"] == pytest.approx(0.1)
    assert opt.hparams["weight_decay"] > 0
    train(net, opt, 60, hyper=True)
    assert opt.hparams["momentum"] != pytest.approx(0.1)


def test_a_value_set_from_outside_is_taken_at_once() -> None:
    net = network()
    opt = st.SGD(net.parameters(), lr=1e-2)
    train(net, opt, 5)
    opt.param_groups[0]["momentum"] = 0.5
    train(net, opt, 5)
    assert opt.hparams["momentum"] == pytest.approx(0.5)
    assert opt.hparams["weight_decay"] == 0


def test_a_saved_run_still_waits() -> None:
    net = network()
    opt = st.SGD(net.parameters(), lr=1e-2)
    train(net, opt, 10)
    other = st.SGD(net.parameters(), lr=1e-2)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.hparams["momentum"] == 0
    train(net, other, 3, hyper=True)
    assert other.hparams["momentum"] == pytest.approx(0.1)
    last = st.SGD(net.parameters(), lr=1e-2)
    last.load_state_dict(copy.deepcopy(other.state_dict()))
    assert last.hparams["momentum"] == pytest.approx(0.1)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}])
def test_sgd_without_momentum_steps_as_torch(options: dict[str, Any]) -> None:
    ours, theirs = network(), network()
    mine = st.SGD(ours.parameters(), lr=1e-2, tune=(), **options)
    torchs = torch.optim.SGD(theirs.parameters(), lr=1e-2, **options)
    train(ours, mine, 30)
    train(theirs, torchs, 30)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shell", [st.SGD, st.AdamW, st.Muon])
def test_an_l1_penalty_may_be_that_of_a_group(shell: Any) -> None:
    """Truth: the same strength for all, in the penalised group; no penalty, in the other."""

    def ends(l1: float, strengths: tuple[float, float]) -> list[Tensor]:
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
        groups: list[dict[str, Any]] = [{"params": [w]} for w in weights]
        for each, strength in zip(groups, strengths, strict=True):
            if strength >= 0:
                each["l1"] = strength
        opt = shell((g for g in groups), lr=0.1, l1=l1, tune=("lr",), probe=False, guard=False)
        for _ in range(5):
            for w in weights:
                w.grad = torch.full_like(w, 0.05)
            opt.step()
        return [w.detach() for w in weights]

    penalised, plain = ends(0.1, (-1, -1)), ends(0.0, (-1, -1))
    first, second = ends(0.0, (0.1, -1))
    assert not torch.equal(penalised[0], plain[0])
    torch.testing.assert_close(first, penalised[0])
    torch.testing.assert_close(second, plain[1])


def test_an_l1_penalty_is_not_added_later() -> None:
    opt = st.SGD(network().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"l1=0\.1 in a parameter group that is added later"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "l1": 0.1})
