"""Bad calls in the middle of a run. Truth: a run without them, bit for bit."""

import copy
import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import selftune as st

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


def param(*size: int, **options) -> nn.Parameter:
    return nn.Parameter(torch.ones(*size or (2,), **options))


def check_message(error: pytest.ExceptionInfo, words: list[str]) -> None:
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} is missing in {error.value}"


def start(steps: int = 44) -> tuple[nn.Module, st.SGD]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    opt = st.SGD(net.parameters(), lr=0.01, probe=False)
    go_on(net, opt, steps)
    return net, opt


def go_on(net: nn.Module, opt: st.SGD, steps: int) -> None:
    for step in range(steps):
        opt.zero_grad()
        net(X).square().mean().backward()
        opt.step()
        if step % 4 == 0:
            opt.hyper_step(lambda: net(X).square().mean())


def later_state(net: nn.Module, opt: st.SGD) -> tuple[dict[str, Tensor], dict]:
    go_on(net, opt, 30)
    return net.state_dict(), opt.hparams


@cache
def undisturbed() -> tuple[dict[str, Tensor], dict]:
    return later_state(*start())


def fail(net: nn.Module) -> Tensor:
    net(X)
    raise KeyError("a bug in the user's closure")


def went_back(net: nn.Module) -> Tensor:
    loss = net(X).square().mean()
    loss.backward()
    return loss


CLOSURES: dict[str, tuple[Callable, type, list[str]]] = {
    "vector": (lambda n: n(X), ValueError, ["closure", r"\(16, 1\)", "mean"]),
    "float": (lambda n: n(X).mean().item(), TypeError, ["closure", "float", "item"]),
    "none": (lambda n: None, TypeError, ["closure", "None", "tensor"]),
    "detached": (lambda n: n(X).mean().detach(), ValueError, ["closure", "detached", "graph"]),
    "complex": (lambda n: n(X).mean() + 0j, ValueError, ["closure", "complex64", "real"]),
    "nan": (lambda n: n(X).mean() * torch.nan, ValueError, ["closure", "nan", "check"]),
    "inf": (lambda n: n(X).mean().exp() * torch.inf, ValueError, ["closure", "inf", "check"]),
    "foreign": (lambda n: param().sum(), ValueError, ["closure", "does not depend", "model"]),
    "raises": (fail, KeyError, ["user's"]),
    "tuple": (lambda n: (n(X).mean(), X), TypeError, ["closure", "tuple", "alone"]),
    "backward": (lambda n: went_back(n), RuntimeError, ["closure", "backward", "return the loss"]),
    "no batch left": (lambda n: next(iter(())), RuntimeError, ["closure", "endless", "yield from"]),
}


@pytest.mark.parametrize("first", [False, True], ids=["", "first call"])
@pytest.mark.parametrize("case", CLOSURES)
def test_a_wrong_closure_changes_nothing(case: str, first: bool) -> None:
    """What follows equals, bit for bit, what follows without the wrong call."""
    # pass leaves its mark on the running statistics.
    closure, kind, words = CLOSURES[case]
    net, opt = start(1 if first else 44)
    if first:
        opt = st.SGD(net.parameters(), lr=0.01, probe=False, every=1)
        net(X).square().mean().backward()
        opt.step()
    twins = copy.deepcopy(net.state_dict()), opt.hparams
    with pytest.raises(kind) as error:
        opt.hyper_step(lambda: closure(net))
    check_message(error, words)
    torch.testing.assert_close((net.state_dict(), opt.hparams), twins, rtol=0, atol=0)
    if not first:
        torch.testing.assert_close(later_state(net, opt), undisturbed(), rtol=0, atol=0)


def test_sparse_gradients() -> None:
    net = nn.Embedding(5, 2, sparse=True)
    opt = st.SGD(net.named_parameters())
    before = net.weight.detach().clone()
    net(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"weight is sparse.*sparse=False"):
        opt.step()
    assert torch.equal(before, net.weight)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"params": [param(dtype=torch.cfloat)]}, "again"])
def test_a_group_that_is_refused_later_changes_nothing(bad: dict | str) -> None:
    net, opt = start()
    group = {"params": [net[0].weight]} if bad == "again" else {"params": [param(2)], **bad}
    with pytest.raises(ValueError, match=r"lr=|complex|more than one"):
        opt.add_param_group(group)
    torch.testing.assert_close(later_state(net, opt), undisturbed(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", -1.0, ["lr=-1.0", "above 0"]),
        ("lr", float("nan"), ["lr=nan", "finite"]),
        ("lr", float("inf"), ["lr=inf", "finite"]),
        ("momentum", 1.0, ["momentum=1.0", "below 1"]),
        ("momentum", -0.3, ["momentum=-0.3", "0 or more"]),
        ("weight_decay", -1.0, ["weight_decay=-1.0", "0 or more"]),
    ],
)
def test_a_value_out_of_range_in_a_group_is_refused(
    name: str, value: float, words: list[str]
) -> None:
    net, opt = start()
    before = opt.param_groups[0][name]
    opt.param_groups[0][name] = value
    net(X).square().mean().backward()
    with pytest.raises(ValueError) as error:  # noqa: PT011 - words are checked below
        opt.step()
    check_message(error, words)
    opt.param_groups[0][name] = before
    opt.zero_grad()
    net.load_state_dict(start()[0].state_dict())  # statistics: of the pass above
    torch.testing.assert_close(later_state(net, opt), undisturbed(), rtol=0, atol=0)


def test_no_group_s_value_is_taken_over_beside_one_that_is_refused() -> None:
    nets = nn.Linear(3, 1), nn.Linear(3, 1)
    opt = st.SGD([{"params": n.parameters(), "lr": 0.1} for n in nets], probe=False)
    (nets[0](X) + nets[1](X)).square().mean().backward()
    opt.step()
    for group, value in zip(opt.param_groups, (0.2, -1.0), strict=True):
        group["lr"] = value
    with pytest.raises(ValueError, match=r"lr=-1\.0"):
        opt.step()
    opt.param_groups[1]["lr"] = 0.1
    before = [n.weight.detach().clone() for n in nets]
    opt.zero_grad()
    (nets[0](X) + nets[1](X)).mean().backward()
    opt.step()
    assert opt.hparams["lr"] == pytest.approx([0.2, 0.1])
    assert not torch.equal(before[0], nets[0].weight)


@pytest.mark.parametrize(("schedule", "told"), [("linear", 1), ("constant", 0)])
def test_steps_past_the_end_of_a_schedule_are_told_of_once(
    schedule: str, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Linear(3, 1)
    opt = st.SGD(net.parameters(), total_steps=30, schedule=schedule, probe=False)
    go_on(net, opt, 30)
    assert "past" not in caplog.text
    go_on(net, opt, 40)
    assert caplog.text.count("past total_steps=30") == told
