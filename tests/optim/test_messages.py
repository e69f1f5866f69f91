"""Messages of wrong calls and warnings. Truth: they hold the remedy and the optimizer's name."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import selftune as st
from selftune.monitor import InMemory

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def network(deep: bool = True) -> nn.Module:
    torch.manual_seed(0)
    deep_net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    return deep_net if deep else nn.Linear(4, 1)


def loss_of(net: nn.Module) -> Tensor:
    return (net(X) - X.sum(1, keepdim=True)).square().mean()


def train(net: nn.Module, opt: st.SGD, steps: int, hyper: bool = True) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss_of(net).backward()
        opt.step()
        if hyper:
            opt.hyper_step(lambda: loss_of(net))


CASES = {
    "a loss": (True, lambda v: v),
    "of a linear model": (False, lambda v: v),
    "a loss of a loss": (True, lambda v: 2 * v),
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_loss_computed_before_the_step_is_refused(case: str, begun: bool) -> None:
    deep, wrap = CASES[case]
    net = network(deep)
    opt = st.SGD(net.parameters(), lr=0.01, probe=False, every=1)
    train(net, opt, 5 if begun else 0)
    loss = loss_of(net)
    train(net, opt, 1, hyper=False)
    opt.hyper_step(lambda: loss_of(net))
    train(net, opt, 1, hyper=False)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="must run the model"):
        opt.hyper_step(lambda: wrap(loss))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    train(net, opt, 3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda p: st.SGD(p, total_step=10),
            r"^SGD has no argument total_step=10: did you mean tot",
        ),
        (lambda p: st.AdamW(p, wieght_decay=0.1), r"^AdamW has no .* did you mean weight_decay\?"),
        (
            lambda p: st.SelfTuning(torch.optim.NAdam(p), evry=3),
            r"^SelfTuning .* did you mean every",
        ),
        (lambda p: st.SGD(p, steps=10), "did you mean total_steps"),
        (lambda p: st.AdamW(p, learning_rate=0.1), r"learning_rate=0.1: did you mean lr\?"),
        (lambda p: st.SGD(p, colour=1), r"^SGD has no argument colour=1: it takes lr, "),
    ],
)
def test_an_unknown_argument_names_the_optimizer(make: Callable[..., object], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        make(network().parameters())


def test_messages_say_which_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    for options in ({}, {"name": "generator"}):
        opt = st.SGD(net.parameters(), lr=0.01, **options)
        with caplog.at_level(logging.INFO, "selftune"):
            train(net, opt, 60, hyper=False)
    told = [r.getMessage() for r in caplog.records if r.name == "selftune"]
    assert len(told) >= 4
    assert {t.partition(": ")[0].partition(",")[0] for t in told} == {"SGD", "generator"}


def test_two_names_share_a_folder(tmp_path: Path) -> None:
    net = network()
    for name in ("generator", "critic"):
        opt = st.SGD(net.parameters(), lr=0.01, probe=False, log_dir=tmp_path, name=name)
        train(net, opt, 30)
        opt.finish()
        found = EventAccumulator(str(tmp_path / name)).Reload()
        assert "hyper/lr" in found.Tags()["scalars"]
    assert {p.name for p in tmp_path.iterdir()} == {"generator", "critic"}


def test_a_name_begins_the_tags_of_other_recorders() -> None:
    net = network()
    log = InMemory()
    for name in ("generator", "critic"):
        opt = st.SGD(net.parameters(), lr=0.01, probe=False, log_dir=[log], name=name)
        train(net, opt, 30)
        opt.finish()
    tags = {r.tag.partition("/")[0] for r in log.rows}
    assert tags == {"generator", "critic"}
    assert log.curve("critic/hyper/lr")[0]
    assert {tag for tag, _, _ in log.texts} == {
        f"{name}/{text}" for name in ("generator", "critic") for text in ("verdicts", "why")
    }
