"""Rates of parameter groups in the log. Truth: a step of SGD moves a weight of gradient 1 by it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.lr_scheduler import StepLR

import selftune as st

STEPS = 60
MAKES: dict[str, Callable[..., Any]] = {
    "SGD": lambda groups, **o: st.SGD(groups, lr=0.02, momentum=0.0, weight_decay=0.0, **o),
    "SelfTuning": lambda groups, **o: st.SelfTuning(torch.optim.SGD(groups, lr=0.02), **o),
}


def trained(
    make: Callable[..., Any], folder: Path, count: int, *names: str, anneals: bool = False, **o: Any
) -> dict[int, list[float]]:
    """The distance that each group's weight moved, by step."""
    weights = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(count)]
    groups = [{"params": [w], "lr": 0.01 * (i + 1)} for i, w in enumerate(weights)]
    for group, name in zip(groups, names, strict=False):
        group["name"] = name
    opt = make(groups, probe=False, guard=False, log_dir=folder, **o)
    scheduler = StepLR(opt, 7, 0.3) if anneals else None
    moved = {}
    for step in range(1, STEPS + 1):
        before = [float(w.detach()) for w in weights]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        opt.step()
        moved[step] = [b - float(w.detach()) for b, w in zip(before, weights, strict=True)]
        opt.hyper_step(lambda: sum((i + 1) * w.sum() for i, w in enumerate(weights)))
        if scheduler is not None:
            scheduler.step()
    opt.finish()
    return moved


def curves(folder: Path, start: str) -> dict[str, dict[int, float]]:
    read = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in read.Tags()["scalars"] if tag.startswith(start)]
    return {tag: {e.step: e.value for e in read.Scalars(tag)} for tag in tags}


@pytest.mark.parametrize("anneals", [False, True])
@pytest.mark.parametrize(
    ("make", "per"), [("SGD", None), ("SGD", "group"), ("SelfTuning", "group")]
)
def test_each_group_has_the_curve_of_its_applied_rate(
    make: str, per: str | None, anneals: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {} if per is None else {"per": per}
    options |= {} if anneals else {"total_steps": STEPS}
    moved = trained(MAKES[make], tmp_path, 2, "head", anneals=anneals, tune=("lr",), **options)
    found = curves(tmp_path, "lr/")
    assert set(found) == {"lr/head", "lr/1"}
    (noted,) = curves(tmp_path, "Loss/val").values()
    for at, tag in enumerate(("lr/head", "lr/1")):
        assert found[tag].keys() == noted.keys()
        assert len(noted) >= STEPS // 20
        for step, rate in found[tag].items():
            assert rate == pytest.approx(moved[step][at], rel=1e-6)
    peaks = curves(tmp_path, "hyper/lr")
    assert set(peaks) == {"hyper/lr", "hyper/lr/0", "hyper/lr/1"}


@pytest.mark.parametrize("anneals", [False, True])
def test_one_group_has_one_curve(anneals: bool, tmp_path: Path) -> None:
    moved = trained(MAKES["SGD"], tmp_path, 1, anneals=anneals, tune=("lr",))
    ((tag, rates),) = curves(tmp_path, "lr/").items()
    assert tag == "lr/applied"
    for step, rate in rates.items():
        assert rate == pytest.approx(moved[step][0], rel=1e-6)


def test_names_that_are_not_unique_are_numbers(tmp_path: Path) -> None:
    trained(MAKES["SGD"], tmp_path, 3, "decay", "no decay", "decay")
    assert set(curves(tmp_path, "lr/")) == {"lr/0", "lr/1", "lr/2"}


def test_many_groups_have_a_range(tmp_path: Path) -> None:
    moved = trained(MAKES["SGD"], tmp_path, 9, tune=("lr",))
    found = curves(tmp_path, "lr/")
    assert set(found) == {"lr/lowest", "lr/median", "lr/highest"}
    for place, tag in ((0, "lr/lowest"), (4, "lr/median"), (8, "lr/highest")):
        for step, rate in found[tag].items():
            assert rate == pytest.approx(moved[step][place], rel=1e-6)
