"""Checks of arguments: errors name the argument, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selftune.hparams import MOMENTUM, Hparam

_LOW = (torch.float16, torch.bfloat16, torch.float32)


def check_params(named: Iterable[tuple[str, Tensor]]) -> None:
    first: Tensor | None = None
    seen: dict[int, str] = {}
    starts: dict[int, str] = {}  # of the memory of each
    for name, param in named:
        if id(param) in seen:
            raise ValueError(f"params: {name} duplicates {seen[id(param)]}; pass it once")
        seen[id(param)] = name
        if param.is_complex():
            raise ValueError(f"params: {name} is complex ({param.dtype}); use torch.view_as_real")
        if not param.is_floating_point():
            raise ValueError(
                f"params: {name} has dtype {param.dtype}; only floating-point tensors are trained"
            )
        if param.layout != torch.strided:
            raise ValueError(f"params: {name} is {param.layout}; only dense tensors can be tuned")
        if type(param) in (Tensor, nn.Parameter) and param.numel() and param.device.type != "meta":
            other = starts.setdefault(param.data_ptr(), name)
            if other != name:
                raise ValueError(
                    f"params: {name} shares its memory with {other}; tie them by assigning the "
                    "same nn.Parameter to both, instead of its .data; if the model has replaced "
                    "one of them (as weight_norm does), remove that from its group first"
                )
        first = param if first is None else first
        if param.device != first.device:
            raise ValueError(
                f"params: {name} is on {param.device}, others are on {first.device}; move the "
                "model to one device, or use one optimizer for each"
            )
        if param.dtype != first.dtype and not {param.dtype, first.dtype} <= set(_LOW):
            raise ValueError(
                f"params: {name} is {param.dtype}, others are {first.dtype}; convert the model "
                "to one dtype (float16, bfloat16 and float32 may be mixed)"
            )


def check_group(group: Mapping[str, Any], hparams: Iterable[Hparam]) -> None:
    known = set()
    for hparam in hparams:
        check_option(hparam, group)
        known.add(hparam.name)
    if MOMENTUM.name not in known:  # another optimizer's ``momentum`` is not checked
        return
    momentum = group.get(MOMENTUM.name, 0.0)
    if group.get("nesterov") and (momentum <= 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov=True with momentum={momentum}, dampening={group['dampening']}: "
            "Nesterov's momentum needs momentum above 0 and dampening=0"
        )


def check_option(hparam: Hparam, group: Mapping[str, Any]) -> None:
    key = hparam.option or hparam.name
    value = group[key]
    if hparam.role == "rate" and not 0 < float(value) < math.inf:
        raise ValueError(
            f"lr={float(value)} must be finite and above 0: a learning rate is tuned in log space. "
            "To hold parameters fixed, leave them out or use requires_grad_(False)"
        )
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if not (math.isfinite(number) and float(number) >= hparam.least):
            least = "" if hparam.least < 0 else ", 0 or more"
            raise ValueError(f"{key}={value!r} must be a finite number{least}")
        if hparam.below_one and float(number) >= 1:
            raise ValueError(f"{key}={value!r} must be below 1")


def check_gradient(name: str, grad: Tensor) -> None:
    if grad.is_sparse:
        raise ValueError(f"the gradient of {name} is sparse; build its embedding with sparse=False")


def check_outer_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"closure returned {type(loss).__name__}; return the validation loss alone, a scalar "
            "tensor with its graph (no .item(), no backward)"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"closure returned a tensor of shape {tuple(loss.shape)}; return a scalar, "
            "for example loss.mean()"
        )
    if loss.is_complex():
        raise ValueError(
            f"closure returned a loss of dtype {loss.dtype}; return a real one, for example "
            "loss.real or loss.abs()"
        )
    if not loss.requires_grad:
        raise ValueError(
            "closure returned a loss without a graph (detached, or computed under no_grad); "
            "return it with its graph, which hyper_step differentiates"
        )


def check_dependence(grads: Sequence[Tensor | None]) -> None:
    if all(g is None for g in grads):
        raise ValueError(
            "closure returned a loss that does not depend on any of this optimizer's "
            "parameters; compute it with the model that is being trained"
        )
