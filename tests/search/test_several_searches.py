"""Several searches in one script, storage or memory. Truths: each alone, counts of trials."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selftune as st
from selftune import search

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = X.square().sum(1, keepdim=True)
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))
QUICK: dict[str, Any] = dict(
    train=BATCHES[:6], val=BATCHES[6:], loss_fn=F.mse_loss, progress=False, pruner=None,
    sampler="random", tuner=dict(compile=False, probe=False),
)  # fmt: skip


def build(space: search.Space) -> nn.Module:
    width = space.suggest_categorical("width", (8, 16))
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))


SCRIPT = """
import sys
from selftune import search

def rising(space):
    return space.suggest_float("x", 0, 1)

def falling(space):
    return -space.suggest_float("x", 0, 1)

if __name__ == "__main__":
    for objective, storage, trials in (rising, sys.argv[1], 2), (falling, sys.argv[2], 3):
        search.select(objective, trials=trials, storage=storage, progress=False)
"""


def values(path: Path) -> list[float]:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    trials = optuna.load_study(study_name="selftune", storage=storage).trials
    return [t.value for t in trials if t.value is not None]


@pytest.mark.slow
def test_a_worker_joins_the_search_of_its_storage_only(tmp_path: Path) -> None:
    script, first, second = (tmp_path / n for n in ("two.py", "first", "second"))
    script.write_text(SCRIPT)
    own = [str(script), str(first), str(second)]
    worker = [sys.executable, "-m", "selftune.search", "worker", "--storage"]
    subprocess.run([sys.executable, *own], check=True)
    for storage in (first, second):
        subprocess.run([*worker, str(storage), *own], check=True)
    assert len(values(first)) == 2
    assert all(value >= 0 for value in values(first))
    assert len(values(second)) == 3
    wrong = subprocess.run(
        [*worker, str(tmp_path / "third"), *own], check=False, capture_output=True, text=True
    )
    assert "third: no select() of" in wrong.stderr
    assert wrong.returncode
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_workers_at_a_url_give_their_weights_to_the_ensemble(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: nothing is trained again, and the mean is at least as good as the best model."""
    found = search.select(
        build, trials=4, epochs=4, workers=2, ensemble=4, storage=f"sqlite:///{tmp_path}/s.db",
        **QUICK,
    )  # fmt: skip
    assert "not available" not in caplog.text
    x, y = (torch.cat(parts) for parts in zip(*QUICK["val"], strict=True))
    assert found.model is not None
    with torch.no_grad():
        assert F.mse_loss(found.model(x), y) <= found.value + 1e-6


def test_runs_of_two_studies_are_apart_in_the_charts(tmp_path: Path) -> None:
    storage = tmp_path / "study"
    for study in ("selftune", "second"):
        search.select(build, trials=1, epochs=2, storage=storage, study=study, **QUICK)
    runs = [path.name for path in (tmp_path / "study.runs").glob("*0000*")]
    assert sorted(runs) == ["0000-model", "second-0000-model"]


def test_lost_weights_are_trained_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = dict(trials=1, epochs=2, storage=tmp_path / "study", **QUICK)
    search.select(build, **options)
    for path in (tmp_path / "study.runs" / "weights").iterdir():
        path.unlink()
    options["seed"] = 1  # as another machine, which trains to other numbers
    found = [search.select(build, **options) for _ in range(2)]
    assert caplog.text.count("is trained again") == 1
    x, y = (torch.cat(parts) for parts in zip(*QUICK["val"], strict=True))
    for one in found:
        assert one.model is not None
        assert float(F.mse_loss(one.model(x).detach(), y)) == pytest.approx(one.value, rel=1e-4)
    for one, other in zip(*(f.model.parameters() for f in found if f.model), strict=True):
        assert torch.equal(one, other)


def test_the_memory_knows_a_candidates_own_rule(tmp_path: Path) -> None:
    """Law: values of one rule say nothing about those of another."""

    def own(space: search.Space) -> search.Candidate:
        return search.Candidate(model=nn.Linear(4, 1), tuner=dict(rule=st.rules.SGD()))

    memory = search.Memory(tmp_path)
    search.select({"net": own}, trials=1, epochs=2, memory=memory, **QUICK)
    assert [run["task"].rule for run in memory.runs()] == ["SGD"]
    found = search.select({"net": own}, trials=1, epochs=2, memory=memory, seed=1, **QUICK)
    assert found.study.trials[0].user_attrs["start"]["lr"] != 1e-3  # that of the run before
    options = {**QUICK, "tuner": {**QUICK["tuner"], "rule": st.rules.AdamW()}}
    plain = search.select({"net": build}, trials=1, epochs=2, memory=memory, **options)
    assert plain.study.trials[0].user_attrs["start"]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("wrong", [{"epochs": 2}, {"steps": 5}, {"val": 0.1}, {"log_dir": "x"}])
def test_the_length_and_data_of_runs_are_arguments_of_the_search(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    message = rf"fit: {name}={re.escape(repr(wrong[name]))} is set by the search: pass {name}= of"
    with pytest.raises(ValueError, match=message):
        search.select(build, trials=1, epochs=2, fit=wrong, **QUICK)
    with pytest.raises(ValueError, match=r"tuner: loss_fn=.* pass loss_fn= of select"):
        search.select(build, epochs=2, **{**QUICK, "tuner": {"loss_fn": F.l1_loss}})
