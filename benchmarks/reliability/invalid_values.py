"""Invalid values for each argument of everything public beside the drivers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import selftune as st
from selftune import search

NAN, INF = math.nan, math.inf
COUNT = (0, -1, 2.5, NAN, "5", [5], True)
"""Wrong for a number of steps."""
SIZE = (-1, -0.5, NAN, INF, "0.1", [0.1])
"""Wrong for a strength or size."""
SHARE = (*SIZE, 1.5)
"""Wrong for a probability."""
FLAG = ("no", 2, None, [])
THING = (3, "thing", object(), [])
"""Wrong for an object of the library, or a function."""
TEXT = (3, None, ["name"])
MODULE = (3, "net", None, nn.Linear)
WRONG_PAIRS: tuple[list[Any], ...] = ([[0, NAN]], [[0, "a"]], [], [[2, 1.0], [0, 1.0]])

Table = dict[str, tuple[Any, ...]]
Part = tuple[Callable[..., Any], Table]


def _gated() -> nn.Module:
    """A small network with gates."""
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), st.structure.Gate(4), nn.Linear(4, 1))


STRUCTURE: Mapping[str, Part] = {
    "Gate": (partial(st.structure.Gate, units=4), {
        "units": COUNT, "dim": (1.5, NAN, "1", None), "batch_dim": (0.5, NAN, "0", None),
    }),
    "Choice": (st.structure.Choice, {
        "branches": (3, None, [], [nn.ReLU], [nn.ReLU()], nn.ReLU(), [nn.ReLU(), 3]),
    }),
    "Optional": (partial(st.structure.Optional, block=nn.Linear(2, 2)), {
        "block": MODULE, "residual": FLAG, "batch_dim": (0.5, "0", None),
    }),
    "Recurrent": (st.structure.Recurrent, {"cell": (*MODULE, nn.RNN(2, 2), nn.Linear(2, 2))}),
    "Attention": (st.structure.Attention, {"attention": (*MODULE, nn.Linear(2, 2))}),
    "EncoderLayer": (st.structure.EncoderLayer, {"layer": (*MODULE, nn.Linear(2, 2))}),
    "Encoder": (st.structure.Encoder, {"encoder": (*MODULE, nn.Linear(2, 2))}),
    "RecurrentLayers": (st.structure.RecurrentLayers, {"rnn": (*MODULE, nn.Linear(2, 2))}),
    "Batches": (partial(st.structure.Batches, dataset=range(64)), {
        "dataset": (3, None, []), "start": COUNT, "most": COUNT, "least": (0, -1, 2.5, "5"),
        "scale": THING, "interval": (0, -1, 2.5, "5"), "overhead": (-1, 0.0, NAN, "1"),
        "drop_last": FLAG, "seed": (0.5, "0", NAN, None), "recorder": (3, object()),
    }),
    "NoiseScale": (st.structure.NoiseScale, {"memory": (0.0, -1.0, NAN, "50", None)}),
    "Chooser": (partial(
        st.structure.Chooser, total_steps=9,
        model=nn.Sequential(st.structure.Choice([nn.ReLU(), nn.Tanh()])),
    ), {
        "model": MODULE, "total_steps": COUNT, "every": COUNT, "rate": SIZE,
        "recorder": (3, object()),
    }),
    "Goal": (partial(
        st.structure.Goal, model=_gated(), example=torch.ones(2, 2), budget=0.5, total_steps=9,
    ), {
        "model": MODULE, "budget": (0.0, -1.0, 1.5, NAN, "0.5"), "of": ("memory", 3, []),
        "tolerance": SIZE, "total_steps": COUNT, "start": SHARE, "end": SHARE,
        "closings": COUNT, "batches": COUNT, "recorder": (3, object()),
    }),
    "prune": (partial(st.structure.prune, model=_gated(), example=torch.ones(2, 2)), {
        "model": MODULE, "threshold": (-0.1, 1.5, NAN, "0"), "loss": (3, "mse", []),
        "tolerance": (NAN, -0.1, "0"),
    }),
    "open_gates": (partial(st.structure.open_gates, model=_gated()), {
        "model": MODULE, "threshold": (-0.1, 1.5, NAN, "0"),
    }),
    "with_gates": (st.structure.with_gates, {"model": MODULE}),
    "parameter_groups": (st.structure.parameter_groups, {"model": MODULE}),
    "gated": (lambda model: list(st.structure.gated(model)), {"model": MODULE}),
    "step_overhead": (partial(st.structure.step_overhead, step=lambda size: None), {
        "step": THING, "small": COUNT, "large": COUNT, "repeats": COUNT,
    }),
}  # fmt: skip

STRENGTH: Table = {"value": SIZE, "name": TEXT}
LAYERS: Mapping[str, Part] = {
    "Dropout": (st.nn.Dropout, {"p": SHARE, "name": TEXT, "share": (3, "0", (0.5,))}),
    "Dropout2d": (st.nn.Dropout2d, {"p": SHARE, "name": TEXT}),
    "DropConnect": (partial(st.nn.DropConnect, module=nn.Linear(2, 2)), {
        "module": (3, "net", nn.Linear), "p": SHARE, "name": TEXT,
        "weights": (3, ["nothing"], [], "weight"),
    }),
    "EmbeddingDropout": (partial(st.nn.EmbeddingDropout, embedding=nn.Embedding(3, 2)), {
        "embedding": (*MODULE, nn.Linear(2, 2)), "p": SHARE, "name": TEXT,
    }),
    "ActivationPenalty": (st.nn.ActivationPenalty, STRENGTH),
    "TemporalPenalty": (st.nn.TemporalPenalty, {**STRENGTH, "dim": (0.5, "1", None)}),
    "Noise": (st.nn.Noise, STRENGTH),
    "Brightness": (st.nn.Brightness, STRENGTH),
    "Contrast": (st.nn.Contrast, STRENGTH),
    "Scale": (st.nn.Scale, STRENGTH),
    "Translate": (st.nn.Translate, STRENGTH),
    "Cutout": (st.nn.Cutout, {**STRENGTH, "size": (*SHARE, 0.0), "most": COUNT}),
    "LabelSmoothing": (st.nn.LabelSmoothing, {
        "value": SHARE, "name": TEXT, "ignore_index": (0.5, "0", None),
    }),
    "Mixup": (partial(st.nn.Mixup, classes=3), {
        "classes": (-1, 2.5, NAN, "5", [5], True), "value": SIZE, "name": TEXT,
    }),
    "Augment": (lambda parts: st.nn.Augment(parts), {"parts": MODULE}),
    "tunables": (st.nn.tunables, {"model": MODULE}),
    "extra_loss": (st.nn.extra_loss, {"model": MODULE}),
}  # fmt: skip

OBSERVING: Mapping[str, Part] = {
    "JSONL": (st.monitor.JSONL, {"path": (3, None, [])}),
    "TensorBoard": (st.monitor.TensorBoard, {"target": (3, None, [])}),
    "Several": (st.monitor.Several, {"recorders": (3, [3], "runs")}),
    "Listener": (st.monitor.Listener, {"function": (3, None, "print")}),
    "Agreement": (st.monitor.Agreement, {"looks": COUNT}),
    "read_jsonl": (st.monitor.read_jsonl, {"path": (3, None, [])}),
}  # fmt: skip

METHOD: Mapping[str, Part] = {
    "Average": (st.Average, {"rho": (1.0, -0.1, NAN, "0.9")}),
    "Trace": (st.Trace, {
        "discount": (1.5, -0.1, NAN, "0.9"), "stride": COUNT, "closed_forms": FLAG,
    }),
    "OneStep": (st.OneStep, {"stride": COUNT, "closed_forms": FLAG}),
    "Forward": (st.Forward, {
        "discount": (1.5, -0.1, NAN, "0.9"), "curvature": ("nothing", 3, None),
        "projections": (0, -1, 2.5, "5"), "seed": (0.5, "0", None),
    }),
    "Unrolled": (st.Unrolled, {
        "horizon": (0, -1, 2.5, NAN, "5", [5], True), "checkpoint": COUNT, "share": (0, -1, 2.5),
    }),
    "BestResponse": (st.BestResponse, {
        "curvature": ("none", 3, None), "scale": (0.0, *SIZE), "update": FLAG, "every": COUNT,
        "discount": (1.5, -0.1, NAN, "0.9"),
    }),
    "Implicit": (st.Implicit, {
        "solver": THING, "through": ("weights", 3, None), "warm": FLAG, "together": COUNT,
    }),
    "FiniteDifference": (st.estimators.FiniteDifference, {"relative_step": (0.0, *SIZE)}),
    "CG": (st.CG, {"iterations": COUNT, "damping": SIZE, "tolerance": SIZE}),
    "Neumann": (st.Neumann, {
        "terms": COUNT, "scale": (0.0, *SIZE), "tolerance": SIZE, "head": (0, -1, 2.5, "5"),
    }),
    "Nystrom": (st.Nystrom, {
        "rank": COUNT, "damping": SIZE, "tolerance": SIZE, "seed": (0.5, "0", None),
    }),
    "L1": (st.penalties.L1, {"strength": SIZE}),
    "L2": (st.penalties.L2, {"strength": SIZE}),
    "Elastic": (st.penalties.Elastic, {"strength": SIZE}),
    "Group": (st.penalties.Group, {"strength": SIZE}),
    "Gates": (st.penalties.Gates, {"strength": SIZE}),
    "Schedule": (st.schedules.Schedule, {
        "total_steps": (0, -1, 2.5, "5"),
        "warmup_steps": (-1, 2.5, NAN, "5"),
    }),
    "Mixture of rules": (st.rules.Mixture, {
        "rules": (3, None, [], [3], ["AdamW"], st.rules.SGD()),
    }),
    "Mixture": (partial(
        st.Mixture, params=[*nn.Linear(2, 1).parameters()],
        rules=[st.rules.SGD(), st.rules.AdamW()],
    ), {
        "rules": (3, None, [], [3], ["AdamW"], st.rules.SGD()), "lr": (0.0, -0.1, NAN, "0.1"),
        "weight_decay": SIZE, "decay": SIZE, "l1": SIZE, "penalty": (3, "l1", object()),
        "maximize": FLAG,
    }),
    "muon_groups": (partial(st.muon_groups, model=nn.Linear(2, 2)), {
        "model": MODULE, "others": (3, [3], "nothing"),
    }),
    "HoldOut": (st.HoldOut, {
        "share": (0.0, 1.0, *SIZE), "until": (0.0, 1.5, *SIZE),
    }),
    "GuardPolicy": (st.control.GuardPolicy, {
        "patience": (-1, 2.5, "3"), "explosion": (NAN, "2"), "sigmas": (-1.0, NAN), "cool": (NAN,),
    }),
    "SweepSettings": (st.control.SweepSettings, {
        "parts": (-1, 2.5), "margin": (NAN, -1.0), "decades": (NAN, "4"),
    }),
    "HyperSettings": (st.method.HyperSettings, {
        "rate": (NAN, -0.1), "often": (-1, 2.5), "longest": (NAN, -1.0),
    }),
    "TunedSchedule": (partial(st.TunedSchedule, rule="SGD", steps=4, values={}), {
        "values": ({"lr": [[0, NAN]]}, *({"lr": pairs} for pairs in WRONG_PAIRS), 3, []),
        "rule": TEXT, "steps": (-1, 2.5, "4"),
    }),
    "convert": (partial(st.hypernet.convert, model=nn.Linear(2, 2), hparams={"l2": 0.1}), {
        "model": MODULE, "hparams": (3, {"l2": NAN}, {"l2": "high"}, []),
        "perturb": ("each", 3, None), "scale": (0.0, *SIZE),
    }),
}  # fmt: skip

SEARCH: Mapping[str, Part] = {
    "select": (partial(search.select, lambda space: 1.0), {
        "ensemble": COUNT, "trials": COUNT, "epochs": (0, -1, 2.5, "5"), "steps": (0, -1, 2.5, "5"),
        "loss_fn": (3, "mse"), "metric": TEXT, "maximize": FLAG, "sampler": ("tpee", 3, []),
        "pruner": ("ash", 3, []), "timeout": (-1.0, NAN, "5"), "storage": (3, []),
        "trust_storage": FLAG, "study": TEXT, "workers": COUNT, "warm_start": FLAG,
        "memory": (3, "folder"), "patience": (0, -1, 2.5), "structure": ("outside", 3, []),
        "tuner": (3, "fast", []), "fit": (3, "fast", []), "log_dir": (3, 2.5),
        "seed": (0.5, "0", None), "force": FLAG, "progress": FLAG,
    }),
    "Periodic": (partial(search.families.Periodic, features=3), {
        "features": COUNT, "scale": (0.0, *SIZE), "frequencies": COUNT, "dims": COUNT,
    }),
    "Ensemble": (partial(search.Ensemble, models=[nn.Linear(2, 1)], weights=[1.0]), {
        "models": (3, [], [3]), "weights": (3, [], [1.0, 2.0], ["1"], [NAN]),
    }),
    "Memory": (search.Memory, {"path": (3, None, [])}),
    "Candidate": (partial(search.Candidate, model=nn.Linear(2, 1)), {
        "model": MODULE, "loss_fn": (3, "mse"), "tuner": (3, "fast", []),
    }),
    "batch_for": (partial(search.batch_for, batch=8, memory_there=9, memory_here=9), {
        "batch": COUNT, "memory_there": (0, *SIZE), "memory_here": (0, *SIZE), "noise": (-1.0, "9"),
    }),
}  # fmt: skip

PARTS: Mapping[str, Part] = {**METHOD, **STRUCTURE, **LAYERS, **OBSERVING, **SEARCH}
"""Makers, and the wrong values of each argument."""
