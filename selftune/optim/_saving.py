"""Saved runs: what is kept, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from selftune.optim._engine import Engine
from selftune.optim._groups import Groups

VERSION = 11
"""Of what is kept; 11 holds the last step of a rate on trial."""


def pack(engine: Engine, groups: Groups, rule: str) -> dict[str, Any]:
    """The engine's state as tensors, numbers and strings, which ``weights_only`` loads."""
    return {
        "version": VERSION,
        "rule": rule,
        "tuned": [f"{n} per {t.scope}" for n, t in engine.tuning.rows.items()],
        "tuning": engine.tuning.state_dict(),
        "groups": groups.state_dict(),
        "clock": asdict(engine.clock),
        "travel": engine.travel.state_dict(),
        "ending": engine.ending.state_dict(),
        "settled": engine.hypergradients.settled.state_dict(),
        "probe": None if engine.probe is None else engine.probe.state_dict(),
        "guard": None if engine.guard is None else engine.guard.state_dict(),
        "buffers": engine.buffers.state_dict(),
        "heard": engine.heard,
        "alone": None if engine.alone is None else engine.alone.clone(),
        "last": None if engine.last is None else [[t.clone() for t in p] for p in engine.last],
    }


def unpack(engine: Engine, groups: Groups, run: Mapping[str, Any]) -> None:
    """Put a packed state into an engine whose blocks are laid out already."""
    engine.tuning.load_state_dict(run["tuning"])
    groups.load_state_dict(run["groups"])
    for name, value in run["clock"].items():
        setattr(engine.clock, name, value)
    engine.travel.load_state_dict(run["travel"])
    engine.ending.load_state_dict(run["ending"])
    engine.hypergradients.settled.load_state_dict(run["settled"])
    if engine.probe is not None:
        if run["probe"] is None:
            engine.probe.ended = True
        else:
            engine.probe.load_state_dict(run["probe"])
    if engine.guard is not None and run["guard"] is not None:
        engine.guard.load_state_dict(run["guard"])
    engine.alone = None if run["alone"] is None else run["alone"].clone()
    engine.last = None if run["last"] is None else [(g.clone(), w.clone()) for g, w in run["last"]]
    engine.buffers.load_state_dict(run["buffers"])
    engine.buffers.expect(p for block in engine.blocks for p in block.params)
    engine.heard = run["heard"]


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
    _match("version", run["version"], VERSION)
    _match("rule", run["rule"], rule)
    tuned = [f"{n} per {t.scope}" for n, t in engine.tuning.rows.items()]
    _match("set of tuned hyperparameters", list(run["tuned"]), tuned)
    sizes = [len(g["params"]) for g in saved]
    _match("parameter groups (sizes)", sizes, [len(g["params"]) for g in groups])
    params = [p for g in groups for p in g["params"]]
    order = [i for g in saved for i in g["params"]]
    for index, param in zip(order, params, strict=True):
        average = state["state"].get(index, {}).get("average")
        if isinstance(average, Tensor):
            _match(f"shape of parameter {index}", tuple(average.shape), tuple(param.shape))
    for name, base in run["tuning"]["base"].items():
        have = len(engine.tuning.rows[name].base)
        _match(f"number of tensors for {name!r}", len(base), have)


def _match(what: str, saved: Any, mine: Any) -> None:
    if saved != mine:
        raise ValueError(
            f"state_dict does not fit: its {what} is {saved!r}, this optimizer's is {mine!r}. "
            "Build the optimizer as it was when the state was saved"
        )
