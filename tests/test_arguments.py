"""Wrong calls over the whole public face. Truth: a list of values that cannot be."""

import inspect
from collections.abc import Callable

import pytest

import selftune as st
from benchmarks.reliability.calls import FIT, OPTIONS, TUNER, TUNING, calls
from selftune import search

CALLS = list(calls())
FACES = list(dict.fromkeys(c.face for c in CALLS))


@pytest.mark.parametrize("face", FACES)
def test_every_wrong_call_is_refused_by_the_name_of_its_argument(face: str) -> None:
    verdicts = {str(c): c.verdict() for c in CALLS if c.face == face}
    assert not {call: verdict for call, verdict in verdicts.items() if verdict}


def test_there_are_enough_of_them() -> None:
    assert len(CALLS) >= 500


def arguments(function: object) -> set[str]:
    found = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {p.name for p in found if p.kind is not p.VAR_KEYWORD} - {"self"}


def test_no_argument_is_left_out() -> None:
    """Law: what a signature names, the list has."""
    for shell in (st.SGD, st.Adam, st.AdamW, st.RMSprop, st.Lion, st.Muon):
        assert arguments(shell) - {"params"} <= OPTIONS.keys()
    assert arguments(st.optim.TuningOptions) <= TUNING.keys()
    assert arguments(st.Tuner) <= TUNER.keys()
    assert arguments(st.Tuner.fit) <= FIT.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trials", 0), ("trials", 2.5), ("epochs", -1), ("steps", "5"), ("metric", 3),
        ("maximize", "yes"), ("timeout", -1.0), ("timeout", float("nan")), ("workers", 0),
        ("memory", "folder"), ("patience", 0), ("tuner", 3), ("fit", "fast"), ("seed", 0.5),
        ("force", None), ("progress", "no"), ("trust_storage", 1), ("study", 3), ("log_dir", 3),
        ("warm_start", "no"), ("loss_fn", "mse"),
    ],
)  # fmt: skip
def test_arguments_of_a_search(name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}="):
        search.select(lambda space: 1.0, **{"progress": False, name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: st.penalties.L1(-1.0), "strength=-1.0"),
        (lambda: st.penalties.L2(float("nan")), "strength=nan"),
        (lambda: st.estimators.OneStep(stride=0), "stride=0"),
        (lambda: st.linear_solve.CG(iterations=-1), "iterations=-1"),
        (lambda: st.linear_solve.Neumann(terms=0), "terms=0"),
        (lambda: st.linear_solve.Neumann(scale=float("nan")), "scale=nan"),
        (lambda: st.linear_solve.Nystrom(rank=0), "rank=0"),
    ],
)
def test_settings_of_parts_are_checked_where_they_are_made(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()
