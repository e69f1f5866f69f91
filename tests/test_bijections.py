"""Bijections. Truths: round trips, autograd of ``forward``, monotonicity, no NaN anywhere."""

import pytest
import torch

from selftune.bijections import AbstractBijection, Identity, Log, Logit, Memory, Softplus

ALL = [Identity(), Log(), Logit(), Memory(), Softplus()]
# The range in which float64 still tells values apart (1 − 1e-16 is 1 for the logit).
RANGES = [(-1e6, 1e6), (-300.0, 300.0), (-300.0, 15.0), (0.0, 15.0), (-300.0, 1e6)]


def name(thing: object) -> str:
    return type(thing).__name__


@pytest.mark.parametrize(("bijection", "ends"), list(zip(ALL, RANGES, strict=True)), ids=name)
def test_round_trip(bijection: AbstractBijection, ends: tuple[float, float]) -> None:
    """Law: inverse(forward(raw)) = raw and forward(inverse(value)) = value."""
    raw = torch.linspace(*ends, 1001, dtype=torch.float64)
    value = bijection.forward(raw)
    # Near 1 the logit loses the digits that 1 − value has lost: 1e-16 · e^15 = 3e-10.
    torch.testing.assert_close(bijection.inverse(value), raw, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        bijection.forward(bijection.inverse(value)), value, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("bijection", ALL, ids=name)
def test_slope_is_the_derivative(bijection: AbstractBijection) -> None:
    """Truth: autograd of ``forward``, from tiny values to large ones."""
    raw = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    value = bijection.forward(raw)
    (want,) = torch.autograd.grad(value.sum(), raw)
    # 1 − value is exact to 1e-16 at best, which bounds the logit's slope near 1; torch takes
    # softplus as linear from 20 on, where its slope is 1 − e⁻²⁰ = 1 − 2e-9.
    torch.testing.assert_close(bijection.slope(value.detach()), want, rtol=3e-9, atol=1e-16)


@pytest.mark.parametrize("bijection", ALL, ids=name)
def test_increasing(bijection: AbstractBijection) -> None:
    """Law: a larger raw value gives a larger value."""
    raw = torch.linspace(-20, 20, 401, dtype=torch.float64)
    assert (bijection.forward(raw).diff() > 0).all()


@pytest.mark.parametrize("bijection", ALL, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_nan_at_extremes(bijection: AbstractBijection, dtype: torch.dtype) -> None:
    """Law: values of far raw values stay in the closed range, and nothing becomes NaN."""
    raw = torch.tensor([-torch.inf, -1e30, -1e3, -89.0, 0, 89.0, 1e3, 1e30, torch.inf], dtype=dtype)
    value = bijection.forward(raw)
    assert value.dtype == dtype
    for result in (value, bijection.slope(value), bijection.inverse(value)):
        assert not result.isnan().any()
    if not isinstance(bijection, (Identity, Memory)):
        assert (value >= 0).all()
    if isinstance(bijection, (Logit, Memory)):
        assert (value <= 1).all()


@pytest.mark.parametrize(
    ("bijection", "raw", "value"),
    [
        (Identity(), -2.0, -2.0),
        (Log(), -2.0, 0.1353352832366127),
        (Logit(), 2.0, 0.8807970779778823),
        (Memory(), 2.0, 0.8646647167633873),
        (Softplus(), 2.0, 2.1269280110429727),
    ],
    ids=name,
)
def test_values_in_closed_form(bijection: AbstractBijection, raw: float, value: float) -> None:
    """Truth: e⁻², 1/(1 + e⁻²), 1 − e⁻² and log(1 + e²) from a table."""
    got = bijection.forward(torch.tensor(raw, dtype=torch.float64))
    assert float(got) == pytest.approx(value, rel=1e-15)
