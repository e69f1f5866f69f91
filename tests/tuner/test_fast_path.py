"""The weight step by one kernel. Truth: the pure step that it stands for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import selftune as st
from selftune.bilevel import Bilevel, Run
from selftune.hypervector import HyperVector
from selftune.tuner._objective import Objective, for_tuning
from selftune.unobserved import Unobserved
from selftune.update import Update

RULES = [
    (st.rules.AdamW(), {"weight_decay": 0.1}),
    (st.rules.Adam(), {"amsgrad": True}),
    (st.rules.SGD(), {"momentum": 0.9, "nesterov": True}),
]


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=noise).double(), torch.randn(8, 2, generator=noise).double()


def make(rule: st.rules.AbstractRule, options: dict, joined: bool, **kwargs) -> tuple[Bilevel, Run]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
    objective = Objective(net.double(), F.mse_loss, None)
    update, values = Update(rule), {"decay": 0.01, **rule.defaults, **options}
    bilevel = Bilevel(
        objective, for_tuning(objective, 2), update,
        {k: v for k, v in values.items() if k not in ("lr", "weight_decay")},
        HyperVector(update.hparams, ("lr", "weight_decay"), horizon=100),
        kwargs.get("estimator", st.Trace(stride=2)), None, st.Average(),
        torch.linspace(1, 0.5, 20, dtype=torch.float64), joined=joined,
    )  # fmt: skip
    run = bilevel.init(values)
    return bilevel, run if joined else tree_map(torch.clone, run)


def write(run: Run, after: Run) -> None:
    for old, new in zip(tree_leaves(run), tree_leaves(after), strict=True):
        old.copy_(new)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize(("rule", "options"), RULES)
def test_equals_the_pure_step(rule: st.rules.AbstractRule, options: dict, joined: bool) -> None:
    """Weights, state, statistics and counts, across steps of the hyperparameters."""
    (bilevel, run), (twin, other) = (make(rule, options, joined) for _ in range(2))
    step = Unobserved(bilevel)
    assert step.serves(bilevel, run)
    with torch.no_grad():
        for i in range(12):
            if i % 4 == 3:
                write(run, bilevel.tune(run, batch(i), batch(-i))[0])
                write(other, twin.tune(other, batch(i), batch(-i))[0])
                continue
            after, loss = twin.train(other, batch(i))
            write(other, after)
            torch.testing.assert_close(step(run, batch(i)), loss, rtol=1e-9, atol=1e-12)
    for a, b in zip(tree_leaves(run), tree_leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_not_finite_changes_nothing_but_the_count() -> None:
    bilevel, run = make(*RULES[0], True)
    before = tree_map(torch.clone, run)
    x, y = batch(0)
    with torch.no_grad():
        assert not torch.isfinite(Unobserved(bilevel)(run, (x, y / 0)))
    assert int(run.step) == 1
    for a, b in zip(tree_leaves(run._replace(step=before.step)), tree_leaves(before), strict=True):
        assert torch.equal(a, b)


def test_what_it_does_not_serve() -> None:
    bilevel, run = make(*RULES[0], True, estimator=st.Trace())
    assert not Unobserved.serves(bilevel, run)  # every step is observed
    bilevel, run = make(st.rules.RMSprop(), {}, True)
    with torch.no_grad():
        assert Unobserved(bilevel)(run, batch(0)) is None  # torch has no kernel
    bilevel, run = make(st.rules.SGD(), {"momentum": 0.0}, True)
    with torch.no_grad():
        assert Unobserved(bilevel)(run, batch(0)) is None
