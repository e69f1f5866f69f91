"""Hyperparameters: how they are read, written, bounded and chosen. Truths: laws, torch."""

import math
from typing import Any

import pytest
import torch

from selftune import rules
from selftune.bijections import Log
from selftune.hparams import LR, MOMENTUM, WEIGHT_DECAY, Hparam, as_layer, choose
from selftune.penalties import L1
from selftune.rules.adam import BETA1, BETA2
from selftune.update import Update


def test_betas_are_read_and_written_one_at_a_time() -> None:
    """Law: writing one beta leaves the other, and a tuple stays a tuple."""
    group: dict[str, Any] = {"betas": (0.9, 0.99)}
    assert (BETA1.read(group), BETA2.read(group)) == (0.9, 0.99)
    BETA1.write(group, 0.5)
    BETA2.write(group, 0.7)
    assert group["betas"] == (0.5, 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_lr_stays_the_same_tensor(dtype: torch.dtype) -> None:
    """Law: torch's capturable optimizers hold on to the tensor, so it is filled in place."""
    tensor = torch.tensor(0.5, dtype=dtype)
    group: dict[str, Any] = {"lr": tensor}
    assert LR.read(group) == 0.5
    LR.write(group, 0.25)
    assert group["lr"] is tensor
    assert tensor.item() == 0.25


def test_numbers_and_renamed_options_are_read_and_written() -> None:
    """Law: what was written is read, under the option's key and no other."""
    renamed = Hparam(name="a", option="b", bijection=Log(), lower=0, upper=1, from_zero=0.1)
    group: dict[str, Any] = {"b": 0.3, "lr": 1}
    assert isinstance(LR.read(group), float)
    renamed.write(group, 0.4)
    assert renamed.read(group) == 0.4
    assert group == {"b": 0.4, "lr": 1}


@pytest.mark.parametrize(("lower", "upper"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_bounds_that_cross_are_refused(lower: float, upper: float) -> None:
    """Law: lower < upper, or an error that names the hyperparameter."""
    with pytest.raises(ValueError, match=r"bounds\['lr'\]"):
        LR.bounded(lower, upper)
    assert LR.bounded(0.1, 0.2).upper == 0.2


@pytest.mark.parametrize("hparam", [MOMENTUM, BETA1, BETA2], ids=lambda h: h.name)
def test_bounds_of_memories(hparam: Hparam) -> None:
    """Law: from 0 on and below 1; others are refused by name, and the error names the scale."""
    assert hparam.bounded(0.0, 0.5).lower == 0.0
    for lower, upper in ((-0.1, 0.9), (0.1, 1.0), (0.1, 1.5)):
        with pytest.raises(ValueError, match=rf"bounds\['{hparam.name}'\].*Memory.*below 1"):
            hparam.bounded(lower, upper)


@pytest.mark.parametrize("hparam", [LR, WEIGHT_DECAY, MOMENTUM, BETA1, BETA2], ids=lambda h: h.name)
def test_raw_ends_are_where_the_scale_meets_the_bounds(hparam: Hparam) -> None:
    """Law: forward of inverse."""
    ends = hparam.bijection.forward(torch.tensor(hparam.raw_ends, dtype=torch.float64))
    assert ends.tolist() == pytest.approx([hparam.lower, hparam.upper], rel=1e-9)


HPARAMS = Update(rules.SGD(), (L1(),)).hparams


def test_those_named_are_chosen_in_one_order_and_within_bounds() -> None:
    """Law: the order of the update, whatever that of the names."""
    chosen = choose(HPARAMS, ("l1", "momentum", "lr"), {"lr": (0.1, 1.0)}, 1000)
    assert list(chosen) == ["lr", "momentum", "l1"]
    assert chosen["lr"] == LR.bounded(0.1, 1.0)
    assert chosen["l1"] == HPARAMS["l1"]


@pytest.mark.parametrize(("horizon", "upper"), [(50, 0.9), (1000, 0.98), (10**6, 1 - 2e-5)])
def test_a_momentum_fits_twenty_times_into_the_run(horizon: int, upper: float) -> None:
    """Closed form: 1 − 20/T, from 0.9; bounds of the user hold as they are."""
    assert choose(HPARAMS, ("momentum",), None, horizon)["momentum"].upper == pytest.approx(upper)
    wide = choose(HPARAMS, ("momentum",), {"momentum": (0.1, 0.9999)}, horizon)
    assert wide["momentum"].upper == 0.9999


@pytest.mark.parametrize(
    ("tune", "bounds", "match"),
    [
        ("lr", None, r"tune='lr' must be a sequence of names: \('lr',\)"),
        (("rate",), None, r"tune='rate' is unknown: use one of \['lr'"),
        (("lr",), {"rate": (0.0, 1.0)}, r"bounds='rate' is unknown: use one of \['lr'"),
        (("lr",), {"lr": (1.0, 0.1)}, r"bounds\['lr'\]"),
    ],
)
def test_what_cannot_be_chosen_is_refused(tune: Any, bounds: Any, match: str) -> None:
    """Law: a ValueError that names the argument, the name and what there is."""
    with pytest.raises(ValueError, match=match):
        choose(HPARAMS, tune, bounds, 1000)


def test_roles_say_what_a_hyperparameter_is_for() -> None:
    """Law: one role each; regularizers are of the update; heavy-ball momentum accumulates."""
    every = (rules.SGD, rules.Adam, rules.AdamW, rules.RMSprop, rules.Lion, rules.Muon)
    for rule in (make() for make in every):
        update = Update(rule, (L1(),))
        roles = {n: h.role for n, h in update.hparams.items()}
        assert {n for n, r in roles.items() if r == "regularizer"} == update.regularizers
        assert [n for n, r in roles.items() if r == "rate"] == ["lr"]
        heavy = [h.name for h in update.hparams.values() if h.accumulates]
        assert heavy == ["momentum"] * (type(rule).__name__ in ("SGD", "RMSprop"))
        paces = {h.pace for h in update.hparams.values() if h.role == "momentum"}
        assert paces <= {MOMENTUM.pace}
    layer = as_layer(Hparam(name="rate", bijection=Log(), lower=0.1, upper=1.0, from_zero=0.1))
    assert (layer.role, layer.pace) == ("layer", 2.0)
