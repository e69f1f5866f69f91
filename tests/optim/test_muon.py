"""st.Muon. Truths: torch.optim's Muon and AdamW, the uninterrupted run, a run at a fixed rate."""

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as checkpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st

FIXED: dict[str, Any] = dict(tune=(), probe=False, guard=False)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has Muon")


def network() -> nn.Module:
    torch.manual_seed(0)
    hidden = [m for _ in range(2) for m in (nn.Linear(16, 16), nn.Tanh())]
    return nn.Sequential(nn.Embedding(12, 16), nn.Flatten(), nn.Linear(32, 16), *hidden,
                         nn.Linear(16, 12))  # fmt: skip


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Two numbers, and the larger one."""
    x = torch.randint(12, (32, 2), generator=torch.Generator().manual_seed(seed))
    return x, x.max(1).values


def loss_of(net: nn.Module, seed: int) -> Tensor:
    x, y = batch(seed)
    return cross_entropy(net(x), y)


def train(net: nn.Module, opt: Any, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(net, step).backward()
        opt.step()
        opt.hyper_step(lambda step=step: loss_of(net, 1000 + step))


@needs_muon
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torchs_muon_and_adamw(adjust: str | None, nesterov: bool) -> None:
    net, twin, lr = network(), network(), 1e-3
    opt = st.Muon(
        net, lr, adjust_lr_fn=adjust, nesterov=nesterov, lr_ratio=0.5, betas=(0.9, 0.999), **FIXED
    )
    hidden, rest = st.muon_groups(twin)
    twins = [
        torch.optim.Muon(hidden["params"], lr, adjust_lr_fn=adjust, nesterov=nesterov),
        torch.optim.AdamW(rest["params"], lr / 2, weight_decay=0.1),
    ]
    for step in range(10):
        train(net, opt, range(step, step + 1))
        twin.zero_grad()
        loss_of(twin, step).backward()
        for other in twins:
            other.step()
        # A rounding error of a gradient may round it to another bfloat16 number, 2⁻⁸ away, which
        # the orthogonalisation enlarges up to 4 times; so every step starts from equal weights.
        for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            assert (ours - theirs).abs().max() <= lr * 2**-6
            ours.data.copy_(theirs.data)


@pytest.mark.parametrize("stop", [5, 40])
@pytest.mark.parametrize("kind", ["module", "per group", "convolutions"])
def test_resumes_bit_for_bit(kind: str, stop: int) -> None:
    def make() -> tuple[nn.Module, Any]:
        net = network()
        if kind == "convolutions":
            net = nn.Sequential(
                nn.Embedding(12, 16), nn.Unflatten(1, (2, 1)), nn.Conv2d(2, 4, (1, 3)), nn.Tanh(),
                nn.Conv2d(4, 4, (1, 3)), nn.Flatten(), nn.Linear(48, 12),
            )  # fmt: skip
        per = "group" if kind == "per group" else "run"
        return net, st.Muon(net, per=per, total_steps=100)

    net, opt = make()
    train(net, opt, range(stop))
    model, file = copy.deepcopy(net.state_dict()), io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    train(net, opt, range(stop, 60))
    again, resumed = make()
    again.load_state_dict(model)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(again, resumed, range(stop, 60))
    assert resumed.hparams == opt.hparams
    with opt.averaged(), resumed.averaged():
        for ours, theirs in zip(again.parameters(), net.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_resumes_through_distributed_checkpoints() -> None:
    net = network()
    opt = st.Muon(net, total_steps=100)
    train(net, opt, range(60))
    state = copy.deepcopy(checkpoint.get_optimizer_state_dict(net, opt))
    again = network()
    again.load_state_dict(copy.deepcopy(net.state_dict()))
    train(net, opt, range(60, 80))
    resumed = st.Muon(again, total_steps=100)
    checkpoint.set_optimizer_state_dict(again, resumed, state)
    train(again, resumed, range(60, 80))
    assert resumed.hparams == opt.hparams
    for ours, theirs in zip(again.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_a_rate_30_times_too_low_is_raised() -> None:
    """Against the fixed rate, with the same schedule."""
    losses = []
    for options in ({}, FIXED):
        net = network()
        opt = st.Muon(net, 3e-4, lr_ratio=0.5, total_steps=200, **options)
        train(net, opt, range(200))
        with opt.averaged():
            losses.append(loss_of(net, 5000).item())
    tuned, fixed = losses
    assert tuned < 0.5 * fixed


def test_groups_share_a_factor_or_have_one_each() -> None:
    """Law: by default ratios of rates and decays stay; with per="group" they change."""
    for per in ("run", "group"):
        net = network()
        groups = st.muon_groups(net)
        groups[1] |= {"lr": 2e-3, "weight_decay": 0.01}
        bounds = {"weight_decay": (1e-6, 1.0)}  # instead of the floor, which is common to both
        opt = st.Muon(groups, 1e-2, per=per, bounds=bounds, total_steps=100)
        train(net, opt, range(90))
        matrices, rest = opt.hparams["lr"]
        assert matrices != pytest.approx(1e-2)
        assert (matrices / rest == pytest.approx(5.0)) == (per == "run")
        matrices, rest = opt.hparams["weight_decay"]
        assert matrices != pytest.approx(0.1)
        assert (matrices / rest == pytest.approx(10.0)) == (per == "run")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(ns_steps=0), "ns_steps=0"),
        (dict(ns_steps=200), "ns_steps=200"),
        (dict(ns_coefficients=(1.0, 2.0)), r"ns_coefficients=\(1.0, 2.0\)"),
        (dict(adjust_lr_fn="rms"), "adjust_lr_fn='rms'"),
        (dict(adamw_eps=-1.0), "adamw_eps=-1.0"),
        (dict(lr_ratio=0.0), "lr_ratio=0.0"),
        (dict(momentum=-0.1), "momentum=-0.1"),
        (dict(tune=("momentum",)), "tune='momentum' is unknown"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    """Law: an error that names the argument and the value."""
    with pytest.raises((TypeError, ValueError), match=match):
        st.Muon(network(), **options)


def test_vectors_are_refused_in_groups_for_muon() -> None:
    net = network()
    with pytest.raises(ValueError, match=r"shape \(16,\).*st.muon_groups\(model\)"):
        st.Muon(net.parameters())
    opt = st.Muon(st.muon_groups(net)[:1])
    with pytest.raises(ValueError, match=r"shape \(12,\)"):
        opt.add_param_group({"params": [net[-1].bias]})
    opt.add_param_group({"params": [net[-1].bias], "use_muon": False})
    assert len(opt.param_groups) == 2
    with pytest.raises((TypeError, ValueError), match="use_muon="):
        opt.add_param_group({"params": [net[-1].weight], "use_muon": 1})
