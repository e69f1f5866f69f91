"""Checks before training: errors name the argument, the value and the remedy."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from selftune import control, method
from selftune._arguments import (
    COUNT,
    FLAG,
    FOLDER,
    FUNCTION,
    MAPPING,
    MODULE,
    NONE,
    PATH,
    SCALAR,
    TEXT,
    Instance,
    Kind,
    Number,
    OneOf,
    That,
    Whole,
    check,
)
from selftune._flat import is_sharded
from selftune._identity import digest
from selftune._modes import buffers_kept, random_kept
from selftune.hypernet import SelfTuned
from selftune.nn import Strength
from selftune.rules import AbstractRule
from selftune.schedules import SHAPES
from selftune.tuner._batch import size
from selftune.tuner._data import Stream, batches_of
from selftune.tuner._group import Group
from selftune.tuner._noise_scale import halves
from selftune.tuner._objective import Objective
from selftune.tuner._result import History
from selftune.tuner._run_state import RunState
from selftune.tuner._scoring import Metric, measured
from selftune.tuner._steps import Steps

log = logging.getLogger("selftune")


def check_hparams(
    given: Mapping[str, Any], rule: AbstractRule, strengths: Mapping[str, Strength]
) -> None:
    """Raise an error for unknown names and values outside their range."""
    names = set(rule.defaults) | {"lr", "decay", "weight_decay", "l1"}
    for what, owned in (
        ("hyperparameters of the update", names),
        ("entries of result.history", History().arrays()),
    ):
        clash = sorted(set(strengths).intersection(owned))
        if clash:
            raise ValueError(
                f"layers named {clash} have the names of {what}: give them other names"
            )
    names |= set(strengths)
    for name, value in given.items():
        if name not in names:
            raise ValueError(
                f"hparams={name!r} is not one of {type(rule).__name__}'s: use one of "
                f"{sorted(names)}, and penalty= for penalties"
            )
        flag = isinstance(rule.defaults.get(name), bool)
        if flag != isinstance(value, bool):
            raise TypeError(
                f"hparams[{name!r}]={value!r} must be {'True or False' if flag else 'a number'}"
            )
        if flag:
            continue
        check({f"hparams[{name!r}]": SCALAR}, {f"hparams[{name!r}]": value})
        if name in strengths:
            strengths[name].hparam.check(f"hparams[{name!r}]", float(value))
            continue
        if not 0 <= float(value) < math.inf or (name == "lr" and value == 0):
            least = "above 0" if name == "lr" else "0 or more"
            raise ValueError(f"hparams[{name!r}]={value!r} must be finite and {least}")
        if any(h.name == name and h.below_one for h in rule.hparams) and value >= 1:
            raise ValueError(f"hparams[{name!r}]={value!r} must be below 1")


ARGUMENTS: dict[str, Kind] = {
    **method.ARGUMENTS,
    **control.ARGUMENTS,
    "model": MODULE,
    "loss_fn": That(
        lambda f: f is None or (callable(f) and not isinstance(f, type)),
        "None, a function or an instance, such as nn.MSELoss()",
    ),
    "rule": NONE | Instance((AbstractRule,), "a rule, such as st.rules.AdamW()"),
    "hparams": NONE | MAPPING,
    "hyper_rate": NONE | Number(above=0),
    "schedule": OneOf(tuple(sorted(SHAPES))),
    "warmup_steps": Whole(least=0),
    "objective": NONE | FUNCTION,
    "augment": NONE | MODULE,
    "metrics": NONE | That(
        lambda m: isinstance(m, Mapping) and all(map(callable, m.values())) and "loss" not in m,
        "a dictionary of functions of output and target by name, {'accuracy': accuracy}, without "
        "'loss', which is the loss itself",
    ),
    "parallel": NONE | OneOf(("ddp", "fsdp")),
    "device": NONE | TEXT | Instance((torch.device,), "a torch.device"),
    "amp": FLAG,
    "compile": FLAG | OneOf(("auto",)),
    "population": COUNT,
    "exploit_every": COUNT,
    "seed": Whole(),
}  # fmt: skip
"""Valid values of the arguments of a tuner."""
FIT_ARGUMENTS: dict[str, Kind] = {
    "epochs": NONE | COUNT,
    "steps": NONE | COUNT,
    "log_dir": NONE | FOLDER,
    "callbacks": That(
        lambda c: isinstance(c, Sequence) and all(map(callable, c)), "a sequence of functions, [f]"
    ),
    "resume": FLAG | PATH,
    "patience": NONE | COUNT,
    "evaluate_every": NONE | COUNT,
    "checkpoint_every": NONE | COUNT,
    "log_every": NONE | COUNT,
    "pictures_every": NONE | COUNT,
    "progress": FLAG,
}
"""Valid values of the arguments of ``fit``."""


def device_of(device: str | torch.device) -> torch.device:
    """A device by name."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown: {error}") from error


