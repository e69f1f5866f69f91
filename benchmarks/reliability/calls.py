"""Wrong calls: every argument of the public face with values that cannot be.

A call is well refused if it raises ``TypeError`` or ``ValueError`` (or what is listed) with the
name of the argument in the message; anything else is obscure, and no error is a silent acceptance.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import selftune as st
from benchmarks.reliability.invalid_values import COUNT, FLAG, INF, NAN, PARTS, SIZE, THING

TUNING: dict[str, tuple[Any, ...]] = {
    "tune": ("lr", 3, ("lrs",), ("lr", "nothing")),
    "per": ("layer", 3, {"lr": "each"}, {"nothing": "run"}),
    "bounds": (
        3, {"lr": (1.0, 0.1)}, {"lr": (-1.0, 1.0)}, {"lr": (NAN, 1.0)}, {"nothing": (0.1, 1.0)},
        {"lr": 3}, {"lr": (0.1,)}, [("lr", 0.1)],
    ),
    "schedule": ("cosin", 3, "cosine", []),
    "total_steps": (0, -5, 9.5, NAN, "100"),
    "warmup_steps": (-1, 2.5, NAN, "5"),
    "estimator": THING,
    "average": (0.98, "long", object()),
    "hyper_optimizer": (3, "adam", object()),
    "every": COUNT,
    "probe": (1, -3, 2.5, NAN, 10**9, "no", [2]),
    "guard": ("no", 3, [], st.control.GuardPolicy),
    "model": (3, "net", nn.Linear),
    "log_dir": (3, 2.5, object()),
    "name": (3, 2.5, object()),
    "distributed": ("no", 3, []),
    "settings": (3, "fast", {}, st.method.MethodSettings),
    "tangents": (torch.int8, "bf16", 16, 0.0, -0.5, NAN, True),
    "snapshots": ("disk", 3, True),
    "hyper_rate": SIZE,
    "nothing_like_it": (1,),
}  # fmt: skip
OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (0.0, -0.1, NAN, INF, "0.1", [0.1], None),
    "momentum": (1.0, -0.1, NAN, "0.9", None),
    "betas": ((0.9, 1.0), (0.9,), 0.9, (-0.1, 0.9), (NAN, 0.9), "ab"),
    "dampening": (NAN, INF, "0"),
    "alpha": (1.0, -0.1, NAN, "0.9"),
    "eps": (-1.0, NAN, INF, "0"),
    "weight_decay": SIZE,
    "decay": SIZE,
    "l1": SIZE,
    "nesterov": FLAG,
    "amsgrad": FLAG,
    "centered": FLAG,
    "maximize": FLAG,
    "penalty": (3, "l1", object()),
    "capturable": (True,),
    "ns_coefficients": ((1.0, 2.0), 3.0, "abc", (1.0, 2.0, NAN)),
    "ns_steps": (0, 2.5, 100, "5"),
    "adjust_lr_fn": ("rms", 1, True),
    "adamw_eps": (-1.0, NAN, INF, "0"),
    "lr_ratio": (0.0, -1.0, NAN, INF, "1"),
}
TUNER: dict[str, tuple[Any, ...]] = {
    **{n: v for n, v in TUNING.items() if n in (
        "tune", "bounds", "estimator", "average", "every", "probe", "guard", "settings",
        "tangents", "snapshots",
        "nothing_like_it",
    )},
    "model": (3, "net", nn.Linear, nn.Identity()),
    "loss_fn": (3, "mse", [], nn.MSELoss),
    "rule": THING,
    "hparams": (
        3, {"lr": -1.0}, {"lr": 0.0}, {"lr": NAN}, {"lr": "high"}, {"momentun": 0.9},
        {"beta1": 1.0}, {"weight_decay": INF},
    ),
    "penalty": (3, "l1", object()),
    "hyper_rate": (NAN, -1.0, 0.0, "0.1"),
    "schedule": ("cosin", 3, None),
    "warmup_steps": (-1, 2.5, NAN, "5"),
    "objective": (3, "mse"),
    "augment": (3, "flip"),
    "metrics": (3, "accuracy", [len], {"accuracy": 3}),
    "device": (3.5, "abacus", []),
    "parallel": ("dp", 2, True, [], "fsdp", "ddp"),  # without torchrun
    "amp": FLAG,
    "compile": ("always", 2, None),
    "population": COUNT,
    "exploit_every": COUNT,
    "seed": (1.5, "0", NAN, None),
}  # fmt: skip
FIT: dict[str, tuple[Any, ...]] = {
    "train": (3, None, [], "batches"),
    "val": (3, -0.1, NAN, [], None),
    "epochs": COUNT,
    "steps": COUNT,
    "patience": COUNT,
    "evaluate_every": COUNT,
    "checkpoint_every": COUNT,
    "log_every": COUNT,
    "pictures_every": COUNT,
    "log_dir": (3, 2.5),
    "recorder": (3, object()),
    "callbacks": (print, [3], 3),
    "resume": (3, None),
    "progress": FLAG,
    "nothing_like_it": (1,),
}
BEYOND: dict[str, tuple[Any, ...]] = {"probe": (3, 50), "warmup_steps": (3, 10**6)}
"""Options of a tuner that do not fit a run of three steps."""


@dataclass(frozen=True)
class Call:
    """A wrong call.

    Attributes:
        face: What is called.
        argument: The one that is wrong.
        value: Of it.
        make: Makes the call.
    """

    face: str
    argument: str
    value: Any
    make: Callable[[], Any]

    def verdict(self) -> str:
        """``""`` where it is refused by name, or what happened instead."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.make()
        except (TypeError, ValueError, ImportError) as error:
            named = re.search(rf"\b{self.argument}\b", str(error)) and (
                "unexpected keyword" not in str(error) or self.argument == "nothing_like_it"
            )
            return "" if named else f"obscure: {type(error).__name__}: {error}"
        except Exception as error:
            return f"obscure: {type(error).__name__}: {error}"
        return "accepted"

    def __str__(self) -> str:
        return f"{self.face}({self.argument}={self.value!r})"


