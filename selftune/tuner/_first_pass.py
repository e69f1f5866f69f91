"""The first evaluation of both objectives: errors that name what is wrong with model or data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from selftune._gradient import nodes
from selftune._modes import buffers_kept, random_kept
from selftune.tuner._batch import copied, size
from selftune.tuner._data import Stream
from selftune.tuner._noise_scale import halves
from selftune.tuner._objective import Objective, copy_batches
from selftune.tuner._run_state import RunState
from selftune.tuner._scoring import Metric, WithoutGradients, measured
from selftune.tuner._steps import Steps

log = logging.getLogger("selftune")


def check_first(
    steps: Steps,
    run: RunState,
    streams: tuple[Stream, Stream],
    metrics: Mapping[str, Metric],
    *,
    mapped: bool,
) -> float:
    """Check both objectives on first batches without side effects; return the validation loss.

    With ``mapped``, members of a population are trained, by ``torch.func``.
    """
    value = math.nan
    passes = (("train", steps.inner), ("val", steps.outer))
    for stream, (name, module) in zip(streams, passes, strict=True):
        batch = stream.peek()
        kept = buffers_kept(module.modules())
        with random_kept(run.step.device), steps.autocast(), kept, _explained(name):
            with torch.set_grad_enabled(not steps.group.sharded), _noted(name):
                own = copied(batch)
                before = _versions(own)
                loss = module(own)
            if _versions(own) != before:
                copy_batches(steps.inner, steps.outer)
            _check_loss(loss, name)
            if not steps.group.sharded:  # whose graph holds the gathered weights
                _check_dependence(loss, name, module)
                if name == "val" and isinstance(module, Objective):
                    scored = module.outputs if metrics else module
                    outputs = WithoutGradients()(partial(scored, batch))
                    if metrics:
                        measured(metrics, *outputs[1:])
            value = steps.group.average(float(loss.detach()), size(batch))
            passed = steps.gradient if name == "train" else steps.outer_gradient
            divided = name == "train" and steps.halved is not None
            with torch.set_grad_enabled(mapped or steps.whole is not None):  # by torch.func then
                for part in halves(batch) if divided else ():
                    passed(run, part)
                grads = passed(run, batch)[1]
            if not steps.group.any(any(bool(g.any()) for g in grads)):
                raise ValueError(
                    f"the gradient of the loss on the first {name} batch is 0: either "
                    "objective= does not use the model passed to it, or all units are dead"
                )
    return value


def _versions(batch: Any) -> list[int]:
    """How often the tensors of a copied batch were changed in place."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    return [t._version for t in tensors if not t.is_inference()]


@contextmanager
def _noted(name: str) -> Iterator[None]:
    """Adds a note to errors of the model and the loss: the batch, its form, and the mode."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        mode = ", with the model in evaluation mode" if name == "val" else ""
        note = (
            f"on the first {name} batch{mode}. With loss_fn(output, target), batches are "
            "(*inputs, target) or dictionaries with a key target; for several targets or another "
            "loss pass objective=lambda model, batch: loss, or batches (inputs, (target, target))"
        )
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(note)
        else:
            log.error(note)
        raise


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Explains errors of BatchNorm, and of what cannot be differentiated or gathered."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"the first {name} batch has one example, but BatchNorm needs two or more, in "
            "validation batches too, because hyperparameter steps run it in training mode: raise "
            "batch_size, or pass more examples"
        ) from error
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise ValueError(
                "model: st.Tuner cannot differentiate activation checkpoints of the reentrant "
                "kind: pass use_reentrant=False to torch.utils.checkpoint.checkpoint, or use "
                "st.AdamW in your own loop, which supports both kinds"
            ) from error
        if "mixed torch.Tensor and DTensor" in str(error):
            raise ValueError(
                'model: with parallel="fsdp" weights are gathered when the model, or an element of '
                "a Sequential or ModuleList, is called, but a part was used without such a call: "
                "call the whole model (in objective= too), shard the parts that are called with "
                'torch.distributed.fsdp.fully_shard(part), or pass parallel="ddp"'
            ) from error
        if "saved tensor hooks" in str(error):
            raise ValueError(
                "model: activation checkpoints, and other hooks of saved tensors, need "
                "population=1 and an elementwise estimator, Trace or OneStep, for all tuned "
                "hyperparameters: leave others out of tune=, or train without checkpoints"
            ) from error
        raise


def _check_loss(loss: Any, name: str) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss on the first {name} batch is a {type(loss).__name__}: return a tensor, "
            "without .item()"
        )
    if loss.numel() != 1 or loss.ndim:
        raise ValueError(
            f"the loss on the first {name} batch has shape {tuple(loss.shape)}: return a scalar, "
            "for example its mean"
        )
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"the loss on the first {name} batch is {float(loss.detach())}, before any training: "
            "check the data for missing values, the loss for log(0), and the initial weights"
        )


def _check_dependence(loss: Tensor, name: str, module: torch.nn.Module) -> None:
    params = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, allow_unused=True) if loss.requires_grad else [None]
    if all(g is None for g in grads):
        raise ValueError(
            f"the loss on the first {name} batch does not depend on the model's parameters: "
            "compute it from the model's output, with its graph"
        )
    if name == "train" and (others := _outside(loss, params)):
        log.warning(
            "the loss on the first train batch depends on parameters of shapes %s that belong "
            "neither to the model nor to loss_fn=: they are not trained. Make them parameters of "
            "one of both, or freeze them with requires_grad_(False)",
            others,
        )
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    unused = [n.removeprefix("model.") for n, g in zip(names, grads, strict=True) if g is None]
    if unused and name == "train":
        log.warning(
            "the loss on the first train batch does not depend on %s: weight decay and penalties "
            "shrink them all the same; freeze them with requires_grad_(False) if no loss does",
            ", ".join(unused),
        )


def _outside(loss: Tensor, params: list[Any]) -> list[tuple[int, ...]]:
    """Shapes of the parameters in the loss's graph that are not among ``params``."""
    own = set(map(id, params))
    leaves = [getattr(node, "variable", None) for node in nodes(loss)]
    return [tuple(t.shape) for t in leaves if isinstance(t, nn.Parameter) and id(t) not in own]
