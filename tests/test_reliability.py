"""A slice of the reliability benchmark. Truth: the loss at the start, and plain torch."""

import itertools
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn", reason="the data of the benchmark is scikit-learn's")
pytest.importorskip("optuna", reason="searches are killed")

from benchmarks.reliability.__main__ import worse
from benchmarks.reliability.files import files
from benchmarks.reliability.kills import kills
from benchmarks.reliability.logged import growth
from benchmarks.reliability.ranks import ranks
from benchmarks.reliability.searches import searches
from benchmarks.reliability.servers import ABSENT, servers
from benchmarks.reliability.starts import hostile, ordinary, run


def fresh(work: Callable[[int], Any], count: int) -> Any:
    """What a function returns in a process that never trained: it forks, and this one may not.

    The threads that training leaves (OpenMP's, autograd's) are missing in a forked child,
    which then ends by a signal or never.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, count).result()


def verdicts(count: int) -> list[tuple[str, str, str]]:
    """File, trouble and what is wrong, of so many cases."""
    return [(case.file, case.trouble, wrong) for case, wrong in files(count)]


FEW = [
    s if s.seed % 250 == 3 else pytest.param(s, marks=pytest.mark.slow)
    for s in hostile(1000) if s.seed % 125 == 3
]  # fmt: skip


@pytest.mark.parametrize("start", FEW, ids=lambda s: str(s.seed))
def test_a_hostile_start_ends_finite_and_no_worse_than_it_began(start) -> None:  # type: ignore[no-untyped-def]
    end = run(start)
    assert end.finite
    assert start.told == "nothing" or not worse(end.ours, end.initial)


@pytest.mark.slow
def test_hostile_starts() -> None:
    ends = [run(s) for s in hostile(1000) if s.seed % 40 == 5]
    assert all(e.finite for e in ends)
    told = [e for e in ends if e.start.told != "nothing"]
    assert not [e for e in told if worse(e.ours, e.initial)]
    known = [e for e in ends if not math.isnan(e.plain)]
    assert sum(worse(e.ours, e.plain) for e in known) <= 0.08 * len(known)


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["optimizer", "tuner"])
@pytest.mark.parametrize("shell", ["SGD", "AdamW"])
def test_ordinary_starts_are_not_lost(shell: str, driver: str) -> None:
    """Law: no run is lost (of SGD's one in ten ended at ten times the loss of plain torch)."""
    ends = [run(replace(s, again=False)) for s in ordinary(4, shell, driver)]
    assert not [e for e in ends if e.ours > 3 * e.plain]
    assert sum(math.log(e.ours / e.plain) for e in ends) / len(ends) < 0.3


@pytest.mark.slow
def test_a_sweep_that_kills_units_is_undone() -> None:
    """Law: plain torch ends at 0.11 with 92 % of the units live; this run did at 0.32 with 52 %."""
    (start,) = itertools.islice(ordinary(100, "SGD"), 98, 99)
    end = run(replace(start, again=False))
    assert end.ours < 1.5 * end.plain
    assert end.live[1] > 0.8


@pytest.mark.slow
def test_a_tuner_does_not_take_weights_with_dying_units_for_good() -> None:
    """Law: plain torch ends at 0.10; this run ended at 2.4, above its initial weights."""
    (start,) = itertools.islice(ordinary(100, "SGD", "tuner"), 18, 19)
    end = run(replace(start, again=False))
    assert end.ours < 1.5 * end.plain
    assert end.live[1] > 0.5  # 0.19


@pytest.mark.slow
def test_killed_runs_end_as_whole_ones() -> None:
    """Truth: the run that nobody kills; a slice of the hundred."""
    found = fresh(kills, 4)
    assert len(found) == 4
    assert not [k for k in found if not k.same or k.wrong]


@pytest.mark.slow
def test_killed_searches_lose_the_running_trial_alone() -> None:
    found = fresh(searches, 4)
    assert len(found) == 4
    assert not [s for s in found if s.lost]


@pytest.mark.slow
def test_killed_ranks_go_on_from_the_last_checkpoint() -> None:
    """Truth: two ranks that nobody kills; a slice of the twenty."""
    found = fresh(ranks, 4)
    assert len(found) == 4
    assert all(k.same for k in found)
    # About once in 500 kills gloo does not see that the other rank is gone: torchrun ends that one.
    assert sum(not k.noticed for k in found) <= 1
    assert not [k for k in found if k.lost is not None and k.lost > k.most]


@pytest.mark.slow
@pytest.mark.skipif(bool(ABSENT), reason=ABSENT)
def test_killed_workers_and_cut_connections_lose_the_running_trials_alone() -> None:
    kills, cuts = fresh(servers, 2)
    assert not [k for k in [*kills, *cuts] if k.lost]


@pytest.mark.slow
def test_files_in_trouble_are_kept_or_refused() -> None:
    """A slice of the hundred, without what no checksum sees: the user's own ``torch.load``."""
    found = fresh(verdicts, 20)
    assert len(found) == 20
    assert not [f for f in found if f[-1] and f[:2] != ("optimizer state", "flipped")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")
def test_logged_runs_leave_nothing() -> None:
    more = fresh(growth, 20)
    assert more.threads <= 0
    assert more.descriptors <= 0
    assert more.megabytes <= 3
