"""Parameters that come later, and states of other runs. Truth: what was there before, unchanged."""

import copy

import pytest
import torch
from torch import Tensor, nn

import selftune as st


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 1))


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: int, hyper: bool = True) -> None:
    def loss() -> Tensor:
        return (net(torch.randn(8, 4)) - 1).square().mean()

    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        opt.step()
        if hyper:
            opt.hyper_step(loss)


def test_unfreezing_a_layer_keeps_the_other_tensors_rates() -> None:
    net = network()
    net[0].requires_grad_(False)
    opt = st.SGD(net.parameters(), lr=0.01, tune=("lr",), per="tensor", probe=False)
    train(net, opt, 60)
    tuned = opt.hparams["lr"]
    net[0].requires_grad_(True)
    present = opt.param_groups[0]["lr"]  # where the group stands by now, the mean of its tensors
    assert opt.hparams["lr"] == pytest.approx([present, present, *tuned])
    train(net, opt, 10)


def test_adding_a_group_without_validation() -> None:
    net = network()
    opt = st.SGD(net[:3].parameters(), lr=0.01, per="tensor", probe=False)
    train(net, opt, 82, hyper=False)
    opt.add_param_group({"params": net[3].parameters()})
    train(net, opt, 20, hyper=False)
    assert all(p.isfinite().all() for p in net.parameters())


OTHERS = {
    "inner optimizer": (
        lambda p: st.SelfTuning(torch.optim.NAdam(p)),
        lambda p: st.SelfTuning(torch.optim.Adagrad(p)),
    ),
    "penalties": (
        lambda p: st.SGD(p, tune=("lr",)),
        lambda p: st.SGD(p, tune=("lr",), penalty=st.penalties.Elastic(0.1)),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_state_of_another_kind_is_refused_whole(case: str) -> None:
    ours, theirs = (make(network().parameters()) for make in OTHERS[case])
    before = copy.deepcopy(theirs.state_dict())
    with pytest.raises(ValueError, match="rule"):
        theirs.load_state_dict(ours.state_dict())
    assert str(theirs.state_dict()) == str(before)


def test_the_inner_optimizers_groups_stay_shared_after_loading() -> None:
    net = network()
    opt = st.SelfTuning(inner := torch.optim.NAdam(net.parameters()), probe=False)
    train(net, opt, 10)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert inner.param_groups is opt.param_groups
    train(net, opt, 10)


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(TypeError, match="LBFGS"):
        st.SelfTuning(torch.optim.LBFGS(network().parameters()))


def test_torchs_kernel_choices_are_accepted() -> None:
    st.AdamW(network().parameters(), fused=True, foreach=None)


def test_hyper_step_wants_a_function() -> None:
    net = network()
    opt = st.SGD(net.parameters(), probe=False)
    train(net, opt, 1, hyper=False)
    with pytest.raises(TypeError, match="takes a function"):
        opt.hyper_step(net(torch.ones(1, 4)).sum())
