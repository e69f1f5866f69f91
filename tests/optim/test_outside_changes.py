"""Masks, frozen layers, weights loaded in the middle. Truth: the weights themselves."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st

SHELLS = {
    "SGD": lambda net, **o: st.SGD(net, lr=0.05, momentum=0.9, **o),
    "AdamW": lambda net, **o: st.AdamW(net, lr=0.01, **o),
    "RMSprop": lambda net, **o: st.RMSprop(net, lr=0.01, momentum=0.5, **o),
    "Lion": lambda net, **o: st.Lion(net, lr=0.003, **o),
    "Muon": lambda net, **o: st.Muon(muons(net), lr=0.01, model=net, **o),
    "Mixture": lambda net, **o: st.Mixture(net, [st.rules.SGD(), st.rules.AdamW()], lr=0.01, **o),
    "NAdam": lambda net, **o: st.SelfTuning(torch.optim.NAdam(net.parameters(), lr=0.01), **o),
}
X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 1))


def muons(net: nn.Module) -> list[dict[str, Any]]:
    """All matrices by Muon: the first as well, which the tests mask and freeze."""
    return st.muon_groups(net, ["2"])


def step(net: nn.Module, opt: st.SGD) -> None:
    opt.zero_grad()
    (net(X) - Y).square().mean().backward()
    opt.step()


def tune(net: nn.Module, opt: st.SGD) -> None:
    opt.hyper_step(lambda: (net(X) - Y).square().mean())


def averaged(net: nn.Module, opt: st.SGD) -> dict[str, Tensor]:
    with opt.averaged():
        return {n: v.clone() for n, v in net.state_dict().items()}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("tuned", [True, False])
def test_masked_weights_are_zero_in_the_average(shell: str, tuned: bool) -> None:
    net = network()
    opt = SHELLS[shell](net, probe=False)
    mask = torch.rand(net[0].weight.shape, generator=torch.Generator().manual_seed(1)) > 0.8
    for _ in range(45):
        step(net, opt)
        net[0].weight.data *= mask
        if tuned:
            tune(net, opt)
    shown = averaged(net, opt)["0.weight"]
    assert torch.equal(shown == 0, ~mask)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_frozen_layer_is_in_the_average_as_it_is(shell: str) -> None:
    net = network()
    opt = SHELLS[shell](net, probe=False)
    for at in range(60):
        if at == 30:
            net[0].requires_grad_(False)
            net[0].weight.grad = net[0].bias.grad = None
        step(net, opt)
        tune(net, opt)
    shown = averaged(net, opt)
    assert torch.equal(shown["0.weight"], net[0].weight)
    assert torch.equal(shown["0.bias"], net[0].bias)
    assert not torch.equal(shown["2.weight"], net[2].weight)


@pytest.mark.parametrize("shell", SHELLS)
def test_sync_takes_weights_over(shell: str) -> None:
    net = network()
    opt = SHELLS[shell](net, probe=False)
    for _ in range(40):
        step(net, opt)
        tune(net, opt)
    before = opt.hparams
    torch.manual_seed(5)
    net.load_state_dict(other := nn.Sequential(*[*network()]).state_dict())
    for value in other.values():
        value.add_(torch.randn_like(value))
    net.load_state_dict(other)
    stale = averaged(net, opt)
    assert not torch.equal(stale["0.weight"], other["0.weight"])
    opt.sync()
    shown = averaged(net, opt)
    assert all(torch.equal(shown[n], other[n]) for n in other)
    assert opt.hparams == before
    for _ in range(3):  # an alarm: the run returns to its last good weights, which are these
        opt.zero_grad()
        ((net(X) - Y).square().mean() * torch.nan).backward()
        opt.step()
    assert all(torch.equal(v, other[n]) for n, v in net.state_dict().items())


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(shell: str, bad: float) -> None:
    net = network()
    opt = SHELLS[shell](net, probe=False)
    for at in range(60):
        step(net, opt)
        if 30 <= at < 34:  # one of them at a step at which live units are counted
            before = {n: v.clone() for n, v in net.state_dict().items()}
            net[0].weight.grad.fill_(bad)
            opt.step()
            assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
        tune(net, opt)
    kept = [v for state in opt.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert all(bool(torch.isfinite(v).all()) for v in kept)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_copy_goes_on_like_the_original(shell: str) -> None:
    net = network()
    opt = SHELLS[shell](net, total_steps=120)
    for _ in range(40):
        step(net, opt)
        tune(net, opt)
    twin, other = copy.deepcopy((net, opt))
    for model, tuned in ((net, opt), (twin, other)):
        for _ in range(20):
            step(model, tuned)
            tune(model, tuned)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_sync_inside_averaged_is_refused() -> None:
    net = network()
    opt = st.SGD(net, lr=0.05)
    step(net, opt)
    with opt.averaged(), pytest.raises(RuntimeError, match=r"sync\(\) inside averaged"):
        opt.sync()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_late_mask_holds_in_the_last_good_weights(shell: str) -> None:
    """Weights that were good before the mask are shown at the end with the mask, or not at all."""
    net = network()
    opt = SHELLS[shell](net, total_steps=120)
    mask = torch.rand(net[0].weight.shape, generator=torch.Generator().manual_seed(1)) > 0.8
    for at in range(120):
        step(net, opt)
        if at >= 40:
            net[0].weight.data *= mask
        tune(net, opt)
    assert (averaged(net, opt)["0.weight"][~mask] == 0).all()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_rewind_leaves_a_frozen_layer_alone(shell: str) -> None:
    net = network()
    opt = SHELLS[shell](net, total_steps=120)
    for at in range(60):
        if at == 30:
            net[0].requires_grad_(False)
            net[0].weight.grad = net[0].bias.grad = None
            held = net[0].weight.clone()
        opt.zero_grad()
        (net(X) - Y).square().mean().backward()
        if at in (50, 51, 52):  # a rewind
            net[2].weight.grad.fill_(float("nan"))
        opt.step()
        tune(net, opt)
    assert torch.equal(net[0].weight, held)
    assert torch.equal(averaged(net, opt)["0.weight"], held)


@pytest.mark.parametrize("storage", ["bf16", "device"])
def test_the_sweep_returns_to_its_best_weights_exactly(storage: str) -> None:
    """Truth: in float32 a weight is hardly ever a multiple of a bfloat16's last digit."""
    net = network()
    opt = st.AdamW(net, lr=1e-6, total_steps=300, snapshots=storage)
    for _ in range(30):
        step(net, opt)
        weight = net[0].weight
        assert not torch.equal(weight, weight.bfloat16().float())
        tune(net, opt)


