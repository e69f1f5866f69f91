"""The loss of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from selftune._modes import modes_kept
from selftune.method.averaging import statistics_momentum
from selftune.nn import begin_pass, extra_loss
from selftune.tuner._batch import copied

LossFn = Callable[..., Tensor]
TARGETS = ("labels", "label", "targets", "target", "y")


class Objective(nn.Module):
    """A model with its loss as one module, so that both are called with the same parameters.

    A tuple ``(*inputs, target)`` becomes ``loss_fn(model(*inputs), target)``. A dictionary
    has the target under one of the usual names, and the other entries are keyword arguments;
    without a ``loss_fn`` the model gets all entries and returns the loss as an attribute or item
    ``loss``.

    Args:
        model: The model.
        loss_fn: The loss of outputs and targets.
        objective: ``objective(model, batch)``, used instead.
        augment: Changes the first input of training batches, in a dictionary the only
            floating-point one, and the target.

    Attributes:
        changes: Whether passes change tensors of their batches in place; each then gets a copy.
    """

    changes = False

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        objective: Callable[[nn.Module, Any], Tensor] | None,
        augment: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.objective = objective
        self.augment = augment

    def forward(self, batch: Any) -> Tensor:
        begin_pass(self)
        if self.objective is not None:
            batch = copied(batch) if self.changes else batch
            loss = self.objective(self.model, dict(batch) if isinstance(batch, dict) else batch)
        else:
            loss = self.outputs(batch)[0]
        extra = extra_loss(self)
        return loss + extra if isinstance(extra, Tensor) else loss

    @property
    def splits(self) -> bool:
        """Whether outputs and their loss can be computed separately."""
        return self.objective is None and self.loss_fn is not None

    def predicted(self, batch: Any) -> tuple[Any, Tensor]:
        """The first part of the loss: outputs and activation penalties."""
        begin_pass(self)
        output = self.outputs(batch)[1]
        return output, torch.as_tensor(extra_loss(self), device=output.device)

    def judged(self, predicted: tuple[Any, Tensor], batch: Any) -> Tensor:
        """The second part: the loss of the outputs."""
        assert self.loss_fn is not None
        output, extra = predicted
        return self.loss_fn(output, self._parts(batch)[-1]) + extra

    def outputs(self, batch: Any) -> tuple[Tensor, Any, Any]:
        mapping = isinstance(batch, Mapping)
        if not mapping and (not isinstance(batch, (tuple, list)) or len(batch) < 2):
            raise ValueError(
                f"a batch is a {type(batch).__name__}; (*inputs, target) or a dictionary is "
                "expected. Pass a loader of batches, such as DataLoader(TensorDataset(x, y), 64); "
                "for other batches pass objective=lambda model, batch: loss"
            )
        if not mapping and self.loss_fn is None:
            raise ValueError("batches are tuples, which need a loss function: pass loss_fn=")
        inputs, named, name, target = self._parts(copied(batch) if self.changes else batch)
        if self.loss_fn is None:
            output = self.model(**named, **({} if name is None else {name: target}))
            loss = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
            if loss is None:
                raise ValueError("the model's output has no loss: pass loss_fn=")
            return loss, output, target
        if mapping and name is None:
            raise ValueError(
                f"a batch has the keys {list(batch)}, none of which is a target {TARGETS}: "
                "rename one, or pass objective=lambda model, batch: loss"
            )
        output = self.model(*inputs, **named)
        return self.loss_fn(output, target), output, target

    def _parts(self, batch: Any) -> tuple[Sequence[Any], dict[str, Any], str | None, Any]:
        """Inputs of a batch, without and with names, name of the target and target, augmented."""
        if not isinstance(batch, Mapping):
            first, *rest, target = batch
            if self.augment is not None:
                first, target = self.augment(first, target)
            return (first, *rest), {}, None, target
        inputs = dict(batch)
        name = next((name for name in TARGETS if name in inputs), None)
        target = None if name is None else inputs.pop(name)
        if self.augment is not None:
            key = _augmentable(inputs)
            inputs[key], target = self.augment(inputs[key], target)
        return (), inputs, name, target


def copy_batches(*modules: nn.Module) -> None:
    """Give every pass of the objectives in these modules a batch of its own."""
    for part in chain.from_iterable(m.modules() for m in modules):
        if isinstance(part, Objective):
            part.changes = True


def _augmentable(inputs: Mapping[str, Any]) -> str:
    """Name of the input that an augmentation changes."""
    floating = [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    if len(floating) != 1:
        raise ValueError(
            "augment= changes the one floating-point input of a dictionary, but of the inputs "
            f"{list(inputs)} these are {floating}: call the augmentation in the model's forward "
            "instead, or pass tuples (*inputs, target), whose first input it changes"
        )
    return floating[0]


def twin(objective: Objective) -> Objective:
    """A copy with new modules and the same parameter and buffer tensors."""
    memo = {id(t): t for t in chain(objective.parameters(), objective.buffers())}
    for module in objective.modules():  # activations that a module keeps cannot be copied
        kept = [t for t in tree_leaves(dict(vars(module))) if isinstance(t, Tensor)]
        memo |= {id(t): t.detach() for t in kept if t.grad_fn is not None}
    try:
        return copy.deepcopy(objective, memo)
    except TypeError as error:
        raise ValueError(
            f"model: validation uses a copy of it, but it holds an object that cannot be copied "
            f"({error}): create that object in forward, or define __deepcopy__ of its class"
        ) from error


def for_tuning(objective: Objective, every: int) -> Objective:
    """The validation objective: without dropout, but with updates of BatchNorm's statistics.

    The statistics belong to the averaged weights, which have ``every`` times fewer passes.
    """
    copied = twin(objective)
    _to_tuning(copied, every)
    return copied


def _to_tuning(objective: nn.Module, every: int) -> None:
    """Set the modes of a validation objective."""
    norms = [m for m in objective.modules() if isinstance(m, _NormBase) and m.training]
    objective.eval()
    for norm in norms:  # the others are frozen, by the model's own train()
        if norm.running_mean is not None:
            norm.train()
            norm.momentum = statistics_momentum(norm.momentum, every)


class InMode(nn.Module):
    """An objective in another mode on the same modules, for models that cannot be copied (FSDP).

    Args:
        every: As in :func:`for_tuning`; None for evaluation.
    """

    def __init__(self, objective: nn.Module, every: int | None) -> None:
        super().__init__()
        self.objective, self._every = objective, every

    @contextmanager
    def entered(self) -> Iterator[nn.Module]:
        norms = [m for m in self.objective.modules() if isinstance(m, _NormBase)]
        momenta = [norm.momentum for norm in norms]
        with modes_kept(self.objective):
            try:
                if self._every is None:
                    self.objective.eval()
                else:
                    _to_tuning(self.objective, self._every)
                yield self.objective
            finally:
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum

    def forward(self, batch: Any) -> Any:
        with self.entered():
            return self.objective(batch)
