"""Slices of the weights. Truths: all weights, brute-force counts, laws of sums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st
from selftune.method import MethodSettings, Slice, SliceSettings
from selftune.method.slices import choose

FEW = MethodSettings(slices=SliceSettings(least=1))


@pytest.mark.parametrize("stride", [1, 2, 5, 7])
def test_counts_are_those_of_the_kept_indices(stride: int) -> None:
    """Brute force over the joined vector, tensors shorter than a stride among them."""
    sizes = [3, 17, 1, 40, 2, 5]
    owner = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)])
    kept = Slice(stride).take(owner)
    assert Slice(stride).counts(sizes) == [int((kept == i).sum()) for i in range(len(sizes))]


def test_inner_products_of_slices_are_those_of_the_whole_on_average() -> None:
    """Law: unbiased over random vectors; five standard errors of the mean."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2000, 300, generator=generator, dtype=torch.float64)
    cut = Slice(7)
    off = torch.stack(
        [cut.scaled(a) @ cut.scaled(b) - a @ b for a, b in zip(x, x + y, strict=True)]
    )
    assert float(off.mean().abs()) < 5 * float(off.std()) / math.sqrt(len(off))
    size = torch.stack([cut.scaled(a).square().sum() / a.square().sum() for a in x])
    assert abs(float(size.mean()) - 1) < 0.02


@pytest.mark.parametrize("shape", [(64, 784), (128, 64, 3, 3), (1000, 55), (128, 77, 13)])
def test_a_slice_takes_as_much_of_every_column(shape: tuple[int, ...]) -> None:
    """Law: a stride without a factor in common visits all columns alike."""
    cut = choose([[torch.Size(shape)]], 1 / 20, SliceSettings())[0]
    assert cut.stride > 1
    columns = math.prod(shape[1:])
    places = cut.take(torch.arange(math.prod(shape))) % columns
    counts = places.bincount(minlength=columns)
    assert int(counts.max() - counts.min()) <= 1


def test_how_many_are_kept() -> None:
    """At least the share, so many in all, and of each tensor where they are tuned apart."""
    shapes = [torch.Size((500, 100)), torch.Size((500,))]
    kept = [choose([shapes], share, SliceSettings())[0].stride for share in (1.0, 0.5, 1 / 20)]
    assert kept == [1, 1, 11]  # 2 would keep the same columns; 50,500 / 4,096 is 12
    assert choose([shapes], 1 / 20, SliceSettings(), by_tensor=True)[0].stride == 11
    assert choose([[*shapes, torch.Size((32,))]], 1 / 20, SliceSettings(), by_tensor=True) == [
        Slice(1)
    ]
    assert choose([shapes[1:]], 1 / 20, SliceSettings()) == [Slice(1)]  # few weights in all


class Quiet:
    """A run of 40 steps whose hyperparameters stay, so that any two are of the same weights."""

    def __init__(self, shell: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 1))
        extra = {"momentum": 0.9} if shell == "SGD" else {}
        self.opt = getattr(st, shell)(
            self.net, lr=1e-2, weight_decay=1e-2, probe=False, settings=FEW, **extra, **options
        )
        for _ in range(40):
            self.opt.zero_grad()
            self.net(torch.randn(20, 6)).square().mean().backward()
            self.opt.step()

    def rows(self) -> dict[str, Tensor]:
        """What is kept of every sensitivity, all parameters joined."""
        params = list(self.net.parameters())
        keys = [k for k in self.opt.state[params[0]] if k.split("/")[0] in
                ("sensitivity", "recent", "tangent", "centre", "mark")]  # fmt: skip
        return {k: torch.cat([self.opt.state[p][k].reshape(-1) for p in params]) for k in keys}


@pytest.mark.parametrize("shell", ["AdamW", "SGD", "RMSprop"])
def test_what_is_kept_is_exact(shell: str) -> None:
    """Twin: the same run with all sensitivities; by a kernel (AdamW, SGD) and pure (RMSprop)."""
    whole, part = Quiet(shell, tangents=1.0), Quiet(shell, tangents=1 / 7)
    found, rows = part.rows(), whole.rows()
    assert rows.keys() == found.keys()
    assert len(rows) > 4
    for key, row in rows.items():
        kept = Slice(7).take(row)
        kept = kept * math.sqrt(7) if key in ("centre", "mark") else kept
        torch.testing.assert_close(found[key], kept, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tangents", [0.0, -1, 1.5, math.nan, "all", torch.int8])
def test_a_share_outside_its_range_is_refused(tangents: Any) -> None:
    for make in (
        lambda: st.AdamW(nn.Linear(2, 1), tangents=tangents),
        lambda: st.Tuner(nn.Linear(2, 1), nn.functional.mse_loss, tangents=tangents),
    ):
        with pytest.raises((TypeError, ValueError), match="tangents="):
            make()


def test_what_needs_all_weights_is_named() -> None:
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"tangents=0.5: estimator=Forward.* leave tangents out"):
        st.AdamW(net, tangents=0.5, estimator=st.Forward())
    st.AdamW(net, tangents=1.0, estimator=st.Forward())
    st.AdamW(net, estimator=st.Forward())


def test_a_state_of_another_slice_is_refused_and_changes_nothing() -> None:
    one, other = Quiet("AdamW", tangents=1 / 7), Quiet("AdamW", tangents=1.0)
    before = [p.detach().clone() for p in other.net.parameters()]
    rows = {k: v.clone() for k, v in other.rows().items()}
    with pytest.raises(ValueError, match="tangents"):
        other.opt.load_state_dict(one.opt.state_dict())
    for now, then in itertools.chain(
        zip(other.net.parameters(), before, strict=True),
        zip(other.rows().values(), rows.values(), strict=True),
    ):
        assert torch.equal(now, then)


def test_a_run_of_slices_is_continued_bit_for_bit() -> None:
    """Twin: a run that was not stopped, hyperparameter steps included."""

    def train(net: nn.Module, opt: st.AdamW, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            opt.zero_grad()
            net(torch.randn(20, 6)).square().mean().backward()
            opt.step()
            opt.hyper_step(lambda: net(torch.ones(3, 6)).square().mean())

    def made() -> tuple[nn.Module, st.AdamW]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 1))
        options: dict[str, Any] = dict(tangents=1 / 7, settings=FEW, snapshots="bf16", probe=8)
        return net, st.AdamW(net, total_steps=90, **options)

    (net, opt), (half, stopped) = made(), made()
    train(net, opt, range(60))
    train(half, stopped, range(5))  # within the sweep, whose start is kept
    for first, last in ((5, 31), (31, 60)):
        again, resumed = made()
        again.load_state_dict(half.state_dict())
        resumed.load_state_dict(stopped.state_dict())
        train(again, resumed, range(first, last))
        half, stopped = again, resumed
    for one, two in zip(net.parameters(), half.parameters(), strict=True):
        assert torch.equal(one, two)
    assert opt.hparams == stopped.hparams
