"""Wrong calls over the whole public face. Truth: a list of values that cannot be."""

import inspect
import math
from collections import UserList
from collections.abc import Callable
from importlib import resources
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import selftune as st
from benchmarks.reliability.calls import FIT, OPTIONS, TUNER, TUNING, calls
from benchmarks.reliability.invalid_values import PARTS
from selftune import search
from selftune.control import GuardPolicy, SweepSettings
from selftune.method import HyperSettings, SliceSettings, StiffSettings

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


SHELLS = (st.SGD, st.Adam, st.AdamW, st.RMSprop, st.Lion, st.Muon)


def test_no_argument_is_left_out() -> None:
    """Law: what a signature names, the list has."""
    for shell in SHELLS:
        assert arguments(shell) - {"params"} <= OPTIONS.keys()
    assert arguments(st.optim.TuningOptions) <= TUNING.keys()
    assert arguments(st.Tuner) <= TUNER.keys()
    assert arguments(st.Tuner.fit) <= FIT.keys()
    for name, (part, wrong) in PARTS.items():
        missing = arguments(part) - wrong.keys()
        assert missing <= LEFT_OUT.get(name, set()), name


def test_options_of_tuning_are_typed() -> None:
    """Law: the types of ``**tuning`` have the names of TuningOptions (and of torch's kernels)."""
    kernels = set(inspect.signature(torch.optim.AdamW).parameters)
    for shell in (*SHELLS, st.Mixture, st.SelfTuning):
        (typed,) = get_type_hints(shell.__init__)["tuning"].__args__
        own = arguments(st.optim.TuningOptions)
        assert own <= typed.__annotations__.keys() <= own | kernels, shell


def test_type_checkers_read_the_package() -> None:
    """Law: PEP 561's marker, without which they take all names of a library for Any."""
    assert resources.files(st).joinpath("py.typed").is_file()


LEFT_OUT = {
    "Goal": {"example"}, "prune": {"example"},  # any object
    "select": {"candidates", "train", "val"}, "Candidate": {"train", "val"},
    "TensorBoard": {"about"}, "Mixture": {"params"}, "TunedSchedule": {"format"},
    "Schedule": {"shape"},  # the drivers' argument, schedule
}  # fmt: skip
for _policy in ("GuardPolicy", "SweepSettings", "HyperSettings"):  # checked by one base class
    LEFT_OUT[_policy] = arguments(dict(PARTS)[_policy][0])


def test_every_argument_of_the_list_exists() -> None:
    """Law: a signature names what the list has, so that no call is refused for another reason."""
    for name, (part, wrong) in PARTS.items():
        assert wrong.keys() <= arguments(part), name


NET = nn.Sequential(st.nn.Dropout(0.3), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
RULES = {"a": st.rules.SGD(), "b": st.rules.AdamW()}
LAYERS = {"a": nn.ReLU(), "b": nn.Tanh()}


@pytest.mark.parametrize(
    "call",
    [
        lambda: st.structure.Batches(range(9), 4, 8, overhead=math.inf),  # of step_overhead
        lambda: search.batch_for(64, 16, 80, noise=math.inf),  # of a noise scale
        lambda: search.batch_for(64, 16e9, 80e9, noise=math.nan),
        lambda: st.structure.NoiseScale(memory=math.inf),
        lambda: st.structure.Choice(nn.Sequential(*LAYERS.values())),
        lambda: st.structure.Choice(LAYERS.values()),
        lambda: st.nn.Dropout(0.5, share=range(1, 2)),
        lambda: st.nn.DropConnect(nn.Linear(2, 2), weights={"weight"}),
        lambda: st.AdamW(NET, tune=UserList(["lr"])),
        lambda: st.muon_groups(NET, {"1": 1}.keys()),
        lambda: st.rules.Mixture(RULES.values()),
        lambda: st.nn.Dropout(torch.tensor(0.5)),
        lambda: st.nn.Dropout(np.float32(0.5)),
        lambda: st.hypernet.convert(NET, {"dropout": torch.tensor(0.2)}),
        lambda: st.structure.Optional(nn.Linear(2, 2), residual=np.True_),
        lambda: st.structure.Gate(np.int64(4)),
    ],
)
def test_values_of_other_types_that_mean_the_same_are_taken(call: Callable[[], object]) -> None:
    call()


def test_python_names_the_function_of_a_missing_argument() -> None:
    with pytest.raises(TypeError, match=r"Gate.*missing 1 required positional argument: 'units'"):
        st.structure.Gate()  # type: ignore[call-arg]


def test_a_single_name_is_offered_in_a_list() -> None:
    with pytest.raises(TypeError, match=r"tune='lr' must be a list of names, or None: \['lr'\]"):
        st.AdamW(NET, tune="lr")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (GuardPolicy, "pulse"), (GuardPolicy, "window"), (StiffSettings, "weights"),
        (SliceSettings, "least"), (SliceSettings, "each"), (HyperSettings, "fewest"),
        (SweepSettings, "parts"),
    ],
)  # fmt: skip
def test_counts_that_divide_are_not_zero(settings: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        settings(**{name: 0})
