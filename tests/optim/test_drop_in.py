"""The eleven points of a torch.optim drop-in, one test each. Truths: torch's own behaviour."""

import copy
import inspect

import pytest
import torch
import torch.distributed.checkpoint.state_dict as checkpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import selftune as st

SHELLS = [st.SGD, st.Adam, st.AdamW, st.RMSprop, st.Lion]
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def loss_of(net: nn.Module) -> Tensor:
    return cross_entropy(net(X), Y)


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: int, hyper: bool = True) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss_of(net).backward()
        opt.step()
        if hyper:
            opt.hyper_step(lambda: loss_of(net))


def weights(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


@pytest.mark.parametrize("shell", SHELLS)
def test_1_is_a_torch_optimizer_with_torchs_signature(shell: type) -> None:
    net = network()
    opt = shell(net.parameters())
    assert isinstance(opt, torch.optim.Optimizer)
    torch.optim.lr_scheduler.StepLR(opt, 1)
    torch.optim.swa_utils.SWALR(shell(net.parameters()), 0.05)
    twin = getattr(torch.optim, shell.__name__, None)
    if twin is not None:
        theirs = inspect.signature(twin).parameters
        ours = [n for n in inspect.signature(shell).parameters if n in theirs]
        assert ours[:4] == list(theirs)[:4]
        for name in ours:
            assert inspect.signature(shell).parameters[name].default == theirs[name].default


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_2_lr_stays_a_float_or_a_leaf_tensor(lr: float | Tensor) -> None:
    net = network()
    opt = st.SGD(net.parameters(), lr=lr, probe=False)
    train(net, opt, 30)
    shown = opt.param_groups[0]["lr"]
    assert type(shown) is type(lr)
    assert float(shown) != pytest.approx(0.01)
    assert opt.hparams["lr"] == pytest.approx(opt.param_groups[0]["peak_lr"])
    assert opt.hparams["lr"] == pytest.approx(float(shown), rel=1e-3)  # 1/(1 + αt) of it
    assert isinstance(shown, float) or (shown.is_leaf and not shown.requires_grad)
    copy.deepcopy(opt.state_dict())


def test_3_survives_tensors_replaced_by_load_state_dict() -> None:
    """State loaded into an optimizer in use: what follows equals what followed when it was new."""
    net = network()
    opt = st.Adam(net.parameters(), lr=0.01, probe=False)
    train(net, opt, 20)
    model, state = copy.deepcopy(net.state_dict()), copy.deepcopy(opt.state_dict())
    shown = opt.param_groups[0]["lr"]
    train(net, opt, 20)
    end = weights(net)
    net.load_state_dict(model)
    opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == shown
    train(net, opt, 20)
    assert torch.equal(weights(net), end)
    for entry, saved in zip(opt.state.values(), state["state"].values(), strict=True):
        assert not torch.equal(entry["average"], saved["average"])  # the loaded state is not shared


def test_4_saves_only_torchs_two_keys_of_tensors_and_numbers(tmp_path) -> None:
    net = network()
    opt = st.AdamW(net, lr=0.01, probe=False)
    train(net, opt, 20)
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups"}
    torch.save(state, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


def test_5_an_empty_step_of_a_fresh_optimizer_advances_nothing() -> None:
    """``get_optimizer_state_dict`` steps a fresh optimizer with zero gradients and lr = 0."""
    ends = []
    for touched in (True, False):
        net = network()
        opt = st.SGD(net.parameters(), lr=0.02, momentum=0.5)
        if touched:
            checkpoint.get_optimizer_state_dict(net, opt)
            assert opt.param_groups[0]["lr"] == 0.02
            assert torch.equal(weights(net), weights(network()))
            assert opt.hparams["lr"] == pytest.approx(0.02)
        train(net, opt, 60)
        ends.append((weights(net), opt.hparams))
    torch.testing.assert_close(ends[0], ends[1])


def test_6_step_takes_a_closure_by_position_and_counts_only_real_steps() -> None:
    net, seen = network(), []
    opt = st.SGD(net.parameters(), lr=0.01)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(net)
        loss.backward()
        seen.append(loss.detach().clone())
        return loss

    assert torch.equal(opt.step(closure).detach(), seen[0])
    fresh = st.SGD(net.parameters(), lr=0.01)
    fresh.zero_grad()
    assert fresh.step() is None
    assert fresh.hyper_step(lambda: loss_of(net)) is None  # a step without gradients was none


def test_7_hyper_step_leaves_grad_alone() -> None:
    net = network()
    opt = st.SGD(net.parameters(), lr=0.01, probe=False, every=1)
    train(net, opt, 3)
    kept = [p.grad.clone() for p in net.parameters()]
    assert opt.hyper_step(lambda: loss_of(net)) is None  # the step was taken already
    train(net, opt, 1, hyper=False)
    kept = [p.grad.clone() for p in net.parameters()]
    assert opt.hyper_step(lambda: 3 * loss_of(net)) is not None
    assert all(torch.equal(p.grad, k) for p, k in zip(net.parameters(), kept, strict=True))


@pytest.mark.parametrize("make", [st.SGD, lambda p: st.SelfTuning(torch.optim.Adam(p))])
def test_8_hooks_fire_once(make) -> None:
    net, fired = network(), []
    opt = make(net.parameters())
    opt.register_step_pre_hook(lambda *_: fired.append("pre"))
    opt.register_step_post_hook(lambda *_: fired.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("any pre")),
        register_optimizer_step_post_hook(lambda *_: fired.append("any post")),
    ]
    train(net, opt, 1, hyper=False)
    [h.remove() for h in handles]
    assert sorted(fired) == ["any post", "any pre", "post", "pre"]


def test_9_named_parameters_later_groups_and_zero_grad() -> None:
    net, later = network(), nn.Linear(2, 2)
    opt = st.SGD(net.named_parameters(), lr=0.01, probe=False)
    assert opt.param_groups[0]["param_names"][0] == "0.weight"
    train(net, opt, 40)
    before = opt.hparams
    opt.add_param_group({"params": later.named_parameters(), "lr": 0.5})
    after = opt.hparams  # what is tuned already stays tuned, and the ratio given is kept
    assert after["lr"] == pytest.approx([before["lr"], 0.5 / 0.01 * before["lr"]])  # one a group
    both, start = nn.Sequential(net, later), later.weight.detach().clone()
    train(both, opt, 10)
    assert not torch.equal(later.weight, start)
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in both.parameters())


def test_11_eval_and_train_are_never_needed() -> None:
    net = network().eval()
    opt = st.SGD(net.parameters(), lr=0.01)
    start = loss_of(net)
    train(net, opt, 60)
    assert loss_of(net) < start
    assert not net.training


def test_12_reading_hparams_builds_nothing_and_shows_what_groups_hold() -> None:
    """Law: before the first step a group's values are the user's to change."""
    net = network()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.3}]
    opt = st.SGD(groups, lr=0.01, probe=False)
    assert opt.hparams["lr"] == [0.01, 0.3]
    opt.param_groups[0]["lr"] = 0.3
    assert opt.hparams["lr"] == 0.3
    assert not opt.state
    train(net, opt, 1, hyper=False)
    assert opt.hparams["lr"] == pytest.approx(0.3)
    assert opt.param_groups[0]["lr"] == 0.3
