"""Lightning: one callback for a self-tuned optimizer from ``configure_optimizers``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from selftune._modes import buffers_kept, evaluating
from selftune.integrations._batches import ValidationBatches
from selftune.integrations._logged import logged
from selftune.integrations._records import records_kept, silent
from selftune.integrations._unwrapping import only

RAW = "current_model_state"
"""Key of the training weights in a checkpoint, as in Lightning's ``WeightAveraging``."""
AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}
"""Lightning's own callbacks that put averaged weights into the module."""


class SelfTuning(Callback):
    """Calls ``hyper_step`` after optimizer steps, and validates at the averaged weights.

    Validation, checkpoints (``state_dict``) and the module after ``fit`` use the averaged weights.
    A checkpoint also contains the training weights, from which a resumed run continues. The loss is
    that of ``validation_step`` if it returns one, else, with automatic optimization, of
    ``training_step``, with the module in ``eval()`` mode; these calls log nothing, and leave
    torchmetrics, counts and lists of outputs unchanged.

    Args:
        batches: Validation batches for tuning, by default the trainer's first validation loader.
            Batches of loaders over a map-style dataset are drawn by (seed, step).
        loss: ``loss(module, batch)``, instead of the module's own.
        seed: Seed of the random batches.

    Raises:
        ValueError: At the start of training: not exactly one optimizer is self-tuned, there are no
            validation batches, they are of several loaders at a time, or another callback averages
            the weights too.

    Examples:
        >>> trainer = Trainer(callbacks=[SelfTuning()], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        batches: Iterable[Any] | None = None,
        *,
        loss: Callable[[LightningModule, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self._given, self._loss, self._seed = batches, loss or _module_loss, seed
        self._opt: Any = None
        self._loader: Any = None
        self._batches: ValidationBatches | None = None
        self._seen = 0  # optimizer steps
        self._shown = False  # averaged weights

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizer."""
        for callback in trainer.callbacks:
            kinds = {kind.__name__ for kind in type(callback).__mro__}
            if AVERAGING & kinds:
                raise ValueError(
                    f"callbacks: {type(callback).__name__} puts its averaged weights into the "
                    "module, as SelfTuning does: leave it out"
                )
            if "ModelPruning" in kinds:
                raise ValueError(
                    "callbacks: ModelPruning saves weights under other names than the module "
                    "that resumes has: use selftune.structure, or prune after fit"
                )
        self._opt, self._shown = only(trainer.optimizers), False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the validation batches."""
        if self._given is None:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()  # else done only before validation
        self._loader = None
        self._find_batches(trainer)
        self._seen = trainer.global_step
        self._hide()  # a state saved with averaged weights in place is loaded with them

    def _find_batches(self, trainer: Trainer) -> None:
        loader: Any = self._given
        if loader is None:
            validation = trainer.fit_loop.epoch_loop.val_loop
            loaders, combined = trainer.val_dataloaders, validation._combined_loader
            mode = getattr(combined, "_mode", "sequential")
            if mode != "sequential" and isinstance(loaders, (dict, list, tuple)):
                raise ValueError(
                    f"val_dataloaders: a batch of CombinedLoader(mode={mode!r}) is of several "
                    "loaders: pass SelfTuning(batches), such as [batch for batch, *_ in loader]"
                )
            loader = next(iter(() if combined is None else combined.flattened), None)
        if loader is None:
            raise ValueError(
                f"no validation loader (limit_val_batches={trainer.limit_val_batches}): pass "
                "fit(..., val_dataloaders=) with a validation_step, and a limit_val_batches above "
                "0, or SelfTuning(batches)"
            )
        if loader is not self._loader:
            self._loader, self._batches = loader, ValidationBatches(loader, self._seed)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the hyperparameters, unless gradients are being accumulated."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        assert self._batches is not None
        batches = self._batches.at(step)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = self._opt.hyper_step(
            lambda: self._value(trainer, pl_module, next(batches)), scaler=scaler
        )
        if loss is not None:
            values = logged(self._opt, loss)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def _value(self, trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
        strategy, precision = trainer.strategy, trainer.precision_plugin
        with evaluating(module), _silent(module), _validating(trainer):
            batch = strategy.batch_to_device(precision.convert_input(batch), dataloader_idx=0)
            with precision.val_step_context():
                return self._loss(module, batch)

    # averaged weights: from a validation, or the end, until the next training batch

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averaged weights into the module; tune on this loader, if it is a new one."""
        if self._fits(trainer):
            self._show()
            if self._loader is not None and not trainer.sanity_checking:
                self._find_batches(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the training weights."""
        self._hide()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averaged weights in the module."""
        self._show()
        self._loader = self._batches = None  # with the workers of the loader

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where no step was left to take."""
        self._show()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same after Ctrl-C."""
        if self._fits(trainer) and isinstance(exception, KeyboardInterrupt):
            self._show()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the averaged weights as ``state_dict``, and the training weights separately."""
        if not self._fits(trainer):
            return
        names, shown = checkpoint["state_dict"].keys(), self._shown
        for key, switch in ((RAW, self._hide), ("state_dict", self._show)):
            switch()
            state = trainer.strategy.lightning_module_state_dict()
            if unknown := sorted(names - state.keys()):
                raise ValueError(
                    f"callbacks: one before SelfTuning has renamed weights in the checkpoint, to "
                    f"{unknown[0]} and others: put SelfTuning before it"
                )
            checkpoint[key] = {n: _copied(t) for n, t in state.items() if n in names}
        if not shown:
            self._hide()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue from the training weights."""
        if trainer.state.fn == TrainerFn.FITTING and RAW in checkpoint:
            pl_module.load_state_dict(checkpoint[RAW], strict=pl_module.strict_loading)

    def _show(self) -> None:
        self._opt.eval()
        self._shown = True

    def _hide(self) -> None:
        self._opt.train()
        self._shown = False

    def _fits(self, trainer: Trainer) -> bool:
        return self._opt is not None and trainer.state.fn == TrainerFn.FITTING


def _module_loss(module: LightningModule, batch: Any) -> Tensor:
    """The loss of ``validation_step``, or of ``training_step`` unless that steps optimizers."""
    for name in ("validation_step", "training_step")[: 1 + module.automatic_optimization]:
        step: Any = getattr(module, name)
        numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        several = is_param_in_hook_signature(step, "dataloader_idx", explicit=True)
        output = step(batch, *[0] * numbered, **{"dataloader_idx": 0} if several else {})
        loss = output.get("loss") if isinstance(output, dict) else output
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
            return loss.reshape(())
    raise ValueError(
        "validation_step (or training_step, with automatic optimization) returned no loss: return "
        "one, with its graph, or pass SelfTuning(loss=lambda module, batch: ...)"
    )


class _Silent(DummyLogger):
    """A logger that logs nothing, in the folders of another."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._folders = logger

    name = property(lambda self: self._folders.name)
    version = property(lambda self: self._folders.version)
    save_dir = property(lambda self: self._folders.save_dir)
    log_dir = property(lambda self: self._folders.log_dir)
    root_dir = property(lambda self: self._folders.root_dir)


@contextmanager
def _validating(trainer: Trainer) -> Iterator[None]:
    """Hooks that ask ``trainer.training``, such as augmentations of a batch, see a validation.

    Calls of the module's loggers have no effect.
    """
    stage, loggers = trainer.state.stage, trainer.loggers
    trainer.state.stage = RunningStage.VALIDATING
    trainer.loggers = [_Silent(logger) for logger in loggers]
    try:
        yield
    finally:
        trainer.state.stage, trainer.loggers = stage, loggers


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Log nothing, and leave torchmetrics and whatever else records batches as they are."""
    modules = list(module.modules())
    metrics = [m for m in modules if isinstance(m, Metric)]
    kept = [{n: _copied(v) for n, v in vars(m).items()} for m in metrics]
    with records_kept(modules), buffers_kept(modules), silent(module):
        try:
            yield
        finally:
            for metric, values in zip(metrics, kept, strict=True):
                vars(metric).update(values)


def _copied(value: Any) -> Any:
    """A copy of a tensor, or of a list, which a metric appends to."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value
