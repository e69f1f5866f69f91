"""Saved runs: what is kept, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune.method import Displacement
from selftune.method.slopes import Slopes
from selftune.method.stiff_directions import Stiffness
from selftune.optim._engine import Engine
from selftune.optim._groups import Groups

VERSION = 12
"""Of what is kept; 12 is that of the method shared with the tuner."""


def pack(engine: Engine, groups: Groups, rule: str) -> dict[str, Any]:
    """The engine's state as tensors, numbers and strings, which ``weights_only`` loads."""
    signal = engine.training_signal
    return {
        "version": VERSION,
        "rule": rule,
        "tuned": [f"{n} per {t.scope}" for n, t in engine.shifts.rows.items()],
        "shifts": engine.shifts.state_dict(),
        "groups": groups.state_dict(),
        "clock": asdict(engine.clock),
        "displacement": _numbers(engine.store.displacement),
        "stiffness": _numbers(engine.store.stiffness),
        "controller": engine.controller.state_dict(),
        "buffers": engine.buffers.state_dict(),
        "looked": engine.looked,
        "training_signal": None if signal is None else signal.clone(),
        "slopes": {n: [t.clone() for t in ts] for n, ts in vars(engine.slopes).items()},
    }


def unpack(engine: Engine, groups: Groups, run: Mapping[str, Any]) -> None:
    """Put a packed state into an engine whose blocks are laid out already."""
    engine.shifts.load_state_dict(run["shifts"])
    groups.load_state_dict(run["groups"])
    for name, value in run["clock"].items():
        setattr(engine.clock, name, value)
    parts = {n: t.to("cpu", copy=True) for n, t in run["displacement"].items()}
    engine.store.displacement = Displacement([], [], **parts)
    device = engine.blocks[0].layout.device
    engine.store.stiffness = Stiffness(
        **{n: t.to(device, copy=True) for n, t in run["stiffness"].items()}
    )
    engine.controller.load_state_dict(run["controller"])
    signal = run["training_signal"]
    engine.training_signal = None if signal is None else signal.to(device, copy=True)
    engine.slopes = Slopes(
        **{n: [t.to(device, copy=True) for t in ts] for n, ts in run["slopes"].items()}
    )
    engine.buffers.load_state_dict(run["buffers"])
    engine.buffers.expect(p for block in engine.blocks for p in block.params)
    engine.looked = run["looked"]


def _numbers(state: NamedTuple | None) -> dict[str, Tensor]:
    """The tensors of a state that do not grow with the weights."""
    found = {} if state is None else state._asdict()
    return {n: t.clone() for n, t in found.items() if isinstance(t, torch.Tensor)}


def check_state(
    state: Mapping[str, Any], engine: Engine, rule: str, groups: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a state of another kind of run before anything is touched."""
    saved = state["param_groups"]
    run = saved[0].get("selftune") if saved else None
    if run is None:
        raise ValueError(
            "state_dict holds no selftune state: it is a plain torch optimizer's. Start the "
            "self-tuned run from the model's weights alone"
        )
    if run["version"] != VERSION:
        raise ValueError(
            f"state_dict is of version {run['version']}, this selftune reads version {VERSION}: "
            "finish the run with the selftune that saved it, or start anew from its weights"
        )
    _match("rule", run["rule"], rule)
    tuned = [f"{n} per {t.scope}" for n, t in engine.shifts.rows.items()]
    _match("set of tuned hyperparameters", list(run["tuned"]), tuned)
    sizes = [len(g["params"]) for g in saved]
    _match("parameter groups (sizes)", sizes, [len(g["params"]) for g in groups])
    params = [p for g in groups for p in g["params"]]
    order = [i for g in saved for i in g["params"]]
    for index, param in zip(order, params, strict=True):
        average = state["state"].get(index, {}).get("average")
        if isinstance(average, Tensor):
            _match(f"shape of parameter {index}", tuple(average.shape), tuple(param.shape))
    stiffness = engine.store.stiffness
    if stiffness is not None:
        _match("number of secant pairs", len(run["stiffness"]["rises"]), len(stiffness.rises))
    for name, base in run["shifts"]["base"].items():
        have = len(engine.shifts.rows[name].base)
        _match(f"number of tensors for {name!r}", len(base), have)


def _match(what: str, saved: Any, mine: Any) -> None:
    if saved != mine:
        raise ValueError(
            f"state_dict does not fit: its {what} is {saved!r}, this optimizer's is {mine!r}. "
            "Build the optimizer as it was when the state was saved"
        )
