"""Searches whose processes are killed. Truths: Optuna's own record, and the search that goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

SCRIPT = """
import sys, time, torch
from selftune import search

def objective(space):
    x = space.suggest_float("x", -1, 1)
    time.sleep({nap})
    return x * x

if __name__ == "__main__":
    found = search.select(objective, trials={trials}, sampler="random", storage=sys.argv[1],
                          workers={workers}, progress=False)
    print(len(found.study.trials), found.value)
"""


def read(path: Path) -> optuna.Study:
    from selftune.search._storage import storage_of

    return optuna.load_study(study_name="selftune", storage=storage_of(path))


@pytest.mark.slow
def test_a_killed_worker_loses_its_trial_only(tmp_path: Path) -> None:
    """Truth: SIGKILL of a process under way; Optuna's record afterwards."""
    script, path = tmp_path / "script.py", tmp_path / "study.journal"
    script.write_text(SCRIPT.format(nap=0.5, trials=6, workers=2))
    process = subprocess.Popen([sys.executable, str(script), str(path)])
    victim = None
    until = time.monotonic() + 60
    while victim is None and time.monotonic() < until:
        time.sleep(0.1)
        if path.exists() and path.stat().st_size:
            running = [t for t in read(path).trials if t.state.name == "RUNNING" and t.params]
            victim = running[0] if running else None
    assert victim is not None
    os.kill(victim.user_attrs["worker"][1], signal.SIGKILL)
    assert process.wait(60) == 0
    trials = read(path).trials
    states = [t.state.name for t in trials]
    assert states.count("COMPLETE") >= 6
    assert trials[victim.number].state.name == "FAIL"
    (again,) = [t for t in trials if t.user_attrs.get("instead of") == victim.number]
    assert again.params == victim.params
    assert again.state.name == "COMPLETE"


@pytest.mark.slow
def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    script, path = tmp_path / "script.py", tmp_path / "study.journal"
    script.write_text(SCRIPT.format(nap=0.3, trials=4, workers=1))
    process = subprocess.Popen([sys.executable, str(script), str(path)])
    until = time.monotonic() + 60
    while time.monotonic() < until:
        time.sleep(0.1)
        if path.exists() and any(t.state.name == "COMPLETE" for t in read(path).trials):
            break
    process.kill()
    process.wait()
    join = [sys.executable, "-m", "selftune.search", "worker", "--storage", str(path)]
    done = subprocess.run(
        [*join, str(script), str(path)], check=True, capture_output=True, text=True
    )
    assert "RUNNING" not in {t.state.name for t in read(path).trials}
    complete = [t for t in read(path).trials if t.state.name == "COMPLETE"]
    assert len(complete) == 4
    assert float(done.stdout.split()[1]) == pytest.approx(min(t.value for t in complete))
