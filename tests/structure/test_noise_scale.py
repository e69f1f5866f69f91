"""The noise scale and batches that follow it. Truths: closed forms, and gradients one by one."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from selftune.structure import Batches, NoiseScale, step_overhead


@pytest.mark.parametrize(("small", "big"), [(1, 2), (4, 32), (16, 24)])
@pytest.mark.parametrize(("signal", "noise"), [(1.0, 6.0), (0.3, 100.0), (2.0, 0.0)])
def test_expected_norms_give_the_noise_scale(
    small: int, big: int, signal: float, noise: float
) -> None:
    """Closed form: E ‖g_b‖² = ‖G‖² + tr Σ / b."""
    scale = NoiseScale()
    for _ in range(3):
        scale.observe(signal + noise / small, signal + noise / big, small, big)
    assert scale.value == pytest.approx(noise / signal, rel=1e-12, abs=1e-12)


def test_gaussian_gradients() -> None:
    """Closed form: g ~ N(μ, σ² I) in d dimensions has B = d σ² / ‖μ‖²."""
    torch.manual_seed(0)
    mean, spread, steps = torch.randn(20), 3.0, 4000
    scale = NoiseScale(memory=1e9)
    for _ in range(steps):
        parts = mean + spread * torch.randn(4, 8, 20)
        small = parts.mean(1).square().sum(1).mean()
        scale.observe(small, parts.mean((0, 1)).square().sum(), 8, 32)
    want = 20 * spread**2 / float(mean.square().sum())
    assert scale.value == pytest.approx(want, rel=0.03)  # of 4,000 steps


def parts_of_a_step(k: int, per_part: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(k * per_part, 4).double(), torch.randn(k * per_part, 2).double()
    return model, list(zip(x.split(per_part), y.split(per_part), strict=True))


@pytest.mark.parametrize("k", [2, 5])
def test_accumulated_micro_batches(k: int) -> None:
    """Truth: norms of gradients that are taken one micro-batch at a time, and of their mean."""
    model, parts = parts_of_a_step(k, 3)
    params = list(model.parameters())

    def flat(x: Tensor, y: Tensor) -> Tensor:
        grads = torch.autograd.grad(F.mse_loss(model(x), y), params)
        return torch.cat([g.flatten() for g in grads])

    alone = torch.stack([flat(x, y) for x, y in parts])
    want = NoiseScale()
    want.observe(alone.square().sum(1).mean(), alone.mean(0).square().sum(), 3, 3 * k)
    got = NoiseScale()
    for x, y in parts:
        (F.mse_loss(model(x), y) / k).backward()
        got.micro_batch(model.parameters())
    got.whole_batch(3 * k)
    assert got.value == pytest.approx(want.value, rel=1e-9)
    assert all(p.grad is not None for p in params)


def test_values_without_an_estimate() -> None:
    scale = NoiseScale()
    assert math.isnan(scale.value)
    scale.observe(math.nan, 1.0, 1, 2)  # a step whose loss exploded
    assert math.isnan(scale.value)
    scale.observe(4.0, 1.0, 1, 4)  # noise alone: the norm falls as 1/b
    assert scale.value == math.inf


def test_calls_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="small_size=4 and big_size=4"):
        NoiseScale().observe(1.0, 1.0, 4, 4)
    with pytest.raises(ValueError, match="memory=0"):
        NoiseScale(memory=0)
    model, parts = parts_of_a_step(3, 2)
    scale = NoiseScale()
    for x, y in parts:
        F.mse_loss(model(x), y).backward()
        scale.micro_batch(model.parameters())
    with pytest.raises(ValueError, match="7 examples in 3 micro-batches"):
        scale.whole_batch(7)
    with pytest.raises(ValueError, match="in 0 micro-batches"):
        scale.whole_batch(6)
    words = nn.Embedding(5, 3, sparse=True)
    words(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse gradients.* pass sparse=False"):
        NoiseScale().micro_batch(words.parameters())


# Batches


def tell(batches: Batches, noise: float) -> None:
    """An estimate of the noise scale, without those before it."""
    batches.scale = NoiseScale()
    batches.scale.observe(1 + noise / 4, 1 + noise / 8, 4, 8)


def test_every_example_comes_once_an_epoch_in_another_order() -> None:
    """Law: an epoch is a permutation."""
    data = TensorDataset(torch.arange(100.0))
    batches = Batches(data, start=8)
    loader = DataLoader(data, batch_sampler=batches)
    epochs = [torch.cat([x for (x,) in loader]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(100))
    assert epochs[0] != epochs[1]
    assert len(batches) == len(list(batches)) == 13
    last = Batches(data, start=8, drop_last=True)
    assert [len(b) for b in last] == [8] * 12 == [8] * len(last)


def test_sizes_follow_the_noise_scale() -> None:
    """By hand: doubled at most, to the nearest power of two, within bounds."""
    batches = Batches(range(10_000), start=16, most=128, least=4)
    sizes = []
    for noise in (None, 40.0, 40.0, 1e6, 1e6, 1e6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0):
        if noise is not None:
            tell(batches, noise)
        next(iter(batches))
        sizes.append(batches.size)
    assert sizes == [16, 32, 32, 64, 128, 128, 64, 32, 16, 8, 4, 4]


@pytest.mark.parametrize(
    ("count", "drop_last"), [(48, False), (48, True), (51, True), (60, True), (70, True)]
)
def test_consecutive_batches_differ_by_a_factor_of_two(count: int, drop_last: bool) -> None:
    """Across epochs that end where the size changes, and from an odd size down."""
    batches = Batches(range(count), start=16, most=512, interval=3, drop_last=drop_last)
    sizes: list[int] = []
    for _ in range(3):
        for _ in batches:
            sizes.append(batches.size)
            if len(sizes) == 3:
                tell(batches, 1e6)
    assert all(a <= b <= 2 * a for a, b in itertools.pairwise(sizes))
    assert sizes[-1] > 16
    odd = Batches(range(100), start=5, least=1)
    tell(odd, 0.0)
    assert [len(next(iter(odd))) for _ in range(4)] == [3, 2, 1, 1]


def test_a_size_is_kept_during_an_epoch_without_an_interval() -> None:
    batches = Batches(range(1000), start=10, most=40, interval=None)
    epoch = iter(batches)
    next(epoch)
    tell(batches, 1e6)
    assert {len(b) for b in epoch} == {10}
    assert len(batches) == 100


@pytest.mark.parametrize("drop_last", [False, True])
def test_sizes_change_within_an_epoch(drop_last: bool) -> None:
    """Law: each example at most once; sizes by hand."""
    batches = Batches(range(105), start=8, most=32, interval=3, drop_last=drop_last)
    tell(batches, 1e6)
    epoch = list(batches)
    sizes = [16] * 3 + [32] if drop_last else [16] * 3 + [32, 25]
    assert [len(b) for b in epoch] == sizes
    drawn = [i for batch in epoch for i in batch]
    assert len(set(drawn)) == len(drawn) == sum(sizes)


@pytest.mark.parametrize("noise", [3.0, 40.0, 700.0])
@pytest.mark.parametrize("overhead", [20.0, 130.0])
def test_the_size_minimises_the_time_to_a_target(noise: float, overhead: float) -> None:
    """Truth: steps ∝ 1 + N / B times seconds ∝ overhead + B, at every power of two."""
    batches = Batches(range(10_000), start=64, least=1, most=1024, overhead=overhead)
    for _ in range(8):
        tell(batches, noise)
        next(iter(batches))
    times = {b: (1 + noise / b) * (overhead + b) for b in (2**k for k in range(11))}
    assert batches.size == min(times, key=times.__getitem__)


def test_the_overhead_of_a_step_is_found_from_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed form: 3 s + 0.02 s an example, and a stray slow step; then no time an example."""
    now, each, count = 0.0, 0.02, 0

    def step(size: int) -> None:
        nonlocal now, count
        count += 1
        now += 3.0 + each * size + (100.0 if count == 7 else 0.0)

    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert step_overhead(step) == pytest.approx(150.0)
    each = 0.0
    assert step_overhead(step, 2, 4) == float("inf")


