"""Unusual choices, classes and studies. Truths: counts by hand, torch itself, a message."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selftune as st
from selftune import search
from selftune.search.sklearn import SelfTuningClassifier, SelfTuningRegressor

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 8, generator=GENERATOR)
BATCHES = list(zip(X.split(16), X.sum(1, keepdim=True).split(16), strict=True))
ONCE: dict[str, Any] = {"epochs": 1, "progress": False, "loss_fn": F.mse_loss, "pruner": "none"}


def select(candidates: Any, **options: Any) -> search.Selection:
    return search.select(candidates, BATCHES[:3], BATCHES[3:], **{**ONCE, "trials": 2, **options})


@pytest.mark.filterwarnings("ignore:Choices for a categorical:UserWarning")
def test_choices_that_are_no_numbers_are_logged(tmp_path: Path) -> None:
    """A trial must not fail because of its log."""

    def build(space: search.Space) -> nn.Module:
        space.suggest_categorical("norm", (None, "batch"))
        space.suggest_categorical("sizes", ((3, 3), (5, 5)))
        return nn.Linear(8, 1)

    study = select(build, sampler="grid", log_dir=tmp_path).study
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 4


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_grid_has_every_point_of_choices_that_depend_on_two_others(
    workers: int, tmp_path: Path
) -> None:
    """Count by hand: 3 + 5 points. No change of one choice alone shows that ``c`` exists."""

    def build(space: search.Space) -> nn.Module:
        a, b = (space.suggest_categorical(n, (0, 1)) for n in "ab")
        if a == b == 0:
            space.suggest_categorical("c", (1, 2, 3, 4, 5))
        return nn.Linear(8, 1)

    options = {"sampler": "grid", "storage": tmp_path / "j", "workers": workers}
    study = select(build, **options).study
    points = {tuple(sorted(t.params.items())) for t in study.trials}
    assert len(points) == 8
    # Optuna's sampler may give two workers one point at the same time, but none its own twice.
    assert len(study.trials) <= 8 * workers
    before = len(study.trials)
    assert len(select(build, **options).study.trials) == before


def test_a_grid_over_an_objective_has_every_point() -> None:
    """Count by hand: 10 + 2. An objective is not called to count points."""

    def objective(space: search.Space) -> float:
        if space.suggest_categorical("kind", ("tree", "none", "mean")) == "tree":
            return -float(space.suggest_int("depth", 1, 10))
        return 0.0

    best = search.select(objective, sampler="grid", progress=False)
    assert (len(best.study.trials), best.value, best.params["depth"]) == (12, -10, 10)


def test_a_metric_is_that_of_the_returned_weights() -> None:
    """Truth: the metric of the model that is returned, over the validation data."""

    def far(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target).abs().max()

    options = {"metric": "far", "tuner": {"metrics": {"far": far}}, "epochs": 3}
    best = select(lambda space: nn.Linear(8, 1), trials=1, **options)
    with torch.no_grad():
        assert best.model is not None
        assert best.value == pytest.approx(float(far(best.model(BATCHES[3][0]), BATCHES[3][1])))


def test_scores_of_a_run_are_those_of_its_weights() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        tuner = st.Tuner(net, F.mse_loss, metrics={"mae": F.l1_loss})
        result = tuner.fit(BATCHES[:3], BATCHES[3:], epochs=4, progress=False)
        with torch.no_grad():
            expected = F.l1_loss(net(BATCHES[3][0]), BATCHES[3][1])
        assert result.best_scores["mae"] == pytest.approx(float(expected))
        assert result.best_scores["loss"] == result.best_loss


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.int64])
def test_classes_of_every_integer_type(dtype: torch.dtype) -> None:
    batches = [(x, (x[:, 0] > 0).to(dtype)) for x in X.split(16)]
    best = search.select(
        [search.families.MLP], batches[:3], batches[3:], trials=1, epochs=1, progress=False
    )
    assert np.isfinite(best.value)


def test_inputs_of_another_type_and_negative_classes_are_named() -> None:
    doubles = [(x.double(), (x[:, 0] > 0).long()) for x in X.split(16)]
    with pytest.raises(ValueError, match=r"torch.float64.*x.to\(torch.float32\)"):
        search.select("auto", doubles[:3], doubles[3:], epochs=1)
    batches = [(x, 2 * (x[:, 0] > 0).long() - 1) for x in X.split(16)]
    with pytest.raises(ValueError, match="class -1: number them from 0"):
        search.select("auto", batches[:3], batches[3:], epochs=1)


def test_families_have_the_default_dtype() -> None:
    """Truth: inputs of torch's default dtype are those that newly built layers take."""
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        batches = [(x.double(), (x[:, 0] > 0).long()) for x in X.split(16)]
        families = [search.families.MLP, search.families.ResNet]
        found = search.select(
            families, batches[:3], batches[3:], trials=2, epochs=1, progress=False
        )
        assert {t.state.name for t in found.study.trials} == {"COMPLETE"}
        with pytest.raises(ValueError, match=r"torch.float32: families are torch.float64"):
            search.select("auto", BATCHES[:3], BATCHES[3:], epochs=1)
    finally:
        torch.set_default_dtype(usual)


