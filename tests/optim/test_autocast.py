"""Autocast around a loop's calls. Truths: autocast in the closure alone, and float32 gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

X = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
Y = X @ torch.randn(10, 10, generator=torch.Generator().manual_seed(1)) / 3


def run(outside: bool) -> tuple[float, list[float], dict[str, Any]]:
    """A run whose rate becomes too high, so that the guard has to bring it back."""
    torch.manual_seed(0)
    net = nn.Linear(10, 10)
    opt = st.SGD(net, lr=0.05, probe=False, every=1, total_steps=60)
    losses = []
    for step in range(60):
        if step == 30:
            opt.param_groups[0]["lr"] = 20.0
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(net(X[:32]).float(), Y[:32])
        loss.backward()
        opt.step()

        def closure() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return F.mse_loss(net(X[32:]).float(), Y[32:])

        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            found = opt.hyper_step(closure)
        losses += [] if found is None else [float(found)]
    with opt.averaged():
        return float(closure().detach()), losses, opt.hparams


def test_autocast_around_a_hyperparameter_step_is_that_of_its_closure() -> None:
    inside, outside = run(False), run(True)
    assert inside[0] < 2.0
    assert outside == inside


def gradient(scaler: Any) -> Tensor:
    """The validation gradient of a net in float16, as the optimizer differentiates it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3072))
    x = torch.randn(64, 64)
    y = net(x).detach() + torch.randn(64, 3072)
    opt = st.SGD(net, lr=1e-8, probe=False, every=1, tune=("lr",))
    seen: list[Tensor] = []
    net[0].weight.register_hook(lambda grad: seen.append(grad.clone()))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=scaler != "float32"):
            return 1e-3 * F.mse_loss(net(x).float(), y)

    loss().backward()
    opt.step()
    seen.clear()
    opt.hyper_step(loss, scaler=None if scaler in ("float32", "none") else scaler)
    scale = 1.0 if scaler in ("float32", "none") else scaler.get_scale()
    return seen[-1] / scale


def test_a_scaler_keeps_float16_gradients_from_underflow() -> None:
    truth = gradient("float32")
    scaled = gradient(torch.amp.GradScaler("cpu", init_scale=2.0**14))
    error = [(found - truth).norm() / truth.norm() for found in (gradient("none"), scaled)]
    assert error[0] > 0.05
    assert error[1] < 0.002


def test_what_is_no_scaler_is_refused() -> None:
    net = nn.Linear(10, 10)
    wrong: Callable[..., Any] = st.SGD(net).hyper_step
    with pytest.raises(TypeError, match=r"scaler=float must be a torch\.amp\.GradScaler"):
        wrong(lambda: net(X).sum(), scaler=2.0)


def test_a_scale_that_overflows_is_lowered() -> None:
    """Truth: the run without a scaler, whose hypergradients are the same."""

    class Scaler:
        def get_scale(self) -> float:
            return 3e38

    found = []
    for scaler in (None, Scaler()):
        torch.manual_seed(0)
        net = nn.Linear(10, 10)
        opt = st.SGD(net, lr=0.01, probe=False, every=1)
        for _ in range(20):
            opt.zero_grad()
            F.mse_loss(net(X[:32]), Y[:32]).backward()
            opt.step()
            opt.hyper_step(lambda net=net: 30 * F.mse_loss(net(X[32:]), Y[32:]), scaler=scaler)
        found.append(opt.hparams["lr"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


SHELLS: dict[str, Callable[..., Any]] = {
    **{
        shell.__name__: shell for shell in (st.SGD, st.Adam, st.AdamW, st.RMSprop, st.Lion, st.Muon)
    },
    "SelfTuning": lambda p, lr, **options: st.SelfTuning(torch.optim.NAdam(p, lr=lr), **options),
}


@pytest.mark.parametrize("name", SHELLS)
def test_whole_iterations_inside_autocast_are_those_of_its_passes(name: str) -> None:
    def train(outside: bool) -> tuple[Tensor, dict[str, Any]]:
        torch.manual_seed(0)
        net = nn.Linear(10, 10, bias=False)
        opt = SHELLS[name](net.parameters(), lr=0.003, probe=False, total_steps=40, every=5)

        def loss(part: slice) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return F.mse_loss(net(X[part]).float(), Y[part])

        for _ in range(40):
            opt.zero_grad()
            loss(slice(0, 32)).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=outside):
                opt.step()
                opt.hyper_step(lambda: loss(slice(32, 64)))
        return net.weight.detach(), opt.hparams

    (weights, hparams), (others, expected) = train(True), train(False)
    assert torch.equal(weights, others)
    assert hparams == expected