def test_batches_are_no_larger_than_the_data() -> None:
    batches = Batches(range(50), start=32, most=1024)
    for _ in range(4):
        tell(batches, 1e6)
        assert max(len(b) for b in batches) <= 50


def test_a_saved_state_goes_on_with_the_same_batches() -> None:
    """Truth: the batches of the run that was not interrupted."""
    one = Batches(range(64), start=4, most=32, seed=3)
    list(one)
    tell(one, 9.0)
    list(one)
    other = Batches(range(64), start=4, most=32, seed=3)
    other.load_state_dict(one.state_dict())
    assert list(one) == list(other)
    assert one.size == other.size == 8
    with pytest.raises(ValueError, match="batches of 8 examples"):
        Batches(range(64), start=2, most=4).load_state_dict(one.state_dict())


def test_data_and_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="start=64, most=32"):
        Batches(range(10), start=64, most=32)
    with pytest.raises(ValueError, match="interval=0"):
        Batches(range(10), 4, 8, interval=0)
    with pytest.raises(ValueError, match="overhead=nan"):
        Batches(range(10), 4, 8, overhead=float("nan"))
    with pytest.raises(ValueError, match="small=8 must be less than large=8"):
        step_overhead(lambda size: None, 8, 8)
    with pytest.raises(ValueError, match="is empty"):
        Batches([])
    with pytest.raises(ValueError, match="has no length"):
        Batches(iter([1, 2]))  # type: ignore[arg-type]


def test_sizes_and_noise_scales_are_logged() -> None:
    """Count: at the start of each epoch, by batches taken before it."""
    rows: list[tuple[int, dict[str, float]]] = []
    batches = Batches(
        range(128), start=16, most=64, recorder=lambda v, s: rows.append((s, dict(v)))
    )
    list(batches)
    batches.scale.observe(1 + 60 / 16, 1 + 60 / 32, 16, 32)  # a noise scale of 60
    list(batches)
    assert [(s, v["structure/batch_size"]) for s, v in rows] == [(0, 16.0), (8, 32.0)]
    assert rows[1][1]["structure/noise_scale"] == pytest.approx(60.0)
