"""Saving and loading of runs, with checks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from selftune._files import load
from selftune._identity import differences
from selftune.estimators import MEMORIES
from selftune.method import Displacement
from selftune.method.slopes import Slopes
from selftune.method.stiff_directions import Stiffness
from selftune.optim._block import Look
from selftune.optim._engine import Engine
from selftune.optim._groups import Groups
from selftune.optim._logging import OptimizerLog

VERSION = 33
"""Version of the state; 33 has the slopes of each rank's shards."""


def to_bytes(run: Mapping[str, Any]) -> bytes:
    """A packed run as one value, because distributed checkpoints flatten dictionaries."""
    file = io.BytesIO()
    torch.save(run, file)
    return file.getvalue()


def from_bytes(run: Any) -> dict[str, Any]:
    """The packed run."""
    try:
        run_state: dict[str, Any] = load(io.BytesIO(run), MEMORIES)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "state_dict is incomplete: param_groups[0]['selftune'] contains no selftune run "
            f"({error})"
        ) from error
    return run_state


def pack(engine: Engine, groups: Groups, log: OptimizerLog, rule: str) -> dict[str, Any]:
    """The run's state as tensors, numbers and strings, which ``weights_only`` loads."""
    signal = engine.training_signal
    engine.notice_growth()  # first gradients since the last hyperparameter step
    buffers = engine.buffers.state_dict(engine.params)
    restored = engine.restored
    if restored is not None and restored.changed and not buffers["training"]:
        buffers["training"] = [t.clone() for t in restored.statistics]
    return {
        "version": VERSION,
        "rule": rule,
        "settings": dict(engine.identity),
        "tuned": [f"{n} per {t.scope}" for n, t in engine.shifts.rows.items()],
        "shifts": engine.shifts.state_dict(),
        "hyper_optimizer": engine.shifts.optimizer_name,
        "groups": groups.state_dict(),
        "clock": asdict(engine.clock),
        "displacement": _numbers(engine.store.displacement),
        "stiffness": _numbers(engine.store.stiffness),
        "controller": engine.controller.state_dict(),
        "buffers": buffers,
        "looked": engine.first_loss_seen,
        "unreached": None if engine.unreached is None else engine.places_of(engine.unreached),
        "searches": engine.searches,
        "zeros": [
            {
                i: [None if n is None else int(n) for n in engine.looks[p]]
                for i, p in enumerate(block.params)
                if p in engine.looks
            }
            for block in engine.blocks
        ],
        "inner": engine.stepper.rest(),
        "whole": None if engine.whole is None else engine.whole.saved(),
        "shown": bool(engine.training_weights()),
        "training_signal": None if signal is None else signal.clone(),
        "log": log.state_dict(),
        "shard": engine.reducer.shard,
        "slopes": {n: [t.clone() for t in ts] for n, ts in vars(engine.slopes).items()},
    }


def unpack(engine: Engine, groups: Groups, run: Mapping[str, Any]) -> None:
    """Load a packed state into an engine with blocks."""
    engine.shifts.load_state_dict(run["shifts"])
    groups.load_state_dict(run["groups"])
    vars(engine.clock).update(run["clock"])
    parts = {n: t.to("cpu", copy=True) for n, t in run["displacement"].items()}
    engine.store.displacement = Displacement([], [], **parts)
    device = engine.blocks[0].layout.device
    engine.store.stiffness = Stiffness(
        **{n: t.to(device, copy=True) for n, t in run["stiffness"].items()}
    )
    engine.controller.load_state_dict(run["controller"])
    engine.stepper.restore(run["inner"])
    if engine.whole is not None:
        engine.whole.restore(tree_map_only(Tensor, lambda t: t.to(device), run["whole"]))
    signal = run["training_signal"]
    engine.training_signal = None if signal is None else signal.to(device, copy=True)
    mine = run["shard"] == engine.reducer.shard  # distributed checkpoints have the first rank's
    slopes = run["slopes"] if mine else {}
    engine.slopes = Slopes(**{n: [t.to(device, copy=True) for t in ts] for n, ts in slopes.items()})
    unreached, params = run["unreached"], engine.params
    engine.unreached = None if unreached is None else {params[i] for i in unreached}
    engine.searches = run["searches"]
    engine.buffers.load_state_dict(run["buffers"], params, growing=engine.searching)
    engine.buffers.expect(engine.params)
    engine.first_loss_seen = run["looked"]
    engine.unused = None
    engine.notice_growth()
    engine.looks = {
        block.params[index]: Look(*look)
        for block, looks in zip(engine.blocks, run["zeros"], strict=False)
        for index, look in looks.items()
    }


def _numbers(state: NamedTuple | None) -> dict[str, Tensor]:
    """The tensors of a state whose sizes do not depend on the weights."""
    tensors = {} if state is None else state._asdict()
    return {n: t.clone() for n, t in tensors.items() if isinstance(t, torch.Tensor)}


