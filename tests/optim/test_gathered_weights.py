"""FSDP2 models of one rank, whose gathered weights torch keeps. Truth: the same run unsharded."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import selftune as st

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
X, XV = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROUNDING = dict(rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network(sharded: bool, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    return fully_shard(net, mesh=init_device_mesh("cpu", (1,)), **options) if sharded else net


def loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x).double() - x[:, :2].sin()).square().mean()


def step(net: nn.Module, opt: Any) -> None:
    opt.zero_grad()
    loss(net, X).backward()
    opt.step()


def evaluations(net: nn.Module, opt: Any) -> list[float]:
    """Losses at the training weights, the averaged weights and again the training weights."""
    with torch.no_grad():
        losses = [float(loss(net, XV))]
        with opt.averaged():
            losses.append(float(loss(net, XV)))
        losses.append(float(loss(net, XV)))
        opt.eval()
        losses.append(float(loss(net, XV)))
        opt.train()
        return [*losses, float(loss(net, XV))]


def run_of_evaluations(net: nn.Module) -> list[float]:
    opt = st.AdamW(net.parameters(), lr=0.01, total_steps=60, probe=20)
    seen = []
    for _ in range(60):
        step(net, opt)
        opt.hyper_step(lambda: loss(net, XV))
        seen += evaluations(net, opt)
    return [*seen, *opt.hparams.values()]


def test_evaluations_without_gradients_use_the_weights_in_place() -> None:
    seen, expected = (run_of_evaluations(network(sharded)) for sharded in (True, False))
    assert len(set(expected)) > 60
    torch.testing.assert_close(seen, expected, **ROUNDING)


def run_of_a_rewind(net: nn.Module) -> list[float]:
    opt = st.SGD(net.parameters(), lr=0.05, momentum=0.9, probe=False)
    for _ in range(40):
        step(net, opt)
        opt.hyper_step(lambda: loss(net, XV))
    seen = evaluations(net, opt)
    for _ in range(3):  # the third time the run returns to its last good weights
        step(net, opt)
        with torch.no_grad():
            loss(net, XV)
        opt.report(float("nan"))
    return [*seen, *evaluations(net, opt)]


def test_a_rewind_after_an_evaluation_shows_the_good_weights() -> None:
    seen, expected = (run_of_a_rewind(network(sharded)) for sharded in (True, False))
    torch.testing.assert_close(seen, expected, **ROUNDING)


def run_of_a_loaded_state(net: nn.Module, other: nn.Module) -> list[float]:
    """Training weights of a state that was saved at averaged weights are put into a model."""
    opt, twin = (st.SGD(n.parameters(), lr=0.05, probe=False) for n in (net, other))
    for _ in range(30):
        step(net, opt)
    opt.eval()
    state = opt.state_dict()
    with torch.no_grad():
        before = float(loss(other, XV))
    twin.load_state_dict(state)
    with torch.no_grad():
        return [before, float(loss(other, XV))]


def test_a_loaded_state_shows_its_training_weights() -> None:
    seen, expected = (run_of_a_loaded_state(network(s), network(s)) for s in (True, False))
    torch.testing.assert_close(seen, expected, **ROUNDING)


def accumulated(net: nn.Module, tuned: str) -> list[Tensor]:
    """Gradients of two micro-batches, with a hyperparameter step after one of them."""
    opt = st.SGD(net.parameters(), lr=0.01, probe=False, every=5)
    for _ in range(20):
        step(net, opt)
    opt.hyper_step(lambda: loss(net, XV))
    for _ in range(5):
        step(net, opt)
    opt.zero_grad()
    net.set_requires_gradient_sync(False)
    loss(net, X[:32]).backward()
    if tuned == "unsynchronised":
        assert opt.hyper_step(lambda: loss(net, XV)) is not None
    net.set_requires_gradient_sync(True)
    if tuned == "synchronised":
        assert opt.hyper_step(lambda: loss(net, XV)) is not None
    loss(net, X[32:]).backward()
    if tuned == "reduced":
        assert opt.hyper_step(lambda: loss(net, XV)) is not None
    return [p.grad.full_tensor() for p in net.parameters()]


@pytest.mark.parametrize("tuned", ["unsynchronised", "synchronised", "reduced"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_hyper_step_keeps_accumulated_gradients(tuned: str, mixed: bool) -> None:
    """Truth: the gradients without this hyperparameter step."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else None
    options = {"mp_policy": policy} if policy else {}
    seen, expected = (accumulated(network(True, **options), t) for t in (tuned, "never"))
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)


def run_of_accumulation(net: nn.Module, sharded: bool) -> list[float]:
    opt = st.SGD(net.parameters(), lr=0.01, probe=False, total_steps=40)
    for at in range(160):
        if sharded:
            net.set_requires_gradient_sync(at % 4 == 3)
        (loss(net, X[at % 4 :: 4]) / 4).backward()
        opt.hyper_step(lambda: loss(net, XV))
        if at % 4 == 3:
            opt.step()
            opt.zero_grad()
    return [loss(net, XV).item(), *opt.hparams.values()]


def test_accumulation_without_communication_tunes_as_without_shards() -> None:
    seen, expected = (run_of_accumulation(network(s), s) for s in (True, False))
    torch.testing.assert_close(seen, expected, **ROUNDING)


def test_a_hyper_step_keeps_the_gradients_of_another_optimizer() -> None:
    net = network(True)
    ours, theirs = (st.SGD(layer.parameters(), lr=0.01, probe=False) for layer in (net[0], net[2]))
    for _ in range(20):
        loss(net, X).backward()
        for opt in (ours, theirs):
            opt.step()
    before = [p.grad.full_tensor().clone() for p in net.parameters()]
    assert ours.hyper_step(lambda: loss(net, XV)) is not None
    assert [p.grad.full_tensor().tolist() for p in net.parameters()] == [b.tolist() for b in before]


@pytest.mark.parametrize(
    "estimator",
    [st.estimators.Unrolled(4), st.estimators.Forward(), st.estimators.Implicit(through="update")],
)
def test_whole_step_estimators_are_refused(estimator: Any) -> None:
    """Their inner products would be those of one rank's shards."""
    net = network(True)
    opt = st.SGD(net.parameters(), lr=0.05, estimator=estimator)

    def closure() -> Tensor:
        opt.zero_grad()
        value = loss(net, X)
        value.backward()
        return value

    with pytest.raises(ValueError, match="this estimator needs whole vectors: use DDP"):
        opt.step(closure)
