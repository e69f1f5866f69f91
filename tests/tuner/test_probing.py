"""A probe's choice on trial. Truths: descent on ½ w², which diverges above 2, and a twin."""

import pytest
import torch
from torch import Tensor, nn

import selftune as st
from selftune.bilevel import Bilevel
from selftune.hypervector import HyperVector
from selftune.probe import Probe
from selftune.tuner._good import Good
from selftune.tuner._objective import Objective, for_tuning
from selftune.tuner._probing import Probing
from selftune.update import Update


class Bowl(nn.Module):
    """A loss of ½ w²."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, batch: Tensor) -> Tensor:
        return self.weight.square().sum() / 2


def made() -> Bilevel:
    update = Update(st.rules.SGD())
    objective = Objective(Bowl(), None, lambda model, batch: model(batch))
    options = {**dict.fromkeys(update.hparams, 0.0), **update.rule.defaults}
    return Bilevel(
        objective, for_tuning(objective, 5), update, options,
        HyperVector(update.hparams, ("lr",), horizon=100), st.Trace(stride=5), None, st.Average(),
        torch.ones(1, dtype=torch.float64), limited=True,
    )  # fmt: skip


def tried(rate: float, lowest: float, most: int = 100) -> tuple[float, Tensor, int]:
    """Rate, weights and steps after a trial that begins where a descent of ``-lowest`` led."""
    bilevel = made()
    run = bilevel.init({"lr": rate})
    probe = Probe(steps=10, ended=True, lowest=lowest)
    probing = Probing(bilevel, run, Good(run, False), probe, lambda: torch.zeros(1), most)
    probing.settle()
    return float(bilevel.hyper.values(run.hyper.raw)["lr"]), run.weights[0].value, probing.taken


def test_a_rate_that_leads_uphill_is_lowered_from_where_it_began() -> None:
    """Closed form: the first step at 2.5 adds 1.25 to ½·2, of which it may lose 1."""
    rate, weights, taken = tried(2.5, lowest=-2.0)
    assert rate == pytest.approx(2.5 / 3)
    assert taken == 1 + 11  # ten steps are judged, the last of them by the gradient after it
    assert weights.tolist() == pytest.approx([(1 - 2.5 / 3) ** 11] * 2)


@pytest.mark.parametrize("rate", [0.3, 1.9])
def test_a_rate_that_descends_is_kept(rate: float) -> None:
    """Closed form: weights shrink by 1 − η a step, also where they oscillate."""
    kept, weights, taken = tried(rate, lowest=-2.0)
    assert kept == pytest.approx(rate)
    assert weights.tolist() == pytest.approx([(1 - rate) ** taken] * 2)


def test_a_trial_ends_with_the_run() -> None:
    """Law: no more steps than there are."""
    assert tried(2.5, lowest=-2.0, most=5)[2] == 5


def test_its_steps_are_training_steps() -> None:
    """Twin: as many steps of the run itself, of which every fifth is observed."""
    bilevel, twin_of = made(), made()
    run, twin = (b.init({"lr": 0.3}) for b in (bilevel, twin_of))
    probe = Probe(steps=10, ended=True, lowest=-2.0)
    probing = Probing(bilevel, run, Good(run, False), probe, lambda: torch.zeros(1), 100)
    probing.settle()
    for step in range(1, probing.taken + 1):
        loss, grads, buffers = twin_of.gradient(twin, torch.zeros(1))
        twin = twin_of.advance(twin, loss, grads, buffers, observe=step % 5 == 0)
    for a, b in zip(run.weights, twin.weights, strict=True):
        torch.testing.assert_close(a.value, b.value)
        torch.testing.assert_close(a.average, b.average)
        torch.testing.assert_close(a.response, b.response)
    assert int(run.step) == int(run.age) == probing.taken
