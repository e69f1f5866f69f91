"""Self-tuned networks as scikit-learn estimators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_is_fitted,
    check_random_state,
    column_or_1d,
    validate_data,
)  # fmt: skip
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selftune._arguments import COUNT, FLAG, FUNCTION, MAPPING, NONE, Kind, Number, Whole, check
from selftune.nn import Dropout
from selftune.search._candidates import check_own
from selftune.search._shape import Classes, Shape
from selftune.search.families._base import Closed
from selftune.search.families._periodic import first_layer
from selftune.tuner import Tuner

Array = NDArray[Any]
ARGUMENTS: dict[str, Kind] = {
    "module": FUNCTION | NONE,
    "depth": Whole(least=0),
    "width": COUNT,
    "frequency": Number(least=0),
    "epochs": COUNT,
    "batch_size": COUNT,
    "validation_fraction": Number(above=0, below=1),
    "patience": COUNT | NONE,
    "standardize": FLAG,
    "tuner": MAPPING | NONE,
}
"""Allowed values of the arguments of both estimators."""
DROPOUT = 0.1
FEWEST = 8
"""Minimum number of steps in an epoch."""
ROUNDING = 10 * np.finfo(np.float64).eps


@dataclass(eq=False, repr=False)
class _SelfTuning(BaseEstimator):
    """Base class of the classifier and the regressor."""

    module: Callable[[Shape], nn.Module] | None = None
    _: KW_ONLY
    depth: int = 2
    width: int = 128
    frequency: float = 0.0
    epochs: int = 30
    batch_size: int = 64
    validation_fraction: float = 0.2
    patience: int | None = None
    standardize: bool = True
    tuner: Mapping[str, Any] | None = None
    device: str = "cpu"
    random_state: Any = 0
    verbose: bool = False
    model_: nn.Module = field(init=False)
    hparams_: dict[str, float] = field(init=False)

    def _fit(self, X: Array, y: Array, shape: Shape, loss: nn.Module, fresh: bool) -> None:
        """Train on checked arrays."""
        check(ARGUMENTS, vars(self))
        check_own(self.tuner, seed="random_state=", device="device=", model="module=")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if fresh:
            self.mean_, self.scale_ = _moments(X)
        parts = self._split(X, y, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._build(shape) if fresh else self.model_
            loss.to(self.device, _dtype(model))
            tuner = Tuner(model, loss, seed=seed, device=self.device, **dict(self.tuner or {}))
            if not fresh:
                tuner.start_from(self.hparams_)
            batch = max(2, min(int(self.batch_size), len(parts[0]) // FEWEST))
            # A last batch of one example has no variance for BatchNorm.
            ragged = len(parts[0]) % batch == 1
            data = [
                TensorDataset(self._inputs(x, model), self._targets(t, model))
                for x, t in (parts[::2], parts[1::2])
            ]
            train = DataLoader(data[0], batch, shuffle=True, drop_last=ragged)
            val = DataLoader(data[1], int(self.batch_size), shuffle=True)
            result = tuner.fit(
                train, val, epochs=self.epochs, patience=self.patience, progress=self.verbose
            )
        self.model_ = model.eval()
        self.hparams_ = result.hparams
        self.schedule_ = result.schedule
        self.history_ = result.history
        self.validation_loss_ = result.best_loss
        self.n_iter_ = result.steps

    def _split(self, X: Array, y: Array, seed: int) -> list[Array]:
        if len(X) < 5:
            raise ValueError(
                f"n_samples={len(X)} is too few for training and validation parts: at least 5"
            )
        count = max(1, round(self.validation_fraction * len(X)))
        if len(X) - count < 2:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} leaves {len(X) - count} of "
                f"{len(X)} examples for training: lower it"
            )
        groups = self._strata(y, count)
        parts: list[Array] = train_test_split(
            X, y, test_size=count, random_state=seed, stratify=groups
        )
        return parts

    def _strata(self, y: Array, count: int) -> Array | None:
        return None

    def _build(self, shape: Shape) -> nn.Module:
        if self.module is not None:
            return self.module(shape)
        first, size = first_layer(shape, self.frequency)
        layers: list[nn.Module] = [first]
        for _ in range(self.depth):
            layers += [nn.Linear(size, self.width), nn.ReLU(), Dropout(DROPOUT)]
            size = self.width
        return Closed(shape, *layers, nn.Linear(size, shape.outputs))

    def _inputs(self, X: Array, model: nn.Module) -> Tensor:
        """Scaled inputs in the model's dtype; rounded last, as means may be far from zero."""
        scaled = (X - self.mean_) / self.scale_ if self.standardize else X
        dtype = _dtype(model)
        if np.abs(scaled).max(initial=0.0) > torch.finfo(dtype).max:
            raise ValueError(f"X has a value too large for {dtype}: scale it, or standardize=True")
        return torch.tensor(np.ascontiguousarray(scaled), dtype=dtype)  # may be read-only

    def _targets(self, y: Array, model: nn.Module) -> Tensor:
        """Targets as a tensor: classes, or values in the model's dtype."""
        return torch.from_numpy(y).to(_dtype(model) if y.dtype.kind == "f" else torch.int64)

    def _outputs(self, X: Any) -> Tensor:
        """Outputs of the model for unscaled inputs."""
        check_is_fitted(self, "model_")
        data = self._inputs(self._checked(X, reset=False), self.model_)
        with torch.no_grad():
            parts = [self.model_(part.to(self.device)).cpu() for part in data.split(1024)]
        return torch.cat(parts)

    def _checked(self, X: Any, **options: Any) -> Any:
        """Validate inputs as arrays of finite numbers; before a new fit, forget the last model."""
        if options["reset"]:
            self.__dict__.pop("model_", None)
        return validate_data(self, X, dtype=np.float64, allow_nd=True, **options)


@dataclass(eq=False, repr=False, kw_only=True)
class SelfTuningClassifier(ClassifierMixin, _SelfTuning):
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
        batch_size: Batch size; at most an eighth of the training part.
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
        """Weights by class; ``"balanced"`` ones, n / (k · count), are those of the first fit."""
        if self.class_weight is None:
            return None
        known, counts = self.classes_, self.class_counts_
        if self.class_weight != "balanced":
            return torch.from_numpy(compute_class_weight(self.class_weight, classes=known, y=known))
        if not counts.all():
            raise ValueError(
                "class_weight='balanced': the first partial_fit lacks the classes "
                f"{known[counts == 0].tolist()}: pass data of all, or a dictionary of weights"
            )
        return torch.from_numpy(counts.sum() / (len(known) * counts))

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
class SelfTuningRegressor(RegressorMixin, _SelfTuning):
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
            self.target_mean_, self.target_scale_ = _moments(y)
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


def _moments(values: Array) -> tuple[Array, Array]:
    """Mean and standard deviation by column, also where squares leave the range of float64.

    The scale of a column that is constant up to rounding is 1.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean, scale = values.mean(0), values.std(0)
    most = np.abs(values).max(0)
    varies = values.max(0) != values.min(0)
    beyond = ~np.isfinite(mean) | ~np.isfinite(scale) | (varies & (scale == 0))
    if beyond.any():
        part = values / np.where(most > 0, most, 1.0)
        mean = np.where(beyond, part.mean(0) * most, mean)
        scale = np.where(beyond, part.std(0) * most, scale)
    return mean, np.where(varies & (scale > ROUNDING * np.abs(mean)), scale, 1.0)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the inputs of a model: that of its parameters."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(dtypes, torch.get_default_dtype())
