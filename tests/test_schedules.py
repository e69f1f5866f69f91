"""Schedules. Truths: torch.optim.lr_scheduler, and derivatives in closed form."""

import pytest
import torch
from torch.optim import lr_scheduler

from selftune.schedules import SHAPES, Schedule, inverse_time

TOTAL = 40
Maker = type[lr_scheduler.LRScheduler]
TWINS: dict[str, tuple[Maker, dict[str, float]]] = {
    "constant": (lr_scheduler.ConstantLR, dict(factor=1.0)),
    "linear": (lr_scheduler.LinearLR, dict(start_factor=1.0, end_factor=0.0)),
    "cosine": (lr_scheduler.CosineAnnealingLR, dict(eta_min=0.0)),
    "exponential": (lr_scheduler.ExponentialLR, dict()),
}


def twin_rates(shape: str, warmup: int) -> list[float]:
    """Rates of torch's schedulers: linear warm-up until the peak, then the shape."""
    if shape == "wsd":
        return stable_then_decay(warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    make, options = TWINS[shape]
    length = TOTAL - warmup
    key = {"cosine": "T_max", "linear": "total_iters", "constant": "total_iters"}.get(shape)
    twin = make(
        optimizer,
        **({"gamma": 0.001 ** (1 / length)} if key is None else {key: length, **options}),
    )
    rates = []
    for _ in range(length + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        twin.step()
    if not warmup:
        return rates
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    climb = []
    for _ in range(warmup):
        climb.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rise.step()
    return climb + rates


def stable_then_decay(warmup: int) -> list[float]:
    """A climb, a plateau and LinearLR's last 30 %."""
    length = TOTAL - warmup
    climb = [(t + 1) / warmup for t in range(warmup)]
    return climb + [min(1.0, (length - t) / (0.3 * length)) for t in range(length + 1)]


@pytest.mark.parametrize("warmup", [0, 2, 10])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch_scheduler(shape: str, warmup: int) -> None:
    schedule = Schedule(shape=shape, total_steps=TOTAL, warmup_steps=warmup)
    want = twin_rates(shape, warmup)
    assert len(want) == TOTAL + 1
    # torch's recursions round at every step
    assert [schedule(t) for t in range(TOTAL + 1)] == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_past_the_horizon_it_stays(shape: str) -> None:
    """Law: the last value is held, never beyond it (a cosine would rise again)."""
    schedule = Schedule(shape=shape, total_steps=TOTAL)
    assert schedule(TOTAL + 7) == schedule(TOTAL)


@pytest.mark.parametrize(("total", "shape"), [(None, "constant"), (100, "linear")])
def test_the_shape_follows_from_the_horizon(total: int | None, shape: str) -> None:
    """Truth: the explicit choice."""
    ours, named = Schedule(total_steps=total), Schedule(shape=shape, total_steps=total)
    assert ours == named
    assert [ours(t) for t in (0, 50, 100)] == ([1.0] * 3 if total is None else [1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        (dict(shape="triangle", total_steps=5), "schedule='triangle'"),
        (dict(shape="cosine"), "total_steps="),
        (dict(total_steps=0), "total_steps=0"),
        (dict(total_steps=10, warmup_steps=10), "warmup_steps=10"),
        (dict(warmup_steps=-1), "warmup_steps=-1"),
    ],
)
def test_wrong_arguments_are_named(options: dict, argument: str) -> None:
    """Law: a ValueError that names the argument."""
    with pytest.raises(ValueError, match=argument):
        Schedule(**options)


@pytest.mark.parametrize("step", [0, 1, 17])
def test_inverse_time_and_its_derivative(step: int) -> None:
    """Closed forms: 1/(1 + αt) and −t/(1 + αt)²; a number and a tensor agree."""
    decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    factor = inverse_time(decay, step)
    (slope,) = torch.autograd.grad(factor, decay)
    assert float(factor.detach()) == pytest.approx(1 / (1 + 0.3 * step), rel=1e-14)
    assert float(slope) == pytest.approx(-step / (1 + 0.3 * step) ** 2, rel=1e-14)
    assert inverse_time(0.3, step) == pytest.approx(float(factor.detach()), rel=1e-14)
