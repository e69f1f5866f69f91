"""Both drivers on the same job. Truth: each is the other's twin, in float64 to 1e-9.

Differences that remain by design are listed in ``docs/how-it-works.md``; the jobs here have none
of them before the run ends: no dropout, which the tuner turns off in validation passes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

STEPS, LOOKS = 300, (20, 100, 200, 280)
Batch = tuple[Tensor, Tensor]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(4, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Attending(nn.Module):
    """Without biases: the gradient of the keys' is a rounding error, which Adam enlarges."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.body = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)), (6,)),
    "cnn": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
            nn.Linear(6 * 16, 3),
        ),
        (1, 6, 6),
    ),
    "lstm": (Recurrent, (5, 4)),
    "transformer": (Attending, (5, 4)),
}
RULES: dict[str, tuple[Any, dict[str, float]]] = {
    "AdamW": (st.AdamW, dict(lr=1e-3, weight_decay=1e-2)),
    "SGD": (st.SGD, dict(lr=1e-2, momentum=0.9, weight_decay=1e-4)),
}
STARTS = {**RULES, "Muon": (st.Muon, dict(lr=1e-3, weight_decay=0.1))}
# At high rates training is chaotic, and rounding errors of 1e-16 grow to 1 within 100 steps.
BOUNDS = {
    "AdamW": {"lr": (1e-6, 1e-2)}, "SGD": {"lr": (1e-6, 0.1)}, "Muon": {"lr": (1e-6, 1e-2)},
}  # fmt: skip


def job(name: str) -> tuple[nn.Module, list[Batch], Batch]:
    """A model, training batches and a validation batch."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1220, *shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(1220, generator=generator, dtype=torch.float64)
    y = ((x.flatten(1)[:, :3].sum(1) + noise).sign() + 1).long()
    parts = list(zip(x.split(20), y.split(20), strict=True))
    return model, parts[:60], (x[1200:], y[1200:])


def found(model: nn.Module, hparams: dict[str, Any]) -> dict[str, Tensor]:
    values = {f"hparams/{n}": torch.tensor(v, dtype=torch.float64) for n, v in hparams.items()}
    return values | {n: t.detach().clone() for n, t in model.state_dict().items()}


def by_optimizer(
    name: str, rule: str, until: int = LOOKS[-1], **options: Any
) -> dict[int, dict[str, Tensor]]:
    """Hyperparameters and averaged weights at some steps of an optimizer's run."""
    model, train, val = job(name)
    shell, start = STARTS[rule]
    opt = shell(model, total_steps=STEPS, bounds=BOUNDS[rule], **start, **options)
    looks: dict[int, dict[str, Tensor]] = {}
    for step in range(1, until + 1):
        x, y = train[(step - 1) % len(train)]
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.report(loss)  # the tuner sees every training loss
        opt.hyper_step(lambda: F.cross_entropy(model(val[0]), val[1]))
        if step in LOOKS:
            with opt.averaged():
                looks[step] = found(model, opt.hparams)
    return looks


def by_tuner(name: str, rule: str, **options: Any) -> dict[int, dict[str, Tensor]]:
    """The same of a tuner's run."""
    model, train, val = job(name)
    looks: dict[int, dict[str, Tensor]] = {}

    def look(progress: st.tuner.Progress) -> None:
        if progress.step in LOOKS:
            looks[progress.step] = found(model, progress.hparams)

    options = {"tangents": None, **options}
    tuner = st.Tuner(
        model, F.cross_entropy, rule=getattr(st.rules, rule)(), hparams=STARTS[rule][1],
        bounds=BOUNDS[rule], compile=False, **options,
    )  # fmt: skip
    tuner.fit(train, [val], steps=STEPS, evaluate_every=20, callbacks=[look], progress=False)
    return looks


def difference(one: Tensor, other: Tensor) -> float:
    """Relative to the largest entry."""
    scale = other.double().abs().max().clamp_min(1e-12)
    return float((one.double() - other.double()).abs().max() / scale)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in ("mlp", "cnn") else [pytest.mark.slow]) for n in MODELS],
)
def test_both_drivers_follow_the_same_trajectory(name: str, rule: str) -> None:
    one, other = by_optimizer(name, rule), by_tuner(name, rule)
    assert set(other) == set(LOOKS)
    for step in LOOKS:
        assert set(one[step]) == set(other[step])
        off = {key: difference(other[step][key], value) for key, value in one[step].items()}
        # An optimizer first sees BatchNorm's statistics after a training pass; that is forgotten.
        statistics = [off.pop(key) for key in list(off) if "running" in key or "tracked" in key]
        assert step < LOOKS[-1] or max(statistics[:2], default=0.0) < 1e-5
        worst = max(off, key=off.__getitem__)
        assert off[worst] < 1e-9, f"step {step}, {worst}: {off[worst]:.1e} apart"


@pytest.mark.slow
def test_both_drivers_tune_muon_alike() -> None:
    """A group for each kind of parameters, and a part for each parameter; all sensitivities."""
    one = by_optimizer("transformer", "Muon", tangents=1.0, probe=False)
    other = by_tuner("transformer", "Muon", probe=False)
    assert set(other) == set(LOOKS)
    for step in LOOKS:
        off = {}
        for key, value in one[step].items():
            off[key] = difference(other[step][key], value.max() if "hparams" in key else value)
        worst = max(off, key=off.__getitem__)
        assert off[worst] < 1e-9, f"step {step}, {worst}: {off[worst]:.1e} apart"


@pytest.mark.parametrize("rule", RULES)
def test_slices_are_the_same_in_both(rule: str) -> None:
    """Sensitivities of every seventh weight, of a model far below where all would be kept."""
    few = st.method.MethodSettings(slices=st.method.SliceSettings(least=1))
    options = dict(tangents=1 / 7, settings=few, probe=False)
    one, other = by_optimizer("mlp", rule, **options), by_tuner("mlp", rule, **options)
    whole = by_optimizer("mlp", rule, LOOKS[0], probe=False)
    for step in LOOKS:
        off = {key: difference(other[step][key], value) for key, value in one[step].items()}
        assert max(off.values()) < 1e-9, (step, off)
    first = LOOKS[0]
    assert any(one[first][key] != whole[first][key] for key in whole[first] if "hparams" in key)


def test_penalties_and_rate_decay_are_tuned_alike() -> None:
    tune = ("lr", "momentum", "weight_decay", "l1", "decay")
    one = by_optimizer("mlp", "SGD", tune=tune, l1=1e-5, decay=1e-4)
    other_hparams = dict(RULES["SGD"][1], l1=1e-5, decay=1e-4)
    model, train, val = job("mlp")
    looks: dict[int, dict[str, float]] = {}
    tuner = st.Tuner(
        model, F.cross_entropy, rule=st.rules.SGD(), hparams=other_hparams, tune=tune,
        bounds=BOUNDS["SGD"],
        tangents=None, compile=False,
    )  # fmt: skip
    tuner.fit(
        train, [val], steps=STEPS, evaluate_every=20, progress=False,
        callbacks=[lambda p: looks.update({p.step: p.hparams}) and None],
    )  # fmt: skip
    for step in LOOKS:
        for name in tune:
            expected = float(one[step][f"hparams/{name}"])
            assert looks[step][name] == pytest.approx(expected, rel=1e-9), (step, name)
