"""What an optimizer keeps. Truths: bytes counted in its state, and runs that keep it exactly."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st


def bytes_of(tensors: list[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def trained(shell: str, steps: int = 30, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 1600), nn.Tanh(), nn.Linear(1600, 1))
    extra = {"momentum": 0.9} if shell == "SGD" else {}
    opt = getattr(st, shell)(net, lr=1e-3, **extra, **options)
    for _ in range(steps):
        opt.zero_grad()
        net(torch.randn(4, 50)).square().mean().backward()
        opt.step()
        opt.hyper_step(lambda: net(torch.randn(4, 50)).square().mean())
    return net, opt


@pytest.mark.parametrize(("shell", "most"), [("AdamW", 1.8), ("SGD", 2.2)])
def test_the_table_is_what_the_state_holds_and_that_is_little(shell: str, most: float) -> None:
    """Bytes counted in ``opt.state``; torch keeps weights and one or two tensors of their size."""
    net, opt = trained(shell, probe=False)
    table = opt.memory()
    held = [t for entry in opt.state.values() for t in entry.values() if t.ndim]
    assert abs(table.total - bytes_of(held)) < 1000  # numbers for each tensor
    weights = sum(p.numel() for p in net.parameters()) * 4
    assert table.weights == weights
    plain = {"AdamW": 3, "SGD": 2}[shell] * weights
    assert (table.total + weights) / plain < most
    assert "last good weights" in str(table)
    assert "of 1/19 of the weights" in str(table)


def test_the_state_of_an_optimizer_from_outside_counts() -> None:
    """Adafactor's factored moments: rows and columns, not the size of the weights."""
    net = nn.Linear(100, 100)
    opt = st.SelfTuning(torch.optim.Adafactor(net.parameters()))
    for _ in range(3):
        opt.zero_grad()
        net(torch.randn(4, 100)).square().mean().backward()
        opt.step()
    rule = next(e for e in opt.memory().entries if e.name == "rule state")
    inner = [t for e in opt.state_dict()["state"].values() for t in e["inner"].values()]
    assert rule.size == sum(t.numel() * t.element_size() for t in inner)
    assert rule.size < 2000


def test_a_rate_in_a_tensor_stays_in_it() -> None:
    """Twin: the same optimizer with a number (torchao's refuse a rate that is none)."""
    ends = []
    for rate in (torch.tensor(0.1), 0.1):
        torch.manual_seed(0)
        net = nn.Linear(5, 1)
        inner = torch.optim.SGD(net.parameters(), lr=rate)
        opt = st.SelfTuning(inner, probe=False)
        held = inner.param_groups[0]["lr"]
        for _ in range(12):
            opt.zero_grad()
            net(torch.randn(4, 5)).square().mean().backward()
            opt.step()
            opt.hyper_step(lambda net=net: net(torch.randn(4, 5)).square().mean())
        assert isinstance(inner.param_groups[0]["lr"], type(rate))
        assert inner.param_groups[0]["lr"] is held or isinstance(rate, float)
        ends.append([float(v) for v in (*net.weight.detach().flatten(), opt.hparams["lr"])])
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def test_last_good_weights_are_kept_as_asked() -> None:
    """Exactly; in bfloat16, to three digits; small models exactly by default."""
    ends = {}
    for where in ("device", "host", "bf16", None):
        _, opt = trained("AdamW", snapshots=where, probe=False)
        ends[where] = opt._engine.blocks[0].good.clone()
    assert torch.equal(ends["device"], ends["host"])
    assert ends["bf16"].dtype == torch.bfloat16
    assert torch.equal(ends["bf16"], ends[None])
    assert torch.equal(ends["device"].bfloat16(), ends["bf16"])
    small = st.AdamW(nn.Linear(4, 4))
    small.memory()
    assert small._engine.blocks[0].good.dtype == torch.float32


def test_a_run_goes_on_exactly_from_what_was_restored() -> None:
    """Law: weights and average after a rewind are the kept ones, all three alike."""
    net, opt = trained("AdamW", snapshots="bf16", probe=False)
    block = opt._engine.blocks[0]
    good = block.good.float()
    for _ in range(3):
        for param in net.parameters():
            param.grad = torch.full_like(param, torch.nan)
        opt.step()
    assert torch.equal(block.weights(), good)
    assert torch.equal(block.part.average, good)


def test_a_wrong_place_is_refused() -> None:
    for make in (
        lambda: st.AdamW(nn.Linear(2, 1), snapshots="disk"),
        lambda: st.Tuner(nn.Linear(2, 1), nn.functional.mse_loss, snapshots="disk"),
    ):
        with pytest.raises(ValueError, match="snapshots='disk' must be 'device', 'host' or 'bf16'"):
            make()


def test_a_closure_sees_the_average_and_leaves_no_trace() -> None:
    """Law: weights and average change places, also where the closure fails or looks itself."""
    net, opt = trained("AdamW", probe=False, every=1)
    net(torch.randn(4, 50)).square().mean().backward()
    opt.step()
    with opt.averaged():
        average = [p.detach().clone() for p in net.parameters()]
    weights = [p.detach().clone() for p in net.parameters()]
    seen: list[Tensor] = []

    def closure(*, fails: bool = False) -> Tensor:
        with opt.averaged():
            seen[:] = [p.detach().clone() for p in net.parameters()]
        if fails:
            raise KeyError("of the user")
        return net(torch.ones(2, 50)).square().mean()

    def same(some: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(net.parameters(), some, strict=True))

    with pytest.raises(KeyError, match="of the user"):
        opt.hyper_step(lambda: closure(fails=True))
    assert same(weights)
    opt.hyper_step(closure)
    assert same(weights)
    assert all(torch.equal(a, b) for a, b in zip(seen, average, strict=True))
    with opt.averaged():
        assert same(average)


def test_outer_gradients_never_lie_side_by_side() -> None:
    """Count of live tensors of a parameter's size while the validation loss is differentiated."""
    layers = [nn.Linear(200, 200, bias=False) for _ in range(6)]
    net = nn.Sequential(*layers)
    opt = st.AdamW(net, probe=False, every=1)
    net(torch.randn(2, 200)).square().mean().backward()
    opt.step()
    opt.zero_grad()
    opt.hyper_step(lambda: net(torch.randn(2, 200)).square().mean())  # looks at the start first
    net(torch.randn(2, 200)).square().mean().backward()
    opt.step()
    opt.zero_grad()
    alive: list[int] = []
    handles = [layer.weight.register_hook(lambda g: alive.append(matrices())) for layer in layers]
    before = matrices()
    opt.hyper_step(lambda: net(torch.randn(2, 200)).square().mean())
    for handle in handles:
        handle.remove()
    assert len(alive) == 6
    assert max(alive) <= before + 2  # the gradient at hand


def matrices() -> int:
    """How many tensors of the layers' size have memory of their own."""
    found = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    found = [t for t in found if not torch._C._functorch.is_functorch_wrapped_tensor(t)]
    large = {
        t.untyped_storage().data_ptr() for t in found if t.untyped_storage().nbytes() >= 160_000
    }
    return len(large)
