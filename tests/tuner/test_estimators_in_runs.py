"""Estimators of whole steps in the tuner. Truths: autograd through a loop of our own, laws."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import loader, net, points, tuner
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.estimators import AbstractEstimator
from selftune.method.whole_step import WholeSteps  # private, as the next: what is asked of them
from selftune.tuner._whole_step import FunctionalSteps

SEEING: dict[str, AbstractEstimator] = {
    "Forward": st.Forward(),
    "Unrolled": st.Unrolled(50),
    "Unrolled, checkpoints": st.Unrolled(50, checkpoint=3),
}


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def doubled(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    x, y = points(count, seed=seed)
    return [(a.double(), b) for a, b in zip(x.split(20), y.split(20), strict=True)]


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of estimators, and what they answer."""
    seen: list[Any] = []
    before = FunctionalSteps.estimate

    def estimate(self: FunctionalSteps, end: Any, hparams: Any, grads: Tensor) -> Any:
        found = before(self, end, hparams, grads)
        seen.append((hparams, grads.clone(), found))
        return found

    monkeypatch.setattr(FunctionalSteps, "estimate", estimate)
    return seen


def looped(batches: list[Any], rates: list[float]) -> Any:
    """The weights after SGD with momentum as a function of the hyperparameters: plain torch."""
    model = plain()
    named = dict(model.named_parameters())

    def end(h: dict[str, Tensor]) -> Tensor:
        weights = {n: p.detach() for n, p in named.items()}
        momenta = {n: torch.zeros_like(w) for n, w in weights.items()}
        for (x, y), rate in zip(batches, rates, strict=True):

            def loss(weights: Any, x: Tensor = x, y: Tensor = y) -> Tensor:
                held = {n: b.clone() for n, b in model.named_buffers()}
                return F.cross_entropy(torch.func.functional_call(model, weights | held, (x,)), y)

            grads = torch.func.grad(loss)(weights)
            for n, w in weights.items():
                penalised = grads[n] + h["weight_decay"] * w
                momenta[n] = h["momentum"] * momenta[n] + penalised
            weights = {n: w - h["lr"] * rate * momenta[n] for n, w in weights.items()}
        return torch.cat([w.flatten() for w in weights.values()])

    return end


@pytest.mark.parametrize("name", SEEING)
def test_hypergradients_are_those_of_a_plain_loop(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps of the linear schedule before the first hyperparameter step."""
    seen, train = spied(monkeypatch), doubled(200, 0)
    tuner(plain(), estimator=SEEING[name], every=10, probe=False, guard=False).fit(
        train, doubled(40, 1), steps=20, progress=False
    )
    hparams, grads, found = seen[0]
    rates = [1 - step / 20 for step in range(10)]
    end = looped(train, rates)
    truth = torch.func.grad(lambda h: end(h) @ (grads / grads.norm()))(hparams)
    for n, value in truth.items():
        assert float(found[n]) == pytest.approx(float(value), rel=1e-9, abs=1e-15), n


@pytest.mark.parametrize(
    "estimator",
    [
        st.Unrolled(6, checkpoint=2),
        st.Forward(0.9),
        st.Implicit(through="update"),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_compiled_is_eager(estimator: AbstractEstimator) -> None:
    """To rounding, with a shorter last batch in each epoch."""
    found = []
    for compiled in (False, True):
        made = tuner(net(), estimator=estimator, compile=compiled, probe=False)
        found.append(made.fit(loader(110), [points(40, seed=1)], steps=24, progress=False))
    for n, value in found[0].hparams.items():
        assert found[1].hparams[n] == pytest.approx(value, rel=1e-3), n
    first, second = (torch.as_tensor(f.history["train_loss"]) for f in found)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(st.Forward(0.9), marks=pytest.mark.slow),
        pytest.param(st.Unrolled(10), marks=pytest.mark.slow),
        st.Trace(stride=3),
    ],
)
def test_they_raise_a_rate_that_is_far_too_low(estimator: AbstractEstimator) -> None:
    made = tuner(net(), estimator=estimator, hparams={"lr": 1e-4, "momentum": 0.5}, probe=False)
    result = made.fit(loader(200), [points(100, seed=1)], steps=300, progress=False)
    assert result.hparams["lr"] > 1e-3


def test_a_run_that_goes_back_is_observed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(WholeSteps, "forget", lambda self: forgotten.append(len(self.memory)))
    train = [points(20, seed=s) for s in range(60)]
    train[40] = (1e4 * train[40][0], train[40][1])  # an explosion
    made = tuner(nn.Linear(2, 3), estimator=st.Unrolled(20), hparams={"lr": 1e-2}, probe=False)
    result = made.fit(train, [points(100, seed=1)], steps=60, progress=False)
    assert len(forgotten) == len(result.history["rewinds"]) > 0
    assert result.ended == "finished"


def test_a_population_needs_rows() -> None:
    with pytest.raises(ValueError, match="population=3 needs an elementwise estimator"):
        tuner(net(), estimator=st.Forward(), population=3)


@pytest.mark.parametrize("estimator", [st.Forward(), st.Unrolled(8), st.Implicit(through="update")])
def test_steps_that_are_not_taken_are_not_observed(
    estimator: AbstractEstimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of NaN, which the run skips."""
    seen, train = spied(monkeypatch), [points(20, seed=s) for s in range(40)]
    train[7] = (torch.full_like(train[7][0], torch.nan), train[7][1])
    made = tuner(nn.Linear(2, 3), estimator=estimator, probe=False, guard=False)
    made.fit(train, [points(40, seed=50)], steps=40, progress=False)
    assert len(seen) == 8
    for _, _, found in seen:
        assert all(bool(torch.isfinite(g)) for g in found.values())


def test_batches_of_types_of_ones_own_resume(tmp_path: Path) -> None:
    Pair = namedtuple("Pair", "points labels")
    train, val = [Pair(*points(20, seed=s)) for s in range(10)], [Pair(*points(40, seed=50))]
    for resume in (False, True):
        made = tuner(net(), estimator=st.Unrolled(5), probe=False)
        result = made.fit(train, val, steps=30, log_dir=tmp_path, resume=resume, progress=False)
        assert result.steps == 30


def test_nothing_to_tune_is_nothing_to_observe() -> None:
    made = tuner(net(), estimator=st.Forward(), tune=(), probe=False)
    assert made.fit(loader(60), [points(40, seed=1)], steps=9, progress=False).steps == 9


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "estimator", [st.Forward(0.9), st.Unrolled(6, checkpoint=2), st.Implicit(through="update")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_on_a_gpu_as_on_the_cpu(estimator: AbstractEstimator, compiled: bool) -> None:
    found = []
    for device, compiles in (("cpu", False), ("cuda", compiled)):
        made = tuner(net(), estimator=estimator, compile=compiles, probe=False, device=device)
        found.append(made.fit(loader(110), [points(40, seed=1)], steps=24, progress=False))
    for n, value in found[0].hparams.items():
        assert found[1].hparams[n] == pytest.approx(value, rel=1e-2), n