def check_fit(values: Mapping[str, Any]) -> None:
    """Raise an error for invalid arguments of ``fit``."""
    check(FIT_ARGUMENTS, values)
    if values["pictures_every"] is not None and find_spec("matplotlib") is None:
        raise ImportError(
            f"pictures_every={values['pictures_every']} needs matplotlib: pip install matplotlib "
            "(extra report)"
        )
    if values["epochs"] is not None and batches_of(values["train"]) is not None:
        raise ValueError(
            f"epochs={values['epochs']}: structure.Batches change the number of batches in an "
            "epoch during the run: pass steps="
        )


def check_first(
    steps: Steps,
    run: RunState,
    streams: tuple[Stream, Stream],
    metrics: Mapping[str, Metric],
    *,
    mapped: bool,
) -> float:
    """Evaluate both objectives on first batches without side effects; return the validation loss.

    Args:
        steps: The steps.
        run: The initial run.
        streams: Training and validation batches.
        metrics: Functions of output and target by name.
        mapped: Whether members of a population are trained, by ``torch.func``.

    Raises:
        TypeError: A loss is not a tensor.
        ValueError: A loss is not a scalar, is not finite, or does not depend on the parameters; or
            a metric is not one number.
    """
    value = math.nan
    passes = (("train", steps.inner), ("val", steps.outer))
    for stream, (name, module) in zip(streams, passes, strict=True):
        batch = stream.peek()
        kept = buffers_kept(module.modules())
        with random_kept(run.step.device), steps.autocast(), kept, _explained():
            with torch.set_grad_enabled(not steps.group.sharded):
                loss = module(batch)
            _check_loss(loss, name)
            if not steps.group.sharded:  # whose graph holds the gathered weights
                _check_dependence(loss, name, module)
                if name == "val" and metrics and isinstance(module, Objective):
                    with torch.no_grad():
                        measured(metrics, *module.outputs(batch)[1:])
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


def check_ranks(group: Group, objective: nn.Module, streams: tuple[Stream, Stream]) -> None:
    """Raise an error if a rank's model or data differ from those of the first rank."""
    if not group.together:
        return
    tensors = [*objective.parameters(), *objective.buffers()]
    whole = not any(map(is_sharded, tensors))
    group.check_same(
        "weights and buffers of the model", digest(tensors, values=whole),
        "create it after torch.manual_seed(0), or load the same file on all ranks",
    )  # fmt: skip
    group.check_same(
        "lengths of train and val", [len(s) if s.sized else None for s in streams],
        "pass the loaders of a single process; each rank takes its part of every batch",
    )  # fmt: skip
    group.check_same(
        "the generators of train and val", digest(s for stream in streams for s in stream.own()),
        "use the same seed on all ranks",
    )  # fmt: skip


def check_agreement(steps: Steps, run: RunState) -> None:
    """Raise an error if weights, hyperparameters or batch sizes of ranks differ."""
    group = steps.group
    if not group.together:
        return
    weights = [] if group.sharded else run.weights
    size = 0 if steps.halved is None else steps.halved.batches.size
    group.check_same(
        "weights, hyperparameters and batch sizes",
        digest([*weights, run.hyper.raw, torch.tensor(size)]),
        "ranks must compute identically: do all have the same hardware and torch version?",
    )  # fmt: skip


def check_model(model: torch.nn.Module) -> None:
    """Raise an error for models without trainable parameters, or unsupported by torch.func."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model has no parameter that requires a gradient: unfreeze some with requires_grad_()"
        )
    if isinstance(model, SelfTuned):
        raise ValueError(
            "model was converted by st.hypernet.convert, for your own loop; the tuner tunes layers "
            "of selftune.nn without it: pass the plain model, or model.revert()"
        )
    for name, param in model.named_parameters():
        if torch.nn.parameter.is_lazy(param):
            raise ValueError(f"model: {name} is not initialised yet: call the model once before")
        if param.is_meta:
            raise ValueError(
                f"model: {name} is on the meta device: call model.to_empty(device=) and initialise "
                "its weights"
            )
        if param.requires_grad and param.is_complex():
            raise ValueError(f"model: {name} is complex ({param.dtype}); use torch.view_as_real")
    for name, module in model.named_modules():
        if getattr(module, "sparse", False):
            raise ValueError(f"model: {name} gives sparse gradients: create it with sparse=False")
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(
                f"model: {name} has max_norm={module.max_norm} and writes to its weights during a "
                "forward pass, which cannot be differentiated: create it with max_norm=None"
            )


@contextmanager
def _explained() -> Iterator[None]:
    """Explains errors from activation checkpoints that cannot be differentiated."""
    try:
        yield
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
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    unused = [n.removeprefix("model.") for n, g in zip(names, grads, strict=True) if g is None]
    if unused and name == "train":
        log.warning(
            "the loss on the first train batch does not depend on %s: weight decay and penalties "
            "shrink them all the same; freeze them with requires_grad_(False) if no loss does",
            ", ".join(unused),
        )
