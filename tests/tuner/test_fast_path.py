"""The weight step by one kernel. Truth: the pure step that it stands for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from parts import assert_same, batches, made, net, write
from torch.utils._pytree import tree_map

import selftune as st
from selftune.tuner._fast_path import FastPath
from selftune.tuner._run_state import RunState
from selftune.tuner._steps import Steps

RULES: list[tuple[st.rules.AbstractRule, dict[str, Any]]] = [
    (st.rules.AdamW(), {"weight_decay": 0.1}),
    (st.rules.Adam(), {"amsgrad": True}),
    (st.rules.SGD(), {"momentum": 0.9, "nesterov": True}),
    (st.rules.SGD(), {"momentum": 0.0}),
]


def steps_of(
    rule: st.rules.AbstractRule, options: dict[str, Any], joined: bool, stride: int = 2
) -> tuple[Steps, RunState]:
    steps, run = made(
        net(norm=True), rule, tune=("lr", "weight_decay"), values={"decay": 0.01, **options},
        every=2, estimator=st.Trace(stride=stride), rates=torch.linspace(1, 0.5, 20), horizon=100,
        joined=joined,
    )  # fmt: skip
    return steps, run if joined else tree_map(torch.clone, run)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(("rule", "options"), RULES)
def test_equals_the_pure_step(
    rule: st.rules.AbstractRule, options: dict[str, Any], joined: bool
) -> None:
    """Weights, state, statistics and counts, across steps of the hyperparameters."""
    (steps, run), (twin, other) = (steps_of(rule, options, joined) for _ in range(2))
    plain, tracking = FastPath(steps), FastPath(steps, tracked=True)
    assert FastPath.serves(steps, run)
    before = run.hyper.raw.clone()
    with torch.no_grad():
        for i, (batch, outer) in enumerate(zip(batches(12), batches(12, seed=1), strict=True)):
            tracked = i % 2 == 1
            after, told = twin.train(other, batch, tracked=tracked)
            write(other, after)
            found = (tracking if tracked else plain)(run, batch)
            assert_same(found, told, rtol=1e-9, atol=1e-12)
            if i % 4 == 3:
                for some, state in ((steps, run), (twin, other)):
                    write(state, some.tune(state, outer)[0])
    assert not torch.equal(run.hyper.raw, before)
    assert_same(run, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing_but_the_count(where: str) -> None:
    """Law: the step is counted, and told not to have been taken."""
    steps, run = steps_of(*RULES[0], True)
    before = tree_map(torch.clone, run)
    x, y = batches(1)[0]
    if where == "gradient":  # of a loss that is finite
        steps.inner.loss_fn = lambda output, target: (output - output).sqrt().sum()
    with torch.no_grad():
        told = FastPath(steps)(run, (x, y / 0 if where == "loss" else y))
    assert told is not None
    assert math.isfinite(told[0]) == (where == "gradient")
    assert told[1] == 0
    assert int(run.step) == 1
    assert_same(run._replace(step=before.step), before)


def test_what_it_does_not_serve() -> None:
    """Law: other dtypes than the average's, and rules without a kernel."""
    steps, run = made(net().bfloat16(), st.rules.AdamW())
    assert not FastPath.serves(steps, run)
    steps, run = steps_of(st.rules.RMSprop(), {}, True)
    with torch.no_grad():
        assert FastPath(steps)(run, batches(1)[0]) is None  # torch has no kernel
    steps, run = steps_of(st.rules.SGD(), {"momentum": 0.9, "dampening": 0.5}, True)
    with torch.no_grad():
        assert FastPath(steps)(run, batches(1)[0]) is None
    assert int(run.step) == 0
