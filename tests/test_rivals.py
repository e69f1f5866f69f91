"""Rivals of the proof at fixed hyperparameters. Truths: torch's own loops, first steps by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.proof import comparison, rendering
from benchmarks.proof.annealed import ANNEALED, CALIBRATED, Nadam, muon, nadamw
from benchmarks.proof.contenders import METHODS, WARM_UP, cosine
from benchmarks.proof.searches import FAMILIES, LION, MUON, RUNNERS
from benchmarks.proof.training import Record, train
from benchmarks.quality.nadamw import CONFIGS, table
from benchmarks.workloads import Workload, digits, small_cnn

STEPS = 60
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has Muon")
OTHERS = [n for n in ANNEALED if n.startswith(("lion", "ademamix"))]
"""Of the package pytorch_optimizer, in the extra bench."""


@pytest.fixture
def short() -> Workload:
    return replace(digits(), name="short", steps=STEPS)


def record(method: str, val: float, seed: int = 0, curve: tuple = (), gradients: int = 1) -> Record:
    own = {"val": val, "test": val}
    return Record("w", method, seed, own, own, list(curve), gradients, seconds=1.0)


def test_nadamw_is_torchs_nadam_at_rates_set_by_hand(short: Workload) -> None:
    """A loop of torch's optimizer: rates 1/3, 2/3, 1 times the peak, then half a cosine."""
    config = Nadam(lr=3e-3, beta1=0.8, weight_decay=0.3)
    found = train(short, "", nadamw(config), seed=2)
    rise = 3  # 5 % of 60 steps
    rates = [1 / 3, 2 / 3, 1.0]
    rates += [0.5 + 0.5 * math.cos(math.pi * k / (STEPS - rise)) for k in range(STEPS - rise)]
    model = short.model(2)
    opt = torch.optim.NAdam(
        model.parameters(), lr=3e-3, betas=(0.8, 0.999), weight_decay=0.3,
        decoupled_weight_decay=True,
    )  # fmt: skip
    batches = short.batches("train", 2)
    for rate in rates:
        opt.param_groups[0]["lr"] = 3e-3 * rate
        opt.zero_grad()
        short.loss(model, next(batches)).backward()
        opt.step()
    last = short.evaluate(model, "val")
    assert found.own["val"] == pytest.approx(min(last, found.average["val"]), rel=1e-5)


@pytest.mark.parametrize(
    "method", [pytest.param(n, marks=needs_muon) if "muon" in n else n for n in ANNEALED]
)
def test_a_rival_takes_steps_until_its_rate_is_0(short: Workload, method: str) -> None:
    """Laws: every weight moves at the first step; after the last one no step would change any."""
    if method in OTHERS:
        pytest.importorskip("pytorch_optimizer", reason="needs the extra bench")
    model = short.model(0)
    before = [p.detach().clone() for p in model.parameters()]
    contender = ANNEALED[method](short, model, 0)
    batches = short.batches("train", 0)
    contender.step(next(batches))
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for _ in range(STEPS - 1):
        contender.step(next(batches))
    assert contender.gradients == STEPS
    ended = [p.detach().clone() for p in model.parameters()]
    contender.step(next(batches))
    for p, b in zip(model.parameters(), ended, strict=True):
        torch.testing.assert_close(p, b, rtol=0, atol=1e-12)


def first_step(short: Workload, method: str) -> list[tuple[torch.Tensor, ...]]:
    """Weight, gradient and next weight of every parameter."""
    pytest.importorskip("pytorch_optimizer", reason="needs the extra bench")
    model = short.model(1)
    batch = next(short.batches("train", 1))
    grads = torch.autograd.grad(short.loss(model, batch), list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    ANNEALED[method](short, model, 1).step(batch)
    return list(zip(before, grads, model.parameters(), strict=True))


def test_lion_moves_by_the_sign_of_the_gradient(short: Workload) -> None:
    """The paper's update at zero momentum: w (1 − η λ) − η sign(g), with λ = 0.1."""
    for w, g, new in first_step(short, "lion 0.001"):
        torch.testing.assert_close(new.detach(), w * (1 - 1e-4) - 1e-3 * g.sign())


def test_ademamix_adds_the_slow_average(short: Workload) -> None:
    """The paper's first step, T = 60: g (1 + α₁ (1 − β₃,₁)) / (|g| + ε) + λ w, at a third of η."""
    fast, slow = math.log(0.9), math.log(0.9999)
    beta3 = math.exp(fast * slow / ((1 - 1 / STEPS) * slow + fast / STEPS))
    scale = 1 + 8 / STEPS * (1 - beta3)
    for w, g, new in first_step(short, "ademamix"):
        expected = w - 1e-3 / 3 * (scale * g / (g.abs() + 1e-8) + 0.1 * w)
        torch.testing.assert_close(new.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1, 10_000])