def check_state(
    state: Mapping[str, Any],
    engine: Engine,
    whole: Mapping[str, Any],
    mine: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Check a state before loading, and return its packed run."""
    for key in ("state", "param_groups"):
        if key not in state:
            raise ValueError(f"state_dict is incomplete: it lacks {key!r}")
    saved = state["param_groups"]
    if not saved or saved[0].get("selftune") is None:
        raise ValueError(
            "state_dict has no selftune state: it is from a plain torch optimizer. Start the "
            "self-tuned run from the model's weights alone"
        )
    run = from_bytes(saved[0]["selftune"])
    if run.get("version") != VERSION:
        raise ValueError(
            f"state_dict has version {run.get('version')}, but this selftune reads version "
            f"{VERSION}: finish the run with the selftune that saved it, or start a new run from "
            "its weights"
        )
    match("rule", run.get("rule"), whole["rule"])
    other = differences(run.get("settings", {}), whole["settings"])
    if other:
        raise ValueError(
            f"state_dict is from another run: {'; '.join(other)}. Build the optimizer as it was "
            "when the state was saved"
        )
    match("set of tuned hyperparameters", list(run.get("tuned", ())), whole["tuned"])
    _complete(run, whole)
    match("hyper_optimizer", run["hyper_optimizer"], whole["hyper_optimizer"])
    sizes = [len(g["params"]) for g in saved]
    match("list of group sizes", sizes, [len(g["params"]) for g in mine])
    for index, (there, here) in enumerate(zip(saved, mine, strict=True)):
        missing = sorted(here.keys() - there.keys() - {"initial_lr", "param_names", "selftune"})
        if missing:
            raise ValueError(f"state_dict is incomplete: param_groups[{index}] lacks {missing}")
    params = [p for g in mine for p in g["params"]]
    order = [i for g in saved for i in g["params"]]
    begun = run["clock"]["steps"] > 0  # the rule's state has been saved
    keys = {id(b): b.keys | set(b.part.rule if begun else ()) for b in engine.blocks}
    owners = {id(p): block for block in engine.blocks for p in block.params}
    for index, param in zip(order, params, strict=True):
        entry, shape = state["state"].get(index, {}), tuple(param.shape)
        if isinstance(entry.get("average"), Tensor):
            match(f"shape of parameter {index}", tuple(entry["average"].shape), shape)
        block = owners.get(id(param))
        if block is None:  # frozen
            continue
        for name in {*block.part.rule, *block.snapshots} & entry.keys():
            match(f"shape of {name} of parameter {index}", tuple(entry[name].shape), shape)
        wanted = keys[id(block)] | ({"training"} if run["shown"] else set())
        missing = sorted(wanted - entry.keys())
        if missing == ["training"]:
            raise ValueError(
                f"state_dict is incomplete: it was saved after eval(), but parameter {index} lacks "
                "its training weights. torch.distributed.checkpoint loads what the new optimizer "
                "has: call its eval() before get_state_dict, and train() after set_state_dict"
            )
        if not entry:
            raise ValueError(
                f"state_dict is incomplete: it has no state of parameter {index}. If that was "
                "frozen when the state was saved, freeze it before load_state_dict; it may be "
                "unfrozen afterwards"
            )
        if missing:
            raise ValueError(f"state_dict is incomplete: parameter {index} lacks {missing}")
    stiffness = engine.store.stiffness
    if stiffness is not None:
        match("number of secant pairs", len(run["stiffness"]["rises"]), len(stiffness.rises))
    for name, base in run["shifts"]["base"].items():
        have = len(engine.shifts.rows[name].base)
        match(f"number of tensors for {name!r}", len(base), have)
    return run


OPEN = ("swept", "training_signal", "slopes", "optimizer", "zeros", "inner", "whole")
"""Parts whose content depends on the progress of the run."""
KEYED = ("groups", "buffers")
"""Parts with known keys, whose values depend on the progress of the run."""


def _complete(saved: Any, mine: Any, where: str = "its run") -> None:
    """Raise an error for a state without a required part."""
    if not isinstance(mine, Mapping):
        if isinstance(mine, Tensor) != isinstance(saved, Tensor):
            raise ValueError(
                f"state_dict is incomplete: {where} is a {type(saved).__name__}, but must be a "
                f"{type(mine).__name__}"
            )
        return
    missing = sorted(mine.keys() - (saved.keys() if isinstance(saved, Mapping) else ()))
    if missing:
        raise ValueError(f"state_dict is incomplete: {where} lacks {missing}")
    for name in mine.keys() - set(OPEN):
        part = dict.fromkeys(mine[name]) if name in KEYED else mine[name]
        if saved[name] is not None and part is not None:
            _complete(saved[name], part, f"{where}[{name!r}]")


def match(what: str, saved: Any, mine: Any) -> None:
    if saved != mine:
        raise ValueError(
            f"state_dict does not fit: its {what} is {saved!r}, this optimizer's is {mine!r}. "
            "Build the optimizer as it was when the state was saved"
        )
