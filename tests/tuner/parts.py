"""The steps of a run without a tuner, which the tests of its parts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import selftune as st
from selftune.hparams import choose
from selftune.method import Average, HyperOptimizer, Method, MethodSettings, Sensitivities
from selftune.tuner._objective import Objective, for_tuning
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps
from selftune.update import Update

Batch = tuple[Tensor, Tensor]
RULES: dict[str, tuple[st.rules.AbstractRule, dict[str, float]]] = {
    "SGD": (st.rules.SGD(), dict(lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "Adam": (st.rules.Adam(), dict(lr=0.01, weight_decay=1e-3)),
    "AdamW": (st.rules.AdamW(), dict(lr=0.01, weight_decay=0.1)),
    "RMSprop": (st.rules.RMSprop(), dict(lr=0.01, momentum=0.5, weight_decay=1e-3)),
    "Lion": (st.rules.Lion(), dict(lr=1e-3, weight_decay=0.1)),
}


def batches(count: int, seed: int = 0, size: int = 8) -> list[Batch]:
    """Of four inputs and two targets, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 4, generator=generator).double(),
            torch.randn(size, 2, generator=generator).double(),
        )
        for _ in range(count)
    ]


def net(*, norm: bool = False, width: int = 6) -> nn.Module:
    """For these batches."""
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(width)] if norm else []
    # A bias before a norm has a gradient of nothing but rounding, which Adam makes large.
    first = nn.Linear(4, width, bias=not norm)
    return nn.Sequential(first, *middle, nn.Tanh(), nn.Linear(width, 2)).double()


def made(
    model: nn.Module,
    rule: st.rules.AbstractRule,
    *,
    tune: Sequence[str] = ("lr",),
    values: dict[str, Any] | None = None,
    loss: Any = F.mse_loss,
    penalties: tuple[Any, ...] = (),
    every: int = 5,
    estimator: st.Trace | None = None,
    average: Average | None = None,
    storage: torch.dtype | None = None,
    settings: MethodSettings | None = None,
    guarded: bool = False,
    horizon: int = 1000,
    device: str = "cpu",
    rates: Tensor | None = None,
    joined: bool = False,
) -> tuple[Steps, RunState]:
    """Steps and a run at its start, on the model's own tensors."""
    update, settings = Update(rule, penalties), settings or MethodSettings()
    known = {**dict.fromkeys(update.hparams, 0.0), **rule.defaults, **(values or {})}
    objective = Objective(model.to(device), loss, None)
    hyper = HyperOptimizer(choose(update.hparams, tune, None, horizon), size=0.05)
    steps = Steps(
        inner=objective,
        outer=for_tuning(objective, every),
        method=Method(
            sensitivities=Sensitivities(
                hyper.names, update, estimator or st.Trace(stride=every), average or Average(),
                storage,
            ),
            hyper=hyper, settings=settings, horizon=horizon, guarded=guarded,
        ),
        options={k: v for k, v in known.items() if k not in tune},
        rates=(torch.ones(1) if rates is None else rates).to(device, torch.float64),
        every=every,
        joined=joined,
    )  # fmt: skip
    return steps, steps.begin(known)


def make(
    model: nn.Module, rule: str = "SGD", values: dict[str, float] | None = None, **parts: Any
) -> tuple[Steps, RunState]:
    step, given = RULES[rule]
    steps, run = made(model, step, values={**given, **(values or {})}, **parts)
    # The first run shares the model's tensors; a copy keeps the tests' models as they are.
    return steps, tree_map(torch.clone, run)


def trained(steps: Steps, run: RunState, data: list[Batch], stride: int = 1) -> RunState:
    """The run after training steps, each stride-th of them tracked."""
    for step, batch in enumerate(data, start=1):
        run, _ = steps.train(run, batch, tracked=step % stride == 0)
    return run


def write(run: Any, after: Any) -> None:
    """Copy the tensors of another tree into one's."""
    for old, new in zip(tree_leaves(run), tree_leaves(after), strict=True):
        if new is not old:
            old.copy_(new)


def assert_same(one: Any, other: Any, **tolerance: Any) -> None:
    """The same trees of tensors; bit for bit where no tolerance is given."""
    tolerance = tolerance or dict(rtol=0, atol=0)
    for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