def test_ali_g_takes_capped_polyak_steps(short: Workload, scale: int) -> None:
    """Two steps by hand: γ = min(0.1, loss / ‖g‖²), v ← 0.9 v − γ g, w ← w + 0.9 v − γ g.

    At the loss's own scale the cap holds, at ten thousand times that the Polyak step is smaller.
    """
    pytest.importorskip("pytorch_optimizer", reason="needs the extra bench")
    short = replace(short, criterion=lambda x, y: scale * nn.functional.cross_entropy(x, y))
    model, twin = short.model(1), short.model(1)
    contender = METHODS["ali-g"](short, model, 1)
    batches = short.batches("train", 1)
    weights = list(twin.parameters())
    memory = [torch.zeros_like(w) for w in weights]
    for _ in range(2):
        batch = next(batches)
        contender.step(batch)
        loss = short.loss(twin, batch)
        grads = torch.autograd.grad(loss, weights)
        square = sum(float(g.square().sum()) for g in grads)
        polyak = loss.item() / (square + 1e-6)
        assert (polyak < 0.1) == (scale > 1)
        rate = min(0.1, polyak)
        with torch.no_grad():
            for w, g, v in zip(weights, grads, memory, strict=True):
                v.mul_(0.9).sub_(rate * g)
                w.add_(0.9 * v - rate * g)
    for new, w in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(new, w)


@needs_muon
def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    """Law: every parameter has one optimizer; torch's Muon has no convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(small_cnn(), nn.Linear(10, 10), nn.Linear(10, 10))
    workload = replace(digits(), steps=STEPS)
    hidden, rest = (
        [p for group in o.param_groups for p in group["params"]]
        for o in muon(1e-2)(workload, model, 0).optimizers  # type: ignore[attr-defined]
    )
    assert hidden
    assert all(p.ndim == 2 for p in hidden)
    assert any(p.ndim == 4 for p in rest)
    assert sorted(map(id, [*hidden, *rest])) == sorted(map(id, model.parameters()))


def test_the_cosine_rises_and_ends_at_0() -> None:
    factor = cosine(100, WARM_UP)
    assert [factor(t) for t in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(5) == 1.0
    assert factor(100) == factor(101) == pytest.approx(0.0, abs=1e-15)
    # A cosine without warm-up is torch's own.
    opt = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 100)
    plain = cosine(100)
    for step in range(100):
        assert plain(step) == pytest.approx(opt.param_groups[0]["lr"])
        opt.step()
        schedule.step()


def test_the_best_of_five_rates_is_compared() -> None:
    """The third rate is best for seed 0, the fourth for seed 1."""
    for family in (LION, MUON):
        members = FAMILIES[family]
        assert len(members) == 5
        assert set(members) <= set(RUNNERS)
        found = [record(m, abs(i - 2 - s), s) for i, m in enumerate(members) for s in (0, 1)]
        best = comparison.by_workload(found)["w"][family]
        assert [r.own["val"] for r in best] == [0.0, 0.0]
        assert [r.gradients for r in best] == [5, 5]


def test_parallel_trials_are_timed_by_the_first_at_the_target() -> None:
    """The target is 2.5, which one of the eleven losses of the pool is below.

    The first trial is there after 50 of its 100 gradients. The second one ends lowest and is there
    at its end, at the cost of all five.
    """
    early, late = [(0.5, 2.0), (1.0, 1.4)], [(0.5, 3.0), (1.0, 1.0)]
    found = [record("random", 1.5 + i, i) for i in range(11)]
    for index, member in enumerate(FAMILIES[LION]):
        curve = {0: early, 1: late}.get(index, [(1.0, 9.0)])
        found.append(record(member, curve[-1][1], 0, tuple(curve), gradients=100))
    found.append(record("default", 1.2, 0, ((1.0, 1.2),), gradients=80))
    tables = comparison.by_workload(found)
    pool = sorted(comparison.losses(tables["w"]["random"]))
    assert pool[len(pool) * comparison.TARGET // 100] == 2.5  # one of eleven is better
    assert comparison.times(tables) == {"default": [80.0], LION: [500.0]}
    assert comparison.times(tables, parallel=True) == {"default": [80.0], LION: [50.0]}
    del tables["w"]["random"]  # no pool, no target
    assert comparison.times(tables) == {}


def test_the_mean_ratio_is_geometric_and_of_finite_losses() -> None:
    """Ratios 1/2 and 1/8 have the mean 1/4; the third is of a run that diverged."""
    found = [
        replace(record(method, val), workload=name)
        for name, vals in {"a": (1.0, 2.0), "b": (1.0, 8.0), "c": (1.0, math.inf)}.items()
        for method, val in zip(("selftune", "default"), vals, strict=True)
    ]
    tables = comparison.by_workload(found)
    assert comparison.mean_ratio(tables, "default") == pytest.approx(0.25)


def test_one_shared_seed_gives_no_verdict() -> None:
    """One workload has three seeds of both, the other one of the rival: ratios 1/2 and 1/8."""
    found = [record(m, v, s) for m, v in (("selftune", 1.0), ("default", 2.0)) for s in range(3)]
    found += [replace(record("selftune", 1.0, s), workload="v") for s in range(3)]
    found.append(replace(record("default", 8.0), workload="v"))
    table = rendering.versus_table(comparison.by_workload(found))
    assert "| default | 1 / 0 / 0 | 1 / 0 / 0 | 0.250 | 0.250 |" in table


def test_the_calibration_ranks_by_the_geometric_mean() -> None:
    """Ratios to the lowest loss: a 1 and 2, b 2 and 1, c 1.2 and 1.2; an unfinished one is out."""
    losses = {
        "w": {"a": 1.0, "b": 2.0, "c": 1.2},
        "v": {"a": 2.0, "b": 1.0, "c": 1.2},
        "u": {"a": 1.0},
    }
    rows = [line.split(" | ") for line in table(losses).splitlines()[2:]]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        ("c", "1.200"), ("a", "1.414"), ("b", "1.414"),
    ]  # fmt: skip
    assert CALIBRATED in CONFIGS.values()