def net() -> nn.Module:
    """A small one."""
    return nn.Linear(2, 1)


def batches() -> list[Any]:
    """A few."""
    x = torch.ones(8, 2)
    return [(a, a.sum(1, keepdim=True)) for a in x.split(2)]


def shells() -> Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]:
    """Makers of the optimizers, and the options that each has."""
    common = ("lr", "weight_decay", "decay", "l1", "maximize", "penalty", "capturable")
    return {
        "SGD": (st.SGD, (*common, "momentum", "dampening", "nesterov")),
        "Adam": (st.Adam, (*common, "betas", "eps", "amsgrad")),
        "AdamW": (st.AdamW, (*common, "betas", "eps", "amsgrad")),
        "RMSprop": (st.RMSprop, (*common, "momentum", "alpha", "eps", "centered")),
        "Lion": (st.Lion, (*common, "betas")),
        "Muon": (_muon, (*common, *MUON)),
        "SelfTuning": (_wrapped, ()),
    }  # fmt: skip


MUON = (
    "momentum", "betas", "eps", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn",
    "adamw_eps", "lr_ratio",
)  # fmt: skip


def _muon(net: nn.Module, **options: Any) -> Any:
    return st.Muon([net.weight], **options)


def _wrapped(net: nn.Module, **options: Any) -> Any:
    return st.SelfTuning(torch.optim.NAdam(net.parameters()), **options)


def _tuner(**options: Any) -> Any:
    return st.Tuner(**{"model": net(), "loss_fn": mse, **options})


def calls() -> Iterator[Call]:
    """All of them."""

    def call(face: str, function: Callable[..., Any], name: str, value: Any) -> Call:
        return Call(face, name, value, lambda: function(**{name: value}))

    for face, (make, own) in shells().items():
        wrong = {**TUNING, **{n: OPTIONS[n] for n in own}}
        for name, values in wrong.items():
            for value in values:
                yield call(face, lambda make=make, **o: make(net(), **o), name, value)
    for name, values in TUNER.items():
        for value in values:
            yield call("Tuner", _tuner, name, value)
    for name, values in FIT.items():
        for value in values:
            yield call("fit", lambda **o: _fit(o), name, value)
    for name, values in BEYOND.items():
        for value in values:
            yield call("Tuner.fit", lambda **o: _fit({}, **o), name, value)
    for face, (make, table) in PARTS.items():
        for name, values in table.items():
            for value in values:
                yield call(face, make, name, value)


mse = nn.functional.mse_loss


def _fit(options: Mapping[str, Any], **tuner: Any) -> Any:
    lengths = {} if {"steps", "epochs"} & options.keys() else {"steps": 3}
    given = {"train": batches()[:3], "val": batches()[3:], "progress": False, **lengths, **options}
    made = st.Tuner(net(), mse, compile=False, **tuner)
    return made.fit(given.pop("train"), given.pop("val"), **given)
