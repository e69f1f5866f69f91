"""Verdicts and agreement. Truths: courses made to order, arithmetic by hand."""

import math

import pytest
import torch

from selftune.monitor import Agreement, Ends, judge
from selftune.monitor.verdicts import KINDS

FREE = Ends(-9.0, 9.0)


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
        ("moving", [0.0] * 60 + [0.015 * i + 0.08 * (-1) ** i for i in range(60)], 0.6),
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
        ("dropout", 9.0, "overfits"),
        ("lr", -9.0, "lower rate"),
        ("momentum", 9.0, "longer averaging window"),
    ],
)
def test_a_bound_is_explained(name: str, end: float, told: str) -> None:
    role = {"lr": "rate", "beta1": "momentum"}.get(name, name)
    assert told in judge(name, [end] * 50, 0.9, FREE, 0.5, role=role).sentence


def test_what_starts_at_a_bound_and_leaves_it_is_not_at_bound() -> None:
    assert judge("beta1", [9.0] * 50, 0.9, FREE, 0.9, slope=1.0).kind == "settled"
    assert judge("beta1", [9.0] * 50, 0.9, FREE, 0.9, slope=-1.0).kind == "at bound"
    assert judge("beta1", [9.0] * 50, 0.9, FREE, 0.9, slope=0.0).kind == "settled"  # not tuned yet
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


def test_sentences_do_not_contradict_the_course() -> None:
    """By hand: what it says of the end beside where the run began."""
    up_then_down = [0.05 * i for i in range(80)] + [4.0 - 0.02 * i for i in range(20)]
    fell = judge("lr", up_then_down, 0.9, FREE, math.exp(up_then_down[-1]))
    assert (fell.kind, "still" in fell.sentence) == ("moving", False)
    assert f"fell at the end, from {math.exp(4.0):.3g} to {math.exp(3.62):.3g}" in fell.sentence
    floored = judge("weight_decay", [0.05 * i for i in range(40)], 0.9, Ends(1.95, 9.0, True), 7.0)
    assert floored.kind == "at bound"
    assert "lies on its floor 7" in floored.sentence
    doubled = [0.0] * 60 + [0.035 * i for i in range(20)] + [0.7] * 20
    late = judge("dropout", doubled, 0.6, FREE, math.exp(0.7))
    assert late.kind == "settled"
    assert "went from 1.28 to 2.01 in the last third" in late.sentence


def test_short_runs_are_judged_by_their_last_fifth() -> None:
    """By hand: thirty steps, of which the last nine are constant."""
    raw = [0.1 * i for i in range(21)] + [2.0] * 9
    assert judge("lr", raw, 0.9, FREE, 7.4).kind == "settled"
    assert judge("lr", raw[:21], 0.9, FREE, 7.4).kind == "moving"


def test_a_rewind_is_no_advice() -> None:
    """By hand: a rate that a rewind has divided by 3 has not been tuned to where it is."""
    raw = [1.0] * 26 + [1.0 - math.log(3.0)] * 4
    sentence = judge("lr", raw, 0.9, FREE, math.e / 3, role="rate").sentence
    assert sentence == "lr fell at the end, from 2.72 to 0.906, with a rewind"
