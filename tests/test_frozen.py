"""Training jobs go as they went when they were frozen. Truth: data of an earlier version.

``python -m tests.frozen.freeze`` writes that data anew, where a change is meant to change it.
"""

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from tests.frozen.jobs import FILES, JOBS, Trajectory, run

TOLERANCE = 1e-7
FROZEN = {d: json.loads(path.read_text("utf-8")) for d, path in FILES.items()}


def frozen(name: str) -> Trajectory:
    driver, _, job = name.partition("/")
    return FROZEN[driver][job]


def quantities(found: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of nested dictionaries and lists, in order, by names such as weights[0]."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from quantities(value, f"{name}.{key}" if name else key)
    elif isinstance(found, list | tuple):
        for place, value in enumerate(found):
            yield from quantities(value, f"{name}[{place}]")
    else:
        yield name, found


def difference(found: Trajectory, known: Trajectory) -> str:
    """The first step and quantity that differ, in words; empty if there is none."""
    for step in known | found:
        here, there = (dict(quantities(t.get(step, {}))) for t in (found, known))
        for name in there | here:
            if name not in here or name not in there:
                return f"step {step}: {name} is only in the {'new' if name in here else 'old'} run"
            if not math.isclose(here[name], there[name], rel_tol=TOLERANCE):
                off = abs(here[name] - there[name]) / (abs(there[name]) or 1.0)
                return f"step {step}: {name} is {here[name]!r}, was {there[name]!r} ({off:.1e} off)"
    return ""


@pytest.mark.parametrize("name", JOBS)
def test_a_trajectory_is_the_frozen_one(name: str) -> None:
    assert not (told := difference(run(name), frozen(name))), f"{name}, {told}"


@pytest.mark.parametrize("name", JOBS)
def test_the_first_difference_is_named(name: str) -> None:
    """By hand: a nudge of a hyperparameter, a list that is shorter, a step that is missing."""
    known = frozen(name)
    assert difference(known, known) == ""
    last = list(known)[-1]
    nudged, shorter = copy.deepcopy(known), copy.deepcopy(known)
    nudged[last]["rollbacks"] += 1
    assert f"step {last}: rollbacks is" in difference(nudged, known)
    del shorter["80"]["weights"][2]
    assert difference(shorter, known) == "step 80: weights[2] is only in the old run"
    assert difference({}, known).startswith("step ")
