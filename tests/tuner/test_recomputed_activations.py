"""Activation checkpoints in models of the tuner. Truth: the same model without them."""

from typing import Any

import pytest
import torch
from jobs import loader, points, same, tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import selftune as st

VAL = [points(100, seed=1)]


class Recomputed(nn.Module):
    """A net whose middle, dropout and a buffer bound anew included, is computed twice."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.first, self.last = nn.Linear(2, 16), nn.Linear(16, 3)
        self.middle = nn.Sequential(nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 16), nn.Tanh())
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes = self.passes + 1
        x = self.first(x)
        if self.reentrant is None:
            return self.last(self.middle(x))
        return self.last(checkpoint(self.middle, x, use_reentrant=self.reentrant))


def fit(reentrant: bool | None, *around: nn.Module, **options: Any) -> Any:
    torch.manual_seed(3)
    run = tuner(nn.Sequential(*around, Recomputed(reentrant)), **options)
    return run.fit(loader(205), VAL, steps=60, evaluate_every=20, progress=False)


@pytest.mark.parametrize("rule", [st.rules.SGD(), st.rules.AdamW()])
def test_the_run_is_that_of_the_model_without(rule: st.rules.AbstractRule) -> None:
    options = dict(rule=rule, hparams={"lr": 0.01, "weight_decay": 1e-4})
    got, want = fit(False, **options), fit(None, **options)
    assert same(got.history, want.history)
    assert same(got.best_weights, want.best_weights)
    assert float(got.best_weights["0.passes"]) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_so_is_a_compiled_run(caplog: pytest.LogCaptureFixture) -> None:
    """Torch compiles no checkpoints under torch.func: passes stay eager, the rest is compiled."""
    got, want = fit(False, compile=True), fit(None)
    assert "the model's passes stay eager" in caplog.text
    assert got.best_loss == pytest.approx(want.best_loss, rel=1e-3)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "reentrant": (True, {}, r"reentrant kind: pass use_reentrant=False to torch"),
    "population": (False, dict(population=2), r"activation checkpoints.*need population=1"),
    "whole steps": (False, dict(estimator=st.Unrolled(5)), r"elementwise estimator, Trace or One"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_differentiated_is_refused(case: str) -> None:
    reentrant, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        fit(reentrant, **options)


def test_so_is_a_tuned_layer_beside_a_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"leave others out of tune=, or train without"):
        fit(False, st.nn.Dropout(0.1))


def test_so_is_a_layer_with_random_numbers_of_its_own_in_a_checkpoint() -> None:
    net = Recomputed(False)
    net.middle[1] = st.nn.Dropout(0.2)
    run = tuner(net, tune=("lr",))
    with pytest.raises(RuntimeError, match=r"Dropout.*outside the checkpoint"):
        run.fit(loader(205), VAL, steps=5, progress=False)
