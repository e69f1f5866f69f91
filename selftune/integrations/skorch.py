"""skorch: one callback for a self-tuned optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from skorch.callbacks import Callback
from skorch.dataset import unpack_data
from torch import Tensor

from selftune._modes import evaluating
from selftune.integrations._batches import ValidationBatches
from selftune.integrations._logged import numbered
from selftune.integrations._unwrapping import unwrap


class HyperStep(Callback):
    """Calls ``hyper_step`` after training batches, and validates at the averaged weights.

    Scores, modules in checkpoints and the fitted network use the averaged weights. The saved
    optimizer contains the training weights, from which training continues. The loss is that of the
    network, with its module in ``eval()`` mode.

    Args:
        batches: Validation batches for tuning, by default those of the network's ``train_split``.
        seed: Seed of the random batches.

    Raises:
        TypeError: The network's optimizer is not self-tuned.
        ValueError: ``train_split=None`` and no batches are given.

    Examples:
        >>> import torch, selftune as st
        >>> from skorch import NeuralNetRegressor
        >>> net = NeuralNetRegressor(
        ...     torch.nn.Linear(3, 1), optimizer=st.AdamW, callbacks=[HyperStep()], verbose=0
        ... )
        >>> predicted = net.fit(torch.ones(20, 3), torch.ones(20, 1)).predict(torch.ones(2, 3))
    """

    def __init__(self, batches: Iterable[Any] | None = None, seed: int = 0) -> None:
        self.batches, self.seed = batches, seed

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Find the optimizer."""
        self.opt_ = unwrap(net.optimizer_)
        self.batches_: ValidationBatches | None = None

    def on_epoch_begin(
        self, net: Any, dataset_train: Any = None, dataset_valid: Any = None, **kwargs: Any
    ) -> None:
        """Find the validation batches."""
        if self.batches_ is not None:
            return
        if self.batches is None and dataset_valid is None:
            raise ValueError(
                "train_split=None leaves no validation data: pass train_split=, or "
                "HyperStep(batches)"
            )
        loader = self.batches
        if loader is None:
            loader = net.get_iterator(dataset_valid, training=False)
        self.batches_ = ValidationBatches(loader, self.seed)

    def on_batch_begin(
        self, net: Any, batch: Any = None, training: bool | None = None, **kwargs: Any
    ) -> None:
        """Put averaged weights into the module for validation, training weights for training."""
        if training:
            self.opt_.train()
        else:
            self.opt_.eval()

    def on_batch_end(
        self, net: Any, batch: Any = None, training: bool | None = None, **kwargs: Any
    ) -> None:
        """Step the hyperparameters after a training batch."""
        if not training:
            return
        assert self.batches_ is not None
        batches = self.batches_.at(len(net.history), len(net.history[-1]["batches"]))

        def loss() -> Tensor:
            inputs, target = unpack_data(next(batches))
            with ExitStack() as modes:
                for name in (*net._modules, *net._criteria):
                    modes.enter_context(evaluating(getattr(net, f"{name}_")))
                value: Tensor = net.get_loss(net.infer(inputs), target, X=inputs, training=False)
            return value

        self.opt_.hyper_step(loss)

    def on_train_end(self, net: Any, **kwargs: Any) -> None:
        """Let go of the validation data, which a saved network would contain."""
        self.opt_.eval()  # also after Ctrl-C in an epoch; before an EarlyStopping loads the best
        self.batches_ = None

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        """Record the hyperparameters, and put the averaged weights into the module."""
        self.opt_.eval()
        for name, value in numbered(self.opt_.hparams, "_").items():
            net.history.record(f"hyper_{name}", value)
