"""What a search calls, names and stores once. Truths: counts, Optuna's record, other processes."""

import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from torch import nn
from torch.nn import functional as F

from selftune import search
from selftune.search._storage import storage_of

X = torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
BATCHES = [(part, part.sum(1, keepdim=True)) for part in X.split(15)]


def square(space: search.Space) -> float:
    return space.suggest_float("x", -1, 1) ** 2


def test_an_objective_is_called_once_for_each_trial() -> None:
    """It was called again after the last one, and a failure there lost the whole search."""
    calls = []

    def objective(space: search.Space) -> float:
        calls.append(space.trial.study)  # an attribute of running trials only
        return square(space)

    found = search.select(objective, trials=5, progress=False)
    assert len(calls) == 5
    assert found.model is None
    assert found.value == found.study.best_value


def slow_square(space: search.Space) -> float:
    time.sleep(0.3)  # else the first worker may be alone
    return square(space)


@pytest.mark.parametrize("sampler", [RandomSampler(seed=0), TPESampler(seed=0)])
def test_workers_draw_points_of_their_own(sampler: BaseSampler, tmp_path: Path) -> None:
    found = search.select(
        slow_square, trials=8, workers=2, sampler=sampler, storage=tmp_path / "j", progress=False
    )
    points = {t.params["x"] for t in found.study.trials}
    assert len(points) == len(found.study.trials) >= 8


def build(space: search.Space) -> nn.Module:
    os.chdir(os.environ["ELSEWHERE"])
    width = space.suggest_categorical("width", (2, 4))
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))


def test_builders_may_change_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("ELSEWHERE", str(elsewhere))
    monkeypatch.chdir(tmp_path)
    found = search.select(
        build, BATCHES[:4], BATCHES[4:], epochs=2, trials=3, loss_fn=F.mse_loss,
        storage="here.journal", progress=False,
    )  # fmt: skip
    assert len(found.study.trials) == 3
    assert not list(elsewhere.iterdir())
    assert (tmp_path / "here.journal").is_file()
    assert (tmp_path / "here.journal.runs").is_dir()


@pytest.mark.parametrize("storage", [None, "study.journal", "sqlite:///study.db"])
def test_selections_can_be_pickled(
    storage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = search.select(square, trials=2, storage=storage, progress=False)
    assert pickle.loads(pickle.dumps(found)).study.best_value == found.value


def test_a_search_is_remembered_once(tmp_path: Path) -> None:
    memory, options = search.Memory(tmp_path / "memory"), {"progress": False, "epochs": 2}
    monkey = {"loss_fn": F.mse_loss, "memory": memory, "storage": tmp_path / "j", **options}

    def builder(space: search.Space) -> nn.Module:
        width = space.suggest_categorical("width", (2, 4))
        return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))

    for trials in (1, 2, 3):
        found = search.select(builder, BATCHES[:4], BATCHES[4:], trials=trials, **monkey)
    (entry,) = memory.runs()
    assert entry["value"] == found.value
    search.select(builder, BATCHES[:4], BATCHES[4:], trials=1, **{**monkey, "storage": None})
    assert len(memory.runs()) == 2


def test_the_latest_of_equally_near_searches_come_first(tmp_path: Path) -> None:
    memory = search.Memory(tmp_path)
    task = search.Task(
        kind="table", task="regression", examples=9, inputs=1, outputs=1, steps=9, batch=3
    )
    for width in range(6):
        memory.remember(task, {"lr": 0.1}, value=1.0, params={"width": width}, name=str(width))
        os.utime(tmp_path / f"{width}.json", (width, width))
    assert [params["width"] for params in memory.best(task)] == [5, 4, 3]


KILLED = """
import os, sys
from selftune import search

def objective(space):
    if len(sys.argv) > 2 and space.trial.number == 1:
        os._exit(9)
    return space.suggest_float("x", -1, 1) ** 2

search.select(objective, trials=3, sampler="random", storage=sys.argv[1], progress=False)
"""


def test_a_process_with_the_id_of_a_killed_worker(tmp_path: Path) -> None:
    """As in a restarted container; the killed one is given our ID. Truth: all trials end."""
    script, journal = tmp_path / "search.py", str(tmp_path / "j")
    script.write_text(KILLED)
    subprocess.run([sys.executable, script, journal, "die"])
    storage = storage_of(journal)
    study = optuna.load_study(study_name="selftune", storage=storage)
    (lost,) = [t for t in study.trials if t.state.name == "RUNNING"]
    host, _, begun = lost.user_attrs["worker"]
    assert host == socket.gethostname()
    storage.set_trial_user_attr(lost._trial_id, "worker", [host, os.getpid(), begun])
    found = search.select(
        square, trials=3, sampler="random", storage=journal, progress=False
    ).study.trials
    assert [t.state.name for t in found].count("COMPLETE") == 3
    assert [t.state.name for t in found].count("FAIL") == 1


def test_the_table_has_finished_trials_first() -> None:
    """Values of pruned ones are those of unfinished runs."""

    def objective(space: search.Space) -> float:
        x = space.suggest_float("x", -1, 1)
        space.trial.report(10.0, 1)
        if space.trial.number % 2:
            raise optuna.TrialPruned
        return x

    found = search.select(objective, trials=6, maximize=True, progress=False)
    rows = [line.split() for line in found.table().splitlines()[1:]]
    assert float(rows[0][1]) == pytest.approx(found.value, rel=1e-3)
    assert ["pruned" in row for row in rows] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_those_of_samplers(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed} must be"):
        search.select(square, trials=1, seed=seed, progress=False)


def test_the_largest_seed_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"seed": 2**32 - 1, "storage": tmp_path / "j", "progress": False}
    for trials in (1, 2):
        found = search.select(square, trials=trials, **options)
    assert len(found.study.trials) == 2


def test_trials_signed_by_an_earlier_version_are_found(tmp_path: Path) -> None:
    """Their signature has no start of the process. Truth: all trials end."""
    storage = storage_of(tmp_path / "j")
    search.select(square, trials=1, storage=tmp_path / "j", progress=False)
    study = optuna.load_study(study_name="selftune", storage=storage)
    lost = study.ask()
    lost.suggest_float("x", -1, 1)
    lost.set_user_attr("worker", [socket.gethostname(), 2**22 + 1])  # above the largest ID
    found = search.select(square, trials=3, storage=tmp_path / "j", progress=False).study.trials
    assert [t.state.name for t in found].count("COMPLETE") == 3


def test_a_journal_with_a_damaged_value_is_refused(tmp_path: Path) -> None:
    """Its lines are JSON, a distribution within one is not. Truth: the file is untouched."""
    path = tmp_path / "j"
    search.select(square, trials=2, storage=path, progress=False)
    content = path.read_bytes().replace(b'\\"low\\":', b'\\"low\\" ', 1)
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged \(JSONDecodeError.*restore it from a copy"):
        search.select(square, trials=3, storage=path, progress=False)
    assert path.read_bytes() == content
