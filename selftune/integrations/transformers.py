"""Hugging Face Trainer: one callback for a self-tuned optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selftune._modes import evaluating
from selftune.integrations._batches import ValidationBatches
from selftune.integrations._logged import logged
from selftune.integrations._records import records_kept, silent
from selftune.integrations._unwrapping import unwrap


class SelfTuningCallback(TrainerCallback):
    """Calls ``hyper_step`` after optimizer steps, and evaluates at the averaged weights.

    Evaluations, models in checkpoints and the model after ``train`` use the averaged weights.
    ``optimizer.pt`` contains the training weights, from which a resumed run continues. The loss is
    the trainer's ``compute_loss`` with the model in ``eval()`` mode. Hyperparameters are logged
    with the trainer's own entries.

    Args:
        trainer: The trainer with a self-tuned optimizer, set by
            ``optimizer_cls_and_kwargs=(st.AdamW, {...})`` or ``optimizers=``.
        batches: Validation batches for tuning, by default ``trainer.get_eval_dataloader()``.
        seed: Seed of the random batches; by default ``args.seed``.

    Raises:
        TypeError: At the start of training: the optimizer is not self-tuned.
        ValueError: At the start of training: there is no evaluation dataset, or more than one.
    """

    def __init__(
        self, trainer: Trainer, batches: Iterable[Any] | None = None, *, seed: int | None = None
    ) -> None:
        self._trainer, self._given, self._seed = trainer, batches, seed
        self._opt: Any = None
        self._batches: ValidationBatches | None = None
        self._unlogged: Tensor | None = None  # the last validation loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find optimizer and validation batches."""
        self._opt = unwrap(self._trainer.optimizer)
        # Trainer would log the rate of its scheduler, which the optimizer multiplies.
        self._trainer._get_learning_rate = self._applied
        # An entry of its own would take what trainers such as TRL's add to the next one.
        self._trainer.log = partial(self._log, self._trainer.log)
        loader: Any = self._given
        if loader is None:
            datasets = self._trainer.eval_dataset
            if datasets is None or isinstance(datasets, dict):
                raise ValueError(
                    f"eval_dataset={'several datasets' if datasets else None}: pass "
                    "Trainer(eval_dataset=one dataset), or SelfTuningCallback(trainer, batches)"
                )
            loader = self._trainer.get_eval_dataloader()
        self._batches = ValidationBatches(loader, args.seed if self._seed is None else self._seed)
        if state.global_step >= state.max_steps:  # the best model may follow, but no step
            self._opt.eval()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the training weights."""
        self._opt.train()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the hyperparameters; use the averaged weights for evaluation and checkpoint."""
        assert self._batches is not None
        self._opt.train()  # another callback may have evaluated
        batches = self._batches.at(state.global_step)
        scaler = self._trainer.accelerator.scaler
        loss = self._opt.hyper_step(lambda: self._value(next(batches)), scaler=scaler)
        self._unlogged = loss if loss is not None else self._unlogged
        if control.should_evaluate or control.should_save:
            self._opt.eval()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the averaged weights into the model, also at the end of the run."""
        self._opt.eval()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same where no step was left to take, unless the best model is in place."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._opt.eval()
        self._batches = None  # with the workers of its loader

    def _log(
        self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> None:
        """Add the hyperparameters to the entry of a training loss."""
        if "loss" in logs and self._unlogged is not None:
            logs |= logged(self._opt, self._unlogged)
            self._unlogged = None
        log(logs, *args, **kwargs)

    def _applied(self) -> float:
        """The learning rate of the last step, of the first group."""
        group = self._opt.param_groups[0]
        return float(group.get("applied_lr", group["lr"]))

    def _value(self, batch: Any) -> Tensor:
        trainer, model = self._trainer, self._trainer.model
        # Trainers such as TRL's record metrics of batches in ``compute_loss``.
        kept, modes = records_kept([trainer, *model.modules()]), evaluating(model)
        with kept, modes, silent(trainer), trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(batch)
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
            return trainer.compute_loss(model, inputs, num_items_in_batch=items)
