"""Estimators of scikit-learn. Truths: its own estimator checks, its own tools, a plain pickle."""

import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from selftune.search.families import Periodic
from selftune.search.sklearn import SelfTuningClassifier, SelfTuningRegressor

EXCEPTIONS: dict[str, str] = {}
"""scikit-learn's checks that are not passed, and why."""

QUICK: dict[str, Any] = dict(epochs=4, width=16, tuner=dict(compile=False))
BRIEF = {**QUICK, "epochs": 2}


def checks() -> list[Any]:
    found = []
    for estimator in (
        SelfTuningClassifier(epochs=4, width=32, batch_size=32, tuner=dict(compile=False)),
        SelfTuningRegressor(epochs=4, width=32, batch_size=32, tuner=dict(compile=False)),
    ):
        for one, check in estimator_checks_generator(estimator, legacy=True):
            name = getattr(check, "func", check).__name__
            if name.endswith("_train"):
                one = clone(one).set_params(epochs=30)  # these ask for a score
            found.append(pytest.param(one, check, id=f"{type(one).__name__}-{name}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "check"), checks())
def test_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    name = getattr(check, "func", check).__name__
    if name in EXCEPTIONS:
        pytest.xfail(EXCEPTIONS[name])
    check(estimator)


def test_a_classifier() -> None:
    x, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    model = SelfTuningClassifier(epochs=12, tuner=dict(compile=False)).fit(x, names)
    assert model.score(x, names) > 0.9
    chances = model.predict_proba(x)
    np.testing.assert_allclose(chances.sum(1), 1)
    assert list(model.classes_[chances.argmax(1)]) == list(model.predict(x))
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(x), chances)
    assert set(model.hparams_) >= {"lr", "weight_decay", "dropout"}


def test_the_same_seed_is_the_same_model_and_leaves_the_users_alone() -> None:
    x, y = load_iris(return_X_y=True)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    found = [SelfTuningClassifier(**BRIEF).fit(x, y).predict_proba(x) for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
def test_a_regressor_in_units_of_its_targets() -> None:
    x, y = load_diabetes(return_X_y=True)
    one = SelfTuningRegressor(epochs=8, tuner=dict(compile=False)).fit(x, y)
    assert one.score(x, y) > 0.4
    other = clone(one).fit(x, 1000 * y + 5)
    np.testing.assert_allclose(other.predict(x), 1000 * one.predict(x) + 5, rtol=1e-3)
    two = SelfTuningRegressor(**BRIEF).fit(x, np.stack([y, -y], 1))
    assert two.predict(x).shape == (len(x), 2)


@pytest.mark.slow
def test_an_embedding_fits_steep_functions() -> None:
    """Truth: a square wave with six steps, whose variance an MLP of features leaves unexplained."""
    x = np.random.default_rng(0).uniform(-1, 1, (600, 2))
    y = np.sign(np.sin(9 * x[:, 0]))
    found = {
        frequency: SelfTuningRegressor(frequency=frequency, epochs=12, tuner=dict(compile=False))
        .fit(x[:400], y[:400])
        .score(x[400:], y[400:])
        for frequency in (0.0, 0.3)
    }
    assert found[0.3] > found[0.0] + 0.1
    assert SelfTuningRegressor().frequency == 0.3
    wide = np.random.default_rng(1).normal(size=(40, 129))  # too many features to embed
    model = SelfTuningRegressor(**BRIEF).fit(wide, wide[:, 0]).model_
    assert not any(isinstance(m, Periodic) for m in model.modules())


@pytest.mark.slow
def test_tools_of_scikit_learn() -> None:
    x, y = load_iris(return_X_y=True)
    grid = GridSearchCV(SelfTuningClassifier(**BRIEF), {"depth": [0, 1]}, cv=2).fit(x, y)
    assert grid.best_params_["depth"] in (0, 1)
    assert np.isfinite(cross_val_score(SelfTuningClassifier(**BRIEF), x, y, cv=2)).all()
    piped = make_pipeline(StandardScaler(), SelfTuningClassifier(**BRIEF)).fit(x, y)
    assert piped.predict(x).shape == y.shape


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    x, y = load_iris(return_X_y=True, as_frame=True)
    model = SelfTuningClassifier(**QUICK).fit(x, y)
    assert list(model.feature_names_in_) == list(x.columns)
    assert isinstance(x, pandas.DataFrame)
    assert model.predict(x).shape == y.shape


@pytest.mark.slow
def test_it_goes_on_where_it_ended() -> None:
    x, y = load_iris(return_X_y=True)
    model = SelfTuningClassifier(**QUICK)
    model.partial_fit(x[:100], y[:100], classes=[0, 1, 2])
    first = model.validation_loss_
    weights = model.model_
    for _ in range(4):
        model.partial_fit(x, y)
    assert model.model_ is weights
    assert model.score(x, y) > 0.8
    assert model.validation_loss_ < first + 0.5
    with pytest.raises(ValueError, match="did not know"):
        model.partial_fit(x, y + 5)
    with pytest.raises(ValueError, match="differ from those of the first call"):
        model.partial_fit(x, y, classes=[0, 1, 2, 3])
    model.partial_fit(x, y, classes=[2, 1, 0])


@pytest.mark.slow
def test_classes_weigh_as_asked() -> None:
    """Truth: weighting a rare class raises how often it is predicted."""
    generator = np.random.default_rng(0)
    y = (generator.random(600) < 0.08).astype(int)
    x = generator.normal(size=(600, 2)) + 0.8 * y[:, None]
    longer = {**QUICK, "epochs": 8}
    plain = SelfTuningClassifier(**longer).fit(x, y).predict(x).mean()
    balanced = SelfTuningClassifier(class_weight="balanced", **longer).fit(x, y).predict(x).mean()
    assert balanced > plain + 0.05


def test_what_cannot_be_fitted_is_told() -> None:
    x, y = load_iris(return_X_y=True)
    with pytest.raises(ValueError, match="1 class"):
        SelfTuningClassifier(**QUICK).fit(x[:50], y[:50])
    with pytest.raises(ValueError, match="validation_fraction=1"):
        SelfTuningClassifier(**QUICK, validation_fraction=1).fit(x, y)
    with pytest.raises(ValueError, match="frequency=-1 "):
        SelfTuningClassifier(**QUICK, frequency=-1).fit(x, y)
    with pytest.raises(ValueError, match="n_samples=3"):
        SelfTuningRegressor(**QUICK).fit(x[:3], y[:3])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_search_of_optuna() -> None:
    import optuna
    from optuna_integration import OptunaSearchCV

    x, y = load_iris(return_X_y=True)
    space = {"depth": optuna.distributions.IntDistribution(0, 1)}
    found = OptunaSearchCV(SelfTuningClassifier(**QUICK), space, n_trials=2, cv=2).fit(x, y)
    assert found.best_params_["depth"] in (0, 1)
    assert found.score(x, y) > 0.5


def columns(count: int = 300) -> tuple[Any, Any]:
    x = np.random.default_rng(0).normal(size=(count, 4))
    return x, x @ np.array([1.0, 2.0, 3.0, 4.0])


def test_a_module_may_return_one_column_for_targets_without_columns() -> None:
    x, y = columns()
    model = SelfTuningRegressor(
        lambda shape: torch.nn.Linear(shape.inputs[0], shape.outputs), epochs=20,
        tuner=dict(compile=False),
    ).fit(x, y)  # fmt: skip
    assert model.score(x, y) > 0.99
    assert model.predict(x).shape == y.shape


def test_features_far_from_zero_keep_their_differences() -> None:
    """Seconds since 1970, which float32 rounds to two minutes. Truth: the same, from 0 on."""
    seconds = np.random.default_rng(0).uniform(0, 60, size=(300, 1))
    y = np.sin(seconds[:, 0] / 20)
    near, far = (
        SelfTuningRegressor(epochs=6, tuner=dict(compile=False)).fit(x, y).score(x, y)
        for x in (seconds, seconds + 1.7e9)
    )
    assert near > 0.9
    assert far == pytest.approx(near, abs=0.02)


def test_a_fit_that_failed_leaves_no_model() -> None:
    x, y = columns(50)
    model = SelfTuningRegressor(tuner={"bad": 1})
    for _ in range(2):
        with pytest.raises(TypeError, match="bad"):
            model.partial_fit(x, y)
    with pytest.raises(NotFittedError):
        model.predict(x)


def test_balanced_weights_are_those_of_the_first_fit() -> None:
    """Truth: the definition, n / (k · count), as a dictionary of weights."""
    x, y = load_iris(return_X_y=True)
    part = slice(20, 150)
    weights = {c: 130 / (3 * int((y[part] == c).sum())) for c in range(3)}
    found = []
    for given in ("balanced", weights):
        model = SelfTuningClassifier(class_weight=given, **QUICK).fit(x[part], y[part])
        model.partial_fit(x[:60], y[:60])  # without the third class
        found.append(model.predict_proba(x))
    np.testing.assert_allclose(*found, rtol=1e-5)
    first = SelfTuningClassifier(class_weight="balanced", **QUICK)
    with pytest.raises(ValueError, match=r"lacks the classes \[2\].*dictionary of weights"):
        first.partial_fit(x[:60], y[:60], classes=[0, 1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SelfTuningClassifier, SelfTuningRegressor])
def test_models_of_either_default_dtype_predict_under_both(kind: Any) -> None:
    """Law: a model predicts the same, whatever torch's default dtype is when it is loaded."""
    x, y = load_iris(return_X_y=True)
    weighted = {"class_weight": "balanced"} if kind is SelfTuningClassifier else {}
    usual = torch.get_default_dtype()
    try:
        for there, here in (torch.float64, torch.float32), (torch.float32, torch.float64):
            torch.set_default_dtype(there)
            model = kind(**QUICK, **weighted).fit(x, y)
            assert next(model.model_.parameters()).dtype == there
            before = model.predict(x)
            torch.set_default_dtype(here)
            again = pickle.loads(pickle.dumps(model))
            np.testing.assert_array_equal(again.predict(x), before)
            again.partial_fit(x, y)
    finally:
        torch.set_default_dtype(usual)


def test_read_only_features_give_no_warning() -> None:
    """As joblib hands them to its workers; warnings are errors here."""
    X = np.random.default_rng(0).normal(size=(40, 3))
    y = X[:, 0].copy()
    X.setflags(write=False)
    y.setflags(write=False)
    model = SelfTuningRegressor(epochs=1, standardize=False, random_state=0).fit(X, y)
    assert model.predict(X).shape == (40,)


def test_a_refused_fit_leaves_no_model_of_other_data() -> None:
    """Law: the network of the first fit is not used with the scales of the second."""
    x, y = columns(50)
    for kind, targets in ((SelfTuningRegressor, y), (SelfTuningClassifier, y > 0)):
        model = kind(epochs=1).fit(x, targets)
        with pytest.raises(ValueError, match="n_samples=4 is too few"):
            model.fit(100 * x[:4], targets[:4])
        with pytest.raises(NotFittedError):
            model.predict(x)


def test_columns_that_differ_by_more_than_rounding_are_scaled() -> None:
    """Law: by hand, up to rounding at 10⁶; a constant column and constant targets stay."""
    x, _ = columns(60)
    narrow, constant = 1e6 + 1e-6 * x[:, :1], np.full((60, 1), 0.1)
    model = SelfTuningRegressor(epochs=1).fit(np.hstack([narrow, constant]), np.full(60, 0.1))
    assert model.scale_[0] == pytest.approx(narrow.std(), rel=1e-3)
    assert model.scale_[1] == model.target_scale_ == 1


@pytest.mark.parametrize("outputs", [1, 5])
def test_a_module_returns_a_score_for_each_class(outputs: int) -> None:
    x, y = columns(50)
    model = SelfTuningClassifier(module=lambda shape: torch.nn.Linear(x.shape[1], outputs))
    with pytest.raises(ValueError, match="return one score for each of the 2 classes"):
        model.fit(x, y > 0)


def test_arguments_that_the_estimator_passes_itself_are_refused() -> None:
    x, y = columns(50)
    with pytest.raises(ValueError, match="device='cpu' is set by the search: pass device="):
        SelfTuningRegressor(tuner={"device": "cpu"}).fit(x, y)


def test_numbers_of_numpy_are_numbers() -> None:
    """Twin: Python's; a grid of NumPy's is what searches of scikit-learn pass."""
    x = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    y = x[:, 0] ** 2
    fits = [
        SelfTuningRegressor(epochs=kind(2), width=kind(8), batch_size=kind(16), random_state=0)
        .fit(x, y).predict(x)
        for kind in (int, np.int64)
    ]  # fmt: skip
    assert np.array_equal(*fits)


@pytest.mark.parametrize("weights", [{0: -1, 1: 1}, {0: 0, 1: 0}, {0: np.nan, 1: 1}])
def test_weights_that_no_loss_can_have_are_refused(weights: dict[int, float]) -> None:
    x, y = columns(50)
    with pytest.raises(ValueError, match=re.escape(f"class_weight={weights}: ")):
        SelfTuningClassifier(**QUICK, class_weight=weights).fit(x, y > 0)


@pytest.mark.parametrize("kind", [SelfTuningClassifier, SelfTuningRegressor])
def test_a_module_returns_one_tensor(kind: Any) -> None:
    x, y = columns(50)
    with pytest.raises(TypeError, match="the model returned a tuple: return one tensor"):
        kind(**QUICK, module=lambda shape: torch.nn.RNN(x.shape[1], 2)).fit(x, y > 0)
