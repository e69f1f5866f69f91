"""Verdicts and agreement. Truths: courses made to order, arithmetic by hand."""

import math

import pytest
import torch

from selftune.monitor import Agreement, judge
from selftune.monitor.verdicts import KINDS

FREE = (-9.0, 9.0)


def noise(count: int, size: float) -> list[float]:
    return (torch.randn(count, generator=torch.Generator().manual_seed(0)) * size).tolist()


@pytest.mark.parametrize(
    ("kind", "raw", "snr"),
    [
        ("settled", [1.0] * 100, 0.1),
        ("settled", [1.0 + 0.001 * x for x in noise(100, 1.0)], 0.9),
        ("moving", [0.02 * i for i in range(100)], 0.9),
        ("moving", [-0.02 * i for i in range(100)], math.nan),
        ("noise", noise(200, 0.3), 0.2),
        ("at bound", [max(-9.0, -0.2 * i) for i in range(100)], 0.9),
        ("at bound", [8.99] * 100, 0.9),
        ("settled", [], math.nan),
    ],
)
def test_courses_are_judged(kind: str, raw: list[float], snr: float) -> None:
    verdict = judge("lr", raw, snr, FREE, 0.1)
    assert verdict.kind == kind
    assert KINDS[verdict.code] == kind
    assert verdict.sentence.startswith("lr ")


def test_only_the_last_fifth_counts() -> None:
    raw = [0.1 * i for i in range(80)] + [8.0] * 20
    assert judge("lr", raw, 0.9, FREE, 0.1).kind == "settled"


@pytest.mark.parametrize(
    ("name", "end", "told"),
    [
        ("weight_decay", -9.0, "underfits"),
        ("dropout", 9.0, "over-fits"),
        ("lr", -9.0, "stand still"),
        ("momentum", 9.0, "longer memory"),
    ],
)
def test_a_bound_is_explained(name: str, end: float, told: str) -> None:
    role = {"lr": "rate", "beta1": "momentum"}.get(name, name)
    assert told in judge(name, [end] * 50, 0.9, FREE, 0.5, role=role).sentence


def test_what_starts_at_a_bound_and_leaves_it_is_not_at_bound() -> None:
    assert judge("beta1", [9.0] * 50, 0.9, FREE, 0.9, slope=1.0).kind == "settled"
    assert judge("beta1", [9.0] * 50, 0.9, FREE, 0.9, slope=-1.0).kind == "at bound"
    assert judge("beta1", [-9.0] * 50, 0.9, FREE, 0.9, slope=-1.0).kind == "settled"


def test_agreement_by_hand() -> None:
    """Closed form: p = Σ g Δz, r = Δloss, and the cosine of both over looks."""
    agreement = Agreement()
    assert agreement.look([1.0, 2.0], [0.0, 0.0], 5.0) == []
    rows = dict(agreement.look([1.0, -2.0], [0.5, 0.25], 4.0))
    assert rows["response/predicted"] == pytest.approx(0.5 - 0.5)
    assert rows["response/realised"] == pytest.approx(-1.0)
    assert "response/agreement" not in rows
    rows = dict(agreement.look([2.0, 0.0], [0.0, 0.25], 3.0))
    assert rows["response/predicted"] == pytest.approx(-1.0)
    assert rows["response/agreement"] == pytest.approx(1.0 / math.sqrt(1.0 * 2.0))
    assert "response/agreement" in dict(agreement.look([1.0, 1.0], [math.nan, 0.0], 3.0))
