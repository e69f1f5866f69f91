"""Gradient-boosted trees, tuned by Optuna's TPE: what the networks of a selection stand against."""

from __future__ import annotations

import optuna
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import log_loss

from benchmarks.quality.selection_jobs import CLASSES, job


def boosted_trees(name: str, seed: int) -> tuple[float, float]:
    """Test metric with default settings, and with the ones of the lowest validation loss.

    The search has the seconds of the job. Every trial stops early by the validation data.
    """
    data = job(name)
    classes = name in CLASSES
    kind = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    train, val, test = (
        (x.numpy(), y.flatten().numpy())
        for x, y in (data.splits[split] for split in ("train", "val", "test"))
    )

    def judged(model: HistGradientBoostingRegressor) -> float:
        if classes:
            return 100 * float(model.score(*test))
        return float(((model.predict(test[0]) - test[1]) ** 2).mean() ** 0.5)

    def objective(trial: optuna.Trial) -> float:
        model = kind(
            learning_rate=trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
            max_leaf_nodes=trial.suggest_int("max_leaf_nodes", 4, 64, log=True),
            min_samples_leaf=trial.suggest_int("min_samples_leaf", 2, 50, log=True),
            l2_regularization=trial.suggest_float("l2_regularization", 1e-4, 10.0, log=True),
            max_features=trial.suggest_float("max_features", 0.3, 1.0),
            max_iter=1000, early_stopping=True, random_state=seed,
        ).fit(*train, X_val=val[0], y_val=val[1])  # fmt: skip
        trial.set_user_attr("test", judged(model))
        if classes:
            return float(log_loss(val[1], model.predict_proba(val[0])))
        return float(((model.predict(val[0]) - val[1]) ** 2).mean())

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    study.optimize(objective, timeout=data.seconds)
    default = judged(kind(random_state=seed).fit(*train))
    return default, study.best_trial.user_attrs["test"]
