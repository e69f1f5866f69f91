"""What both scikit-learn estimators share: checked arrays in, a trained network out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selftune._arguments import COUNT, FLAG, FUNCTION, MAPPING, NONE, Kind, Number, Whole, check
from selftune._modes import every_random_kept
from selftune.nn import Dropout
from selftune.search._candidates import check_own
from selftune.search._shape import Shape
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
ALONE = threading.RLock()
"""Held during a fit, because all threads share torch's generator."""


@dataclass(eq=False, repr=False)
class AbstractEstimator(BaseEstimator):
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
        check_own(
            "tuner", self.tuner, seed="random_state=", device="device=", model="module=",
            loss_fn="your model to st.Tuner for another loss",
        )  # fmt: skip
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if fresh:
            self.mean_, self.scale_ = moments(X)
        parts = self._split(X, y, seed)
        with ALONE, every_random_kept():
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
        if result.ended == "interrupted":  # by Ctrl-C, which ends a cross-validation, too
            raise KeyboardInterrupt

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
        checked = validate_data(self, X, dtype=np.float64, allow_nd=True, **options)
        shape = (checked if options.get("y") is None else checked[0]).shape[1:]
        if not options["reset"] and shape != np.shape(self.mean_):
            raise ValueError(
                f"X has examples of shape {shape}, and those of fit had {np.shape(self.mean_)}"
            )
        return checked


def moments(values: Array) -> tuple[Array, Array]:
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
