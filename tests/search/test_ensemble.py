"""Ensembles of trials. Truths: closed forms, and the saved weights of each trial in plain torch."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selftune import search


class Constant(nn.Module):
    """An output that does not depend on the input, and is not changed by tiny steps."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand_as(x)


def data(target: float = 0.25) -> list[Any]:
    return [(torch.zeros(n, 1), torch.full((n, 1), target)) for n in (4, 4, 2)]


def net(space: search.Space) -> nn.Module:
    width = space.suggest_int("width", 3, 8)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))


def batches() -> list[Any]:
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    return [(a, a.square().sum(1, keepdim=True)) for a in x.split(16)]


QUICK: dict[str, Any] = dict(
    steps=20, loss_fn=F.mse_loss, progress=False, pruner="none", sampler="random",
    tuner=dict(compile=False, probe=False),
)  # fmt: skip

FIXED: dict[str, Any] = {
    **QUICK, "sampler": "grid", "steps": 3,
    "tuner": dict(compile=False, probe=False, tune=(), hparams=dict(lr=1e-12)),
}  # fmt: skip


def test_weights_are_those_of_the_lowest_loss() -> None:
    """Closed form: of outputs 0 and 1, 3/4 and 1/4 give the target 1/4; 5 is of no use."""
    val = data()
    found = search.select(
        lambda space: Constant(space.suggest_categorical("value", (0.0, 1.0, 5.0))), val, val,
        ensemble=3, **FIXED,
    )  # fmt: skip
    number = {t.params["value"]: t.number for t in found.study.trials}
    assert found.members == {number[0.0]: 0.75, number[1.0]: 0.25}
    assert found.model is not None
    torch.testing.assert_close(found.model(torch.zeros(2, 1)), torch.full((2, 1), 0.25))
    assert found.value == pytest.approx(0.0625)  # of the best trial


def test_batches_count_by_their_examples() -> None:
    """Closed form: the mean of all targets is 0.8; that of the two batches would be 0.5."""
    val = [(torch.zeros(8, 1), torch.ones(8, 1)), (torch.zeros(2, 1), torch.zeros(2, 1))]
    found = search.select(
        lambda space: Constant(space.suggest_categorical("value", (0.0, 2.0))), val, val,
        ensemble=2, **FIXED,
    )  # fmt: skip
    number = {t.params["value"]: t.number for t in found.study.trials}
    assert found.members == pytest.approx({number[2.0]: 0.4, number[0.0]: 0.6})


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_is_the_mean_of_the_best_trials(tmp_path: Path, workers: int) -> None:
    given = batches()

    def build(space: search.Space) -> nn.Module:  # workers get it by value, and cannot import tests
        width = space.suggest_int("width", 3, 8)
        return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    found = search.select(
        build,
        given[:3],
        given[3:],
        trials=6,
        ensemble=3,
        log_dir=tmp_path,
        workers=workers,
        **QUICK,
    )
    trials = sorted(found.study.trials, key=lambda t: t.value or 0.0)
    assert set(found.members) <= {t.number for t in trials[:3]}
    assert sum(found.members.values()) == pytest.approx(1)
    files = {int(p.name[:4]): p for p in (tmp_path / "weights").glob("*.pt")}
    assert {t.number for t in trials[:3]} <= set(files)
    assert len(files) == 3 or workers > 1
    x, y = (torch.cat(each) for each in zip(*given[3:], strict=True))
    mean = torch.zeros_like(y)
    for trial in trials[:3]:
        model = build(search.Space(optuna.trial.FixedTrial(trial.params)))
        model.load_state_dict(torch.load(files[trial.number]))
        loss = F.mse_loss(model(x), y).item()
        assert loss == pytest.approx(trial.value, rel=1e-4)
        mean += found.members.get(trial.number, 0.0) * model(x).detach()
    assert found.model is not None
    torch.testing.assert_close(found.model(x), mean)
    assert F.mse_loss(mean, y).item() <= found.value * (1 + 1e-6)


def test_trials_without_weights_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, storage = batches(), tmp_path / "study.journal"
    first = search.select(net, given[:3], given[3:], trials=4, ensemble=3, storage=storage, **QUICK)
    ranked = sorted(first.study.trials, key=lambda t: t.value or 0.0)
    for path in (tmp_path / "study.journal.runs" / "weights").glob(f"{ranked[1].number:04d}-*.pt"):
        path.unlink()
    with caplog.at_level(logging.WARNING, "selftune"):
        again = search.select(
            net, given[:3], given[3:], trials=4, ensemble=3, storage=storage, **QUICK
        )
    assert f"the weights of trial {ranked[1].number} are not available here" in caplog.text
    assert "trained again" not in caplog.text
    assert set(again.members) <= {ranked[0].number, ranked[2].number}


def test_outputs_may_be_nested() -> None:
    def pair(scale: float) -> nn.Module:
        class Two(nn.Module):
            def forward(self, x: Tensor, *, shift: float = 0.0) -> dict[str, Any]:
                return {"mean": scale * x + shift, "rest": (x, "name")}

        return Two()

    output = search.Ensemble([pair(1.0), pair(3.0)], [0.25, 0.75])(torch.ones(2), shift=1.0)
    assert output["mean"].tolist() == [3.5, 3.5]
    assert output["rest"][1] == "name"


def test_wrong_calls() -> None:
    given = batches()
    with pytest.raises(ValueError, match="ensemble=0 must be at least 1"):
        search.select(net, given[:3], given[3:], ensemble=0, **QUICK)
    with pytest.raises(ValueError, match="ensemble=2 needs loss_fn"):
        search.select(net, given[:3], given[3:], ensemble=2, **{**QUICK, "loss_fn": None})

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    options: tuple[dict[str, Any], ...] = ({"train": given[:2]}, {"tuner": {"objective": loss}})
    for given_own, named in zip(options, ("train", "objective"), strict=True):

        def own(space: search.Space, options: Any = given_own) -> search.Candidate:
            return search.Candidate(model=net(space), **options)

        with pytest.raises(RuntimeError, match=f"ensemble=2 needs candidates.*its own {named}"):
            search.select(own, given[:3], given[3:], trials=1, ensemble=2, **QUICK)


def test_outputs_without_a_mean_are_named() -> None:
    class Held(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=x)

    mixed = search.Ensemble([Held(), Held()], [0.5, 0.5])
    with pytest.raises(TypeError, match="returned SimpleNamespace, of which there is no mean"):
        mixed(torch.ones(2))