@pytest.mark.filterwarnings("ignore:Choices for a categorical:UserWarning")
def test_a_memory_that_cannot_store_a_choice_keeps_the_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def build(space: search.Space) -> nn.Module:
        width = int(space.trial.suggest_categorical("width", list(np.array([4, 8]))))
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 1))

    assert select(build, memory=search.Memory(tmp_path)).params["width"] in (4, 8)
    assert "could not be stored" in caplog.text


def test_failures_of_an_earlier_call_are_told_from_new_ones(tmp_path: Path) -> None:
    wrong = True

    def build(space: search.Space) -> nn.Module:
        if wrong:
            raise NameError("typo")
        return nn.Linear(8, 1)

    with pytest.raises(RuntimeError, match=r"typo$"):
        select(build, storage=tmp_path / "j")
    wrong = False
    with pytest.raises(RuntimeError, match="of an earlier call: pass more trials="):
        select(build, storage=tmp_path / "j")
    assert select(build, storage=tmp_path / "j", trials=3).model is not None


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_other_choices_in_the_same_study_are_named(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Truth: no trial of that call is like the others; the study goes on with their choices."""

    def build(*widths: int) -> Any:
        def of(space: search.Space) -> nn.Module:
            width = space.suggest_categorical("width", widths)
            return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 1))

        return of

    caplog.set_level(logging.ERROR)
    options = {"storage": tmp_path / "j", "workers": workers}
    select(build(4, 8), **options)
    changed = "width has other choices than in trial 0 .*pass another study="
    with pytest.raises(ValueError, match=changed) as told:
        select(build(4, 8, 16), trials=5, **options)
    again = select(build(4, 8), trials=8, **options)  # as before
    states = [t.state.name for t in again.study.trials]
    # Two workers may begin one trial too many.
    assert set(states[4 + workers :]) == {"COMPLETE"}, states
    assert "dynamic value space" in str(told.value)  # Optuna's own message
    with pytest.raises(ValueError, match="if the choices have changed, pass another study="):
        select(build(32, 64), trials=1, **options)


def test_the_order_of_candidates_does_not_matter(tmp_path: Path) -> None:
    """Truth: a study's trials do not depend on the order of a dictionary."""
    one, two = (lambda space: nn.Linear(8, 1) for _ in range(2))
    select({"one": one, "two": two}, storage=tmp_path / "j")
    states = select({"two": two, "one": one}, storage=tmp_path / "j", trials=4).study.trials
    assert [t.state.name for t in states] == ["COMPLETE"] * 4


def test_choices_that_depend_on_others_fail_alone(tmp_path: Path) -> None:
    """Truth: a search in two calls is a search in one."""

    def build(space: search.Space) -> nn.Module:
        kind = space.suggest_categorical("kind", (2, 4))
        width = space.suggest_categorical("width", (kind, 8))
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 1))

    for trials in (4, 8):
        found = select(build, trials=trials, sampler="random", storage=tmp_path / "j")
    errors = [t.user_attrs["error"] for t in found.study.trials if t.state.name == "FAIL"]
    assert len(found.study.trials) == 8
    assert errors
    assert all("if they depend on other choices" in error for error in errors)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"structure": {"of": "flops"}}, "of='flops' must be one of parameters, multiply_adds"),
        ({"structure": {"end": "a"}}, "structure: end='a' must be"),
        ({"tuner": {"seed": 3}}, "seed=3 is set by the search"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        select(lambda space: nn.Linear(8, 1), **options)
    with pytest.raises(TypeError, match="name 1 must be a string"):
        select({1: lambda space: nn.Linear(8, 1)})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"depth": -1}, "depth=-1 must be"),
        ({"width": 0}, "width=0 must be"),
        ({"validation_fraction": "a"}, "validation_fraction='a' must be"),
        ({"validation_fraction": 0.999}, r"validation_fraction=0.999 leaves 0 of 64"),
        ({"tuner": "x"}, "tuner='x' must be"),
        ({"module": "x"}, "module='x' must be"),
        ({"tuner": {"seed": 1}}, "pass random_state="),
    ],
)
def test_wrong_arguments_of_estimators_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        SelfTuningClassifier(**options).fit(X.numpy(), (X[:, 0] > 0).numpy())


