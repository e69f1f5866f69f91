"""Controllers that the tests of what they decide share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selftune import rules
from selftune.control import Controller, GuardPolicy, LRSweep
from selftune.hparams import Hparam
from selftune.update import Update

ADAM = Update(rules.Adam()).hparams
VALUES = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "decay": 0.0, "weight_decay": 0.0}


def never() -> tuple[float, ...]:
    raise AssertionError("nothing to compare")


def made(
    hparams: Mapping[str, Hparam] = ADAM, sweep: LRSweep | None = None, **policy: Any
) -> Controller:
    return Controller(
        hparams=hparams, total_steps=300, sweep=sweep, guard=GuardPolicy(**policy).begin()
    )