def test_strengths_of_layers_are_named_as_fixed(caplog: pytest.LogCaptureFixture) -> None:
    st.AdamW(nn.Sequential(nn.Linear(5, 9), st.nn.Dropout(0.3, name="hidden"), nn.Linear(9, 1)))
    assert "strengths of layers ['hidden'] keep their values" in caplog.text


def test_weights_that_a_penalty_has_thresholded_stay_good() -> None:
    """A proximal penalty that zeroes the whole net is undone by a rewind. Truth: the loss."""
    net = network()
    opt = st.SGD(net, lr=0.05, momentum=0.9, penalty=st.penalties.ProximalL1(1e-4), tune=("lr",))
    for _ in range(100):
        step(net, opt)
        tune(net, opt)
    with opt.averaged(), torch.no_grad():
        before = float((net(X) - Y).square().mean())
    opt.param_groups[0]["l1"] = 100.0
    for _ in range(3):
        step(net, opt)
        assert all(bool((p == 0).all()) for p in net.parameters())
        opt.report(float("nan"))
    with torch.no_grad():
        assert float((net(X) - Y).square().mean()) < 2 * before + 0.1


@pytest.mark.parametrize("many", [True, False], ids=["as many", "any number"])
@pytest.mark.parametrize("shell", ["SGD", "AdamW", "RMSprop"])
def test_weights_that_touch_zero_stay_in_the_average(shell: str, many: bool) -> None:
    """Law: of weights that are 0 after some steps and not after others; also across a state."""
    net = network()
    opt = SHELLS[shell](net, tune=(), guard=False, every=5)
    drawn = torch.Generator().manual_seed(0)
    for index in range(120):
        step(net, opt)
        with torch.no_grad():
            noise = torch.rand(net[0].weight.shape, generator=drawn)
            net[0].weight.mul_(noise > (noise.quantile(0.3) if many else 0.3))
        tune(net, opt)
        if index == 60:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    touched = net[0].weight == 0
    assert touched.any()
    assert averaged(net, opt)["0.weight"][touched].all()


@pytest.mark.parametrize("shell", ["SGD", "AdamW", "RMSprop"])
def test_weights_frozen_after_training_keep_their_average(shell: str) -> None:
    """Twin: the average before."""
    net = network()
    opt = SHELLS[shell](net, total_steps=60, probe=False)
    for _ in range(40):
        step(net, opt)
        tune(net, opt)
    before = averaged(net, opt)
    net.requires_grad_(False)
    for name, value in averaged(net, opt).items():
        assert torch.equal(value, before[name]), name


def test_parameters_that_share_memory_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight.data = net[0].weight.data
    with pytest.raises(ValueError, match=r"1.weight shares its memory with 0.weight; tie them"):
        st.AdamW(net)


@pytest.mark.parametrize("change", ["clamped", "masked", "frozen for two steps"])
@pytest.mark.parametrize("shell", ["SGD", "AdamW"])
def test_a_look_does_not_change_the_run(shell: str, change: str) -> None:
    """Truth: the run at whose averaged weights nobody looked."""
    ends = []
    for looks in (False, True):
        net = network()
        opt = SHELLS[shell](net, total_steps=200, probe=False)
        mask = torch.rand(20, 5, generator=torch.Generator().manual_seed(1)) > 0.5
        for number in range(120):
            net[0].requires_grad_(change != "frozen for two steps" or number not in (31, 32))
            step(net, opt)
            with torch.no_grad():
                if change == "clamped":
                    net[0].weight.clamp_(min=0)
                elif change == "masked":
                    net[0].weight.mul_(mask)
            if looks and number % 7 == 4:
                averaged(net, opt)
            tune(net, opt)
        ends.append({**averaged(net, opt), **{k: torch.tensor(v) for k, v in opt.hparams.items()}})
    for name, expected in ends[0].items():
        assert torch.equal(ends[1][name], expected), name


@pytest.mark.parametrize("shell", ["AdamW", "SGD", "RMSprop", "Lion", "NAdam"])
@pytest.mark.parametrize("to_none", [False, True])
def test_a_layer_that_becomes_frozen_is_not_dead(
    shell: str, to_none: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor do units count anew that died before. Law: freezing a layer kills no unit."""
    draw = torch.Generator().manual_seed(0)
    x, true = torch.randn(512, 8, generator=draw), torch.randn(8, 2, generator=draw)
    y = torch.tanh(x @ true)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
    opt = SHELLS[shell](net, total_steps=300)

    def loss(at: Tensor) -> Tensor:
        return (net(x[at]) - y[at]).square().mean()

    for step in range(300):
        if step == 100:
            net[0].requires_grad_(False)
        opt.zero_grad(set_to_none=to_none)
        loss(torch.randint(448, (32,), generator=draw)).backward()
        opt.step()
        opt.hyper_step(lambda: loss(torch.arange(448, 512)))
    assert "died" not in caplog.text
