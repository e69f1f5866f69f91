"""What a loop does between the calls: writes, moves and copies. Truth: the same, done elsewhere."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

X = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True).sin()


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))


def loss_of(net: nn.Module, part: slice = slice(0, 48)) -> Tensor:
    return F.mse_loss(net(X[part]), Y[part])


def weight_step(net: nn.Module, opt: torch.optim.Optimizer) -> None:
    opt.zero_grad()
    loss_of(net).backward()
    opt.step()


def held_out(net: nn.Module) -> Callable[[], Tensor]:
    return lambda: loss_of(net, slice(48, 96))


def make(net: nn.Module, **options: object) -> st.SGD:
    return st.SGD(net, **{"lr": 0.05, "momentum": 0.9, "probe": False, "every": 1} | options)


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_values_written_before_a_hyperparameter_step_are_those_written_after_it(
    momentum: float,
) -> None:
    found = []
    for early in (True, False):
        net = network()
        opt = make(net, tune=("lr", "momentum"))
        for _ in range(5):
            weight_step(net, opt)
            opt.hyper_step(held_out(net))
        weight_step(net, opt)
        for write in (early, not early):
            if write:
                opt.param_groups[0] |= {"lr": 0.2, "momentum": momentum}
            else:
                opt.hyper_step(held_out(net))
        weight_step(net, opt)
        found.append(opt.hparams)
    # The hypergradient of a single step moves a value by a few per cent, wherever it starts.
    assert found[0] == pytest.approx(found[1], rel=0.1)
    assert found[0]["lr"] == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("via", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_has_the_values_that_were_just_written(via: Callable[[st.SGD], st.SGD]) -> None:
    net = network()
    opt = make(net)
    weight_step(net, opt)
    opt.param_groups[0]["lr"] = 0.5
    other = via(opt)
    assert other.hparams["lr"] == pytest.approx(0.5)
    assert other.hparams == opt.hparams


def test_a_copy_has_its_tensors_once() -> None:
    net = nn.Linear(4, 4000, bias=False)  # plain pickle writes what parameters share again
    opt = make(net, tangents=1.0)
    net(X).square().mean().backward()
    opt.step()
    state = opt.state_dict()
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    kept = sum(
        t.numel() * t.element_size() for entry in state["state"].values() for t in entry.values()
    )
    assert len(pickle.dumps(opt)) < 1.2 * (weights + kept) + 50_000


def test_a_parameter_that_moves_to_another_group_takes_its_rate() -> None:
    """By hand: plain SGD at the rate of the new group."""
    net = network()
    opt = make(net, momentum=0.0, tune=())
    weight_step(net, opt)
    moved = net[2].bias
    group = opt.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not moved]
    opt.param_groups.append({**group, "params": [moved], "lr": 1e-6})
    before = moved.detach().clone()
    weight_step(net, opt)
    assert torch.equal(moved.detach(), before - 1e-6 * moved.grad)


def test_a_loss_that_rewinds_the_run_takes_the_old_gradient_with_it() -> None:
    """Truth: a loss that is reported after the step, whose weights the rewind replaces."""
    found = []
    for early in (True, False):
        net = network()
        opt = make(net, tune=("lr",), every=5)
        for _ in range(40):
            weight_step(net, opt)
            opt.hyper_step(held_out(net))
        for _ in range(3):
            opt.zero_grad()
            (1e6 * loss_of(net)).backward()
            if early:
                opt.report(float("nan"))
            opt.step()
            if not early:
                opt.report(float("nan"))
        found.append(loss_of(net).item())
    assert found[0] == found[1]


def test_sync_restarts_the_displacement() -> None:
    """Truth: a new run from these weights, whose displacement is unknown for a segment."""
    net = network()
    recorder = st.monitor.InMemory()
    opt = make(net, every=5, log_dir=recorder)
    for step in range(200):
        weight_step(net, opt)
        opt.hyper_step(held_out(net))
        if step == 150:
            nn.init.normal_(net[0].weight)
            opt.sync()
    opt.flush()
    steps = [row.step for row in recorder.rows if row.tag == "weights/displacement"]
    assert any(130 < step <= 150 for step in steps)
    assert not any(151 < step <= 165 for step in steps)


def test_a_mixture_that_maximizes_chooses_as_one_that_minimizes() -> None:
    found = []
    for sign in (1, -1):
        net = network()
        rule = st.rules.Mixture([st.rules.SGD(), st.rules.AdamW()], mix_until=10, mix_sgd=5.0)
        opt = st.Mixture(net, rule, maximize=sign < 0, probe=False)
        for _ in range(30):
            opt.zero_grad()
            (sign * loss_of(net)).backward()
            opt.step()
            opt.hyper_step(held_out(net))
        found.append((opt.hparams, nn.utils.parameters_to_vector(net.parameters())))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("name", "value"), [("momentum", 1.5), ("lr", -1.0), ("lr", 0.0)])
@pytest.mark.parametrize("steps", [0, 3])
def test_values_outside_their_range_are_refused_when_they_are_read(
    steps: int, name: str, value: float
) -> None:
    net = network()
    opt = make(net, tune=("lr", "momentum"))
    for _ in range(steps):
        weight_step(net, opt)
    opt.param_groups[0][name] = value
    if value == 0:  # freezes the weights
        weight_step(net, opt)
        copy.deepcopy(opt).step()
        return
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        weight_step(net, opt)


def unpickled(values: tuple[Tensor, st.SGD]) -> tuple[Tensor, st.SGD]:
    return pickle.loads(pickle.dumps(values))


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_values_written_to_a_copy_before_its_next_step_hold(
    copied: Callable[..., tuple[Tensor, st.SGD]], steps: int
) -> None:
    """Truth: the optimizer itself, and, for a rate without momentum, the step it makes."""
    sizes = []
    for change in (copied, lambda values: values):
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        opt = st.SGD([weight], lr=0.1, probe=False, guard=False)
        for step in range(steps + 1):
            if step == steps:
                weight, opt = change((weight, opt))
                opt.param_groups[0].update(lr=0.001, weight_decay=0.5)
                before = weight.detach().clone()
            weight.grad = torch.ones_like(weight)
            opt.step()
        assert opt.param_groups[0]["weight_decay"] == opt.hparams["weight_decay"] == 0.5
        sizes.append(before - weight.detach())
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(sizes[0], 0.001 * (1 + 0.5 * before), rtol=1e-4, atol=0)


def test_copies_have_no_hooks() -> None:
    """Truth: copies of torch's optimizers."""
    for make_one in (torch.optim.SGD, st.SGD):
        net, calls = network(), []
        opt = make_one(net.parameters(), lr=0.1)
        opt.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        weight_step(net, opt)
        pickle.dumps(opt)  # the hook itself cannot be pickled
        other, its_own = copy.deepcopy((net, opt))
        weight_step(other, its_own)
        assert calls == [1]


@pytest.mark.parametrize(
    "change",
    [
        lambda groups: groups.pop(0),
        lambda groups: groups.pop(),
        lambda groups: groups.reverse(),
        lambda groups: groups[2]["params"].append(groups[0]["params"].pop()),
    ],
)
def test_groups_that_move_are_refused_until_they_are_restored(
    change: Callable[[list[dict[str, list[Tensor]]]], object],
) -> None:
    """By hand: plain SGD at the rate of each group, once these are restored."""
    rates = (1.0, 0.1, 0.01)
    weights = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in rates]
    groups = [{"params": [w], "lr": lr} for w, lr in zip(weights, rates, strict=True)]
    opt = st.SGD(groups, momentum=0.0, tune=("lr",), probe=False, guard=False)

    def step() -> None:
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        opt.step()

    step()
    before = [{**g, "params": list(g["params"])} for g in opt.param_groups]
    change(opt.param_groups)
    for call in (step, opt.state_dict, lambda: opt.hparams):
        with pytest.raises(ValueError, match="belong to a group's position"):
            call()
    opt.param_groups[:] = before
    step()
    for weight, rate in zip(weights, rates, strict=True):
        torch.testing.assert_close(weight.item(), -2 * rate, rtol=1e-9, atol=0)
