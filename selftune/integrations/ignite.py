"""PyTorch-Ignite: one handler for a self-tuned optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from selftune._modes import evaluating
from selftune.integrations._batches import ValidationBatches
from selftune.integrations._unwrapping import unwrap


class HyperStep:
    """Calls ``hyper_step`` after iterations, and evaluates at the averaged weights.

    From an evaluation or the end of an epoch until the next iteration, the model has the averaged
    weights, including in checkpoints written in between; the optimizer's state contains the
    training weights. Load the optimizer after the model.

    Args:
        optimizer: A self-tuned optimizer, possibly wrapped by ``idist.auto_optim``.
        model: The model; it is in ``eval()`` mode for the validation loss.
        batches: Validation batches for tuning.
        loss: ``loss(model, batch)``.
        seed: Seed of the random batches.

    Raises:
        TypeError: The optimizer is not self-tuned.

    Examples:
        >>> import torch, selftune as st
        >>> from torch.nn.functional import mse_loss
        >>> model, batch = torch.nn.Linear(2, 1), (torch.ones(4, 2), torch.ones(4, 1))
        >>> opt = st.SGD(model, lr=0.1)
        >>> loss = lambda model, batch: mse_loss(model(batch[0]), batch[1])
        >>> def update(engine, batch):
        ...     opt.zero_grad()
        ...     loss(model, batch).backward()
        ...     opt.step()
        >>> trainer = Engine(update)
        >>> HyperStep(opt, model, [batch], loss).attach(trainer)
        >>> state = trainer.run([batch] * 5)
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        seed: int = 0,
    ) -> None:
        self._opt, self._model, self._loss = unwrap(optimizer), model, loss
        self._batches = ValidationBatches(batches, seed)

    def attach(self, trainer: Engine, evaluator: Engine | None = None) -> None:
        """Add the handlers; call this before adding checkpoint handlers.

        Args:
            trainer: The engine that trains, one step in each iteration.
            evaluator: The engine that evaluates the model.
        """
        trainer.add_event_handler(Events.ITERATION_STARTED, self._opt.train)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._hyper_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._opt.eval)
        trainer.add_event_handler(Events.COMPLETED, self._opt.eval)
        if evaluator is not None:
            evaluator.add_event_handler(Events.STARTED, self._opt.eval)

    def _hyper_step(self, engine: Engine) -> None:
        self._opt.train()  # an evaluation may have come first
        batches = self._batches.at(engine.state.iteration)
        self._opt.hyper_step(lambda: self._value(next(batches)))

    def _value(self, batch: Any) -> Tensor:
        with evaluating(self._model):
            return self._loss(self._model, batch)
