"""Wrong calls over the whole public face. Truth: a list of values that cannot be."""

import inspect

import pytest

import selftune as st
from benchmarks.reliability.calls import FIT, OPTIONS, TUNER, TUNING, calls
from benchmarks.reliability.parts import PARTS

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
    for name, (part, wrong) in PARTS.items():
        missing = arguments(part) - wrong.keys()
        assert missing <= LEFT_OUT.get(name, set()), name


LEFT_OUT = {
    "Goal": {"example"}, "prune": {"example"},  # any object
    "select": {"candidates", "train", "val"}, "Candidate": {"train", "val"},
    "TensorBoard": {"about"}, "Mixture": {"params"}, "TunedSchedule": {"format"},
    "Schedule": {"shape"},  # the drivers' argument, schedule
}  # fmt: skip
for _policy in ("GuardPolicy", "SweepSettings", "HyperSettings"):  # checked by one base class
    LEFT_OUT[_policy] = arguments(dict(PARTS)[_policy][0])
