"""Checks before training: errors name the argument, the value and the remedy."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

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
from selftune.hypernet import SelfTuned
from selftune.nn import Strength
from selftune.penalties import AbstractPenalty
from selftune.rules import AbstractRule
from selftune.schedules import SHAPES
from selftune.tuner._data import Stream, batches_of
from selftune.tuner._group import Group
from selftune.tuner._result import History
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps

log = logging.getLogger("selftune")


def check_hparams(
    given: Mapping[str, Any],
    rule: AbstractRule,
    strengths: Mapping[str, Strength],
    penalties: Sequence[AbstractPenalty],
) -> None:
    names = set(rule.defaults) | {"lr", "decay", "weight_decay", "l1"}
    for what, owned in (
        ("hyperparameters of the update", names | {p.name for p in penalties}),
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
        known = next((h for h in rule.hparams if h.name == name), None)
        least = 0.0 if known is None else known.least
        allowed = math.isfinite(value) and value >= least
        if not allowed or (name == "lr" and value == 0):
            lowest = "above 0" if name == "lr" else "0 or more"
            raise ValueError(f"hparams[{name!r}]={value!r} must be finite and {lowest}")
        if known is not None and known.below_one and value >= 1:
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
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown: {error}") from error


def check_fit(group: Group, values: Mapping[str, Any]) -> None:
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
    if group.together:
        _check_meetings(group, values)


def _check_meetings(group: Group, arguments: Mapping[str, Any]) -> None:
    """Raise an error if arguments of ``fit`` that decide when ranks meet differ on a rank."""
    lengths = ("epochs", "steps", "evaluate_every", "checkpoint_every", "log_every", "patience",
               "pictures_every")  # fmt: skip
    for name in lengths:
        group.check_same(f"{name} of fit", arguments[name], "pass the same on all ranks")
    for name in ("callbacks", "log_dir", "recorder"):
        group.check_same(
            f"{name} of fit (whether passed)", arguments[name] not in (None, (), []),
            "pass it on all ranks; the first one writes",
        )  # fmt: skip


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
        digest([*weights, run.hyper.raw, torch.tensor(size, device="cpu")]),
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