def test_more_targets_than_the_first_fit_had_are_refused() -> None:
    y = X[:, :2].double().numpy()
    model = SelfTuningRegressor(epochs=1).fit(X.numpy(), y)
    with pytest.raises(ValueError, match="pass as many, or call fit"):
        model.partial_fit(X.numpy(), y[:, :1])


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_scales_near_the_limits_of_float64_are_learned_like_others(scale: float) -> None:
    """Truth: the same data in units of 1; squares of the others overflow or vanish."""
    x, y = X.double().numpy(), X.sum(1).double().numpy()
    plain = SelfTuningRegressor(epochs=2).fit(x, y)
    other = SelfTuningRegressor(epochs=2).fit(x * scale, y * scale)
    np.testing.assert_allclose(other.predict(x * scale) / scale, plain.predict(x), rtol=1e-4)


@pytest.mark.parametrize("val", [st.HoldOut(), None])
def test_validation_examples_that_join_do_not_choose(val: Any) -> None:
    batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)]
    for options in ({"ensemble": 2}, {"structure": {"of": "parameters"}}):
        with pytest.raises(ValueError, match=r"val=.* lets validation examples join the training"):
            search.select(
                lambda space: nn.Linear(4, 1), batches, val, epochs=1, trials=2,
                loss_fn=F.mse_loss, progress=False, **options,
            )  # fmt: skip


LABELS = (X[:, 0] > 0).long()
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "matrices to predict": (X, X[:, :4].reshape(-1, 2, 2), "targets of torch.float32 and shape"),
    "several classes for a row": (X, torch.stack([LABELS, LABELS], 1), "targets of torch.int64"),
    "no batch dimension": (X[:, 0], LABELS, r"inputs of shape \(16,\)"),
    "no features": (X[:, :0], LABELS, r"inputs of shape \(16, 0\)"),
    "a missing value": (torch.where(X > 1, torch.nan, X), LABELS, "missing or infinite"),
    "complex": (X.cfloat(), LABELS, "inputs of torch.complex64"),
    "one class": (X, torch.zeros_like(LABELS), "class 0 only"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_data_that_no_family_learns_is_refused_before_the_first_trial(case: str) -> None:
    inputs, targets, message = REFUSED[case]
    batches = list(zip(inputs.split(16), targets.split(16), strict=True))
    with pytest.raises(ValueError, match=message):
        search.select("auto", batches[:3], batches[3:], epochs=1)


def test_volumes_are_learnt_by_layers_that_take_any_shape() -> None:
    volumes = X.reshape(-1, 1, 2, 2, 2)
    batches = list(zip(volumes.split(16), LABELS.split(16), strict=True))
    found = search.select("auto", batches[:3], batches[3:], trials=2, epochs=1, progress=False)
    assert {n.split(".")[0] for t in found.study.trials for n in t.params} == {"mlp"}
    assert {t.state.name for t in found.study.trials} == {"COMPLETE"}


@pytest.mark.parametrize("name", ["train", "val"])
def test_batches_that_end_after_one_trial_are_refused(name: str) -> None:
    """Later trials would find none, and fail."""
    data = {"train": BATCHES[:3], "val": BATCHES[3:]}
    data[name] = iter(data[name])
    with pytest.raises(TypeError, match=rf"{name}=<list_it.*> must be batches that every"):
        search.select(lambda space: nn.Linear(8, 1), **data, **ONCE)
    with pytest.raises(TypeError, match=rf"{name}=<list_it.*> must be batches that every"):
        search.Candidate(model=nn.Linear(8, 1), **{name: data[name]})
