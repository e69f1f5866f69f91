"""Self-tuned networks as scikit-learn estimators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from selftune.search._estimator import AbstractEstimator, Array, moments
from selftune.search._shape import Classes, Shape


@dataclass(eq=False, repr=False, kw_only=True)
class SelfTuningClassifier(ClassifierMixin, AbstractEstimator):
    """A classifier that tunes its learning rate, weight decay, momentum and dropout during ``fit``.

    Args:
        module: A function that builds the network from a :class:`~selftune.search.Shape`; by
            default an MLP.
        depth: Number of hidden layers of the default network.
        width: Number of units per hidden layer.
        frequency: Scale of the embedding of numerical features by sines, for steep functions
            (:class:`~selftune.search.families.Periodic`), in tables of up to 128 features; 0 for
            none.
        epochs: Number of passes over the training part.
        batch_size: Batch size; at least 2, and at most an eighth of the training part.
        validation_fraction: Fraction of the data used to tune hyperparameters.
        patience: Number of evaluations without improvement after which training stops.
        standardize: Whether to scale features to mean 0 and variance 1.
        tuner: Further arguments of :class:`~selftune.Tuner`.
        device: Where to train.
        random_state: Seed of the split, the initial weights and the data order.
        verbose: Whether to show a progress bar.
        class_weight: ``"balanced"`` (n / (k · count) for n examples of k classes; ``partial_fit``
            keeps the counts of the first call), a dictionary of weights by class, or None.

    Attributes:
        classes_: The class labels.
        class_counts_: Number of examples of each class in the first fit.
        model_: The trained network.
        hparams_: Final values of the hyperparameters.
        schedule_: Trajectory of the hyperparameters.
        history_: Losses and hyperparameters as arrays.
        n_iter_: Number of steps.

    Examples:
        >>> from sklearn.datasets import load_iris
        >>> from selftune.search.sklearn import SelfTuningClassifier
        >>> X, y = load_iris(return_X_y=True)
        >>> bool(SelfTuningClassifier(epochs=10).fit(X, y).score(X, y) > 0.8)
        True
    """

    class_weight: Any = None

    def fit(self, X: Any, y: Any) -> SelfTuningClassifier:
        """Train from newly initialised weights.

        Args:
            X: Examples, shape (examples, features, …); a data frame or an array.
            y: Classes, shape (examples,).
        """
        return self._train(X, y, None, fresh=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> SelfTuningClassifier:
        """Continue training. The first call needs all ``classes``, unless all occur in ``y``."""
        return self._train(X, y, classes, fresh=not hasattr(self, "model_"))

    def _train(self, X: Any, y: Any, classes: Any, fresh: bool) -> SelfTuningClassifier:
        X, y = self._checked(X, y=y, multi_output=True, reset=fresh)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        if fresh:
            self.classes_ = np.unique(y if classes is None else classes)
        elif classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(
                f"classes={classes!r} differ from those of the first call, {self.classes_}: leave "
                "them out, or call fit to start anew"
            )
        if len(self.classes_) < 2:
            raise ValueError(f"y has 1 class, {self.classes_[0]}: at least 2 are needed")
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(f"y has classes {unknown} that the first fit did not know")
        shape = Shape(X.shape[1:], len(self.classes_), "classification")
        codes = np.searchsorted(self.classes_, y)
        if fresh:
            self.class_counts_ = np.bincount(codes, minlength=len(self.classes_))
        self._fit(X, codes, shape, Classes(self._class_weights(), shape.outputs), fresh)
        return self

    def _class_weights(self) -> Tensor | None:
        """Weights by class, whose mean over the examples of the first fit is 1."""
        if self.class_weight is None:
            return None
        known, counts = self.classes_, self.class_counts_
        balanced = isinstance(self.class_weight, str) and self.class_weight == "balanced"
        if balanced and not counts.all():
            raise ValueError(
                "class_weight='balanced': the first partial_fit lacks the classes "
                f"{known[counts == 0].tolist()}: pass data of all, or a dictionary of weights"
            )
        weights: Array = (
            1 / counts
            if balanced
            else compute_class_weight(self.class_weight, classes=known, y=known)
        )
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights @ counts > 0):
            raise ValueError(
                f"class_weight={self.class_weight}: weights must be finite and at least 0, and one "
                "of a class in y above 0"
            )
        return torch.from_numpy(weights * counts.sum() / (weights @ counts))

    def _strata(self, y: Array, count: int) -> Array | None:
        """The classes, if each has enough examples for both parts; else None."""
        counts = np.unique(y, return_counts=True)[1]
        return y if counts.min() >= 2 and min(count, len(y) - count) >= len(counts) else None

    def predict_proba(self, X: Any) -> Array:
        """Probabilities, shape (examples, classes)."""
        probabilities: Array = self._outputs(X).double().softmax(1).numpy()
        return probabilities

    def predict(self, X: Any) -> Array:
        """Classes, shape (examples,)."""
        best = self._outputs(X).argmax(1).numpy()
        return self.classes_[best]


@dataclass(eq=False, repr=False, kw_only=True)
class SelfTuningRegressor(RegressorMixin, AbstractEstimator):
    """A regressor that tunes its hyperparameters during ``fit``.

    Targets are scaled to mean 0 and variance 1 for training. Arguments and attributes are those of
    :class:`SelfTuningClassifier`, except for ``class_weight`` and ``classes_``; features are
    embedded by default.

    Examples:
        >>> from sklearn.datasets import load_diabetes
        >>> from selftune.search.sklearn import SelfTuningRegressor
        >>> X, y = load_diabetes(return_X_y=True)
        >>> bool(SelfTuningRegressor(epochs=10).fit(X, y).score(X, y) > 0.2)
        True
    """

    frequency: float = 0.3
    target_mean_: Any = field(init=False)

    def fit(self, X: Any, y: Any) -> SelfTuningRegressor:
        """Train from newly initialised weights.

        Args:
            X: Examples, shape (examples, features, …); a data frame or an array.
            y: Target values, shape (examples,) or (examples, targets).
        """
        return self._train(X, y, fresh=True)

    def partial_fit(self, X: Any, y: Any) -> SelfTuningRegressor:
        """Continue training from the end of the last call."""
        return self._train(X, y, fresh=not hasattr(self, "model_"))

    def __sklearn_tags__(self) -> Any:
        """Declare support for several targets."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _train(self, X: Any, y: Any, fresh: bool) -> SelfTuningRegressor:
        X, y = self._checked(X, y=y, multi_output=True, reset=fresh)
        y = np.asarray(y, dtype=np.float64)
        if not fresh and y[0].size != np.size(self.target_mean_):
            raise ValueError(
                f"y has shape {y.shape}, and the first fit had targets of shape "
                f"{('n', *np.shape(self.target_mean_))}: pass as many, or call fit"
            )
        if fresh:
            self.target_mean_, self.target_scale_ = moments(y)
        scaled = (y - self.target_mean_) / self.target_scale_
        shape = Shape(X.shape[1:], scaled[0].size, "regression", flat=scaled.ndim == 1)
        self._fit(X, scaled, shape, shape.loss(), fresh)
        return self

    def predict(self, X: Any) -> Array:
        """Predicted values, in the shape of the targets."""
        predictions = self._outputs(X).double().numpy()
        if np.ndim(self.target_mean_) == 0:
            predictions = predictions.reshape(len(predictions))
        return predictions * self.target_scale_ + self.target_mean_
