"""Losses that cannot be differentiated twice, or that jump. Truths: torch itself, an equal loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Once
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import selftune as st
from selftune._flat import Layout

DOUBLE = torch.float64


class Bend(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    "net", [nn.Sequential(nn.Linear(4, 8), Bend(), nn.Linear(8, 3)), normed()], ids=["once", "norm"]
)
@pytest.mark.parametrize("backend", ["auto", "differences"])
def test_exact_refuses_what_it_would_differentiate_wrongly(net: nn.Module, backend: str) -> None:
    """It gave a third of the truth. Forward agrees with finite differences of the run."""
    torch.manual_seed(0)
    problem, weights = st.as_problem(
        net.double(), F.mse_loss, st.Update(st.rules.SGD()), backend=backend
    )
    batches = [(torch.randn(5, 4, dtype=DOUBLE), torch.randn(5, 3, dtype=DOUBLE))] * 8
    given = (weights, {"lr": torch.tensor(0.3, dtype=DOUBLE)}, batches, batches[0])
    truth = st.hypergradient(problem, st.estimators.FiniteDifference(), *given).grads["lr"]
    assert st.hypergradient(problem, st.Forward(), *given).grads["lr"] == pytest.approx(
        float(truth), rel=1e-4
    )
    with pytest.raises(RuntimeError, match=r"twice: .+Use FiniteDifference, Forward or Unrolled"):
        st.hypergradient(problem, st.estimators.Exact(), *given)


def dropped(net: nn.Sequential, backend: str) -> tuple[Any, ...]:
    """A problem whose hyperparameter is a dropout rate, and what ``hypergradient`` is given."""
    named = {n: p.detach() for n, p in net.named_parameters()}
    layout, layer = Layout(list(named.values())), net[2]
    assert isinstance(layer, st.nn.Dropout)

    def output(w: Tensor, inputs: Tensor, buffers: dict[str, Tensor]) -> Any:
        tensors = dict(zip(named, layout.views(w), strict=True))
        return functional_call(net, {**tensors, **buffers}, (inputs,))

    def inner(w: Tensor, h: Any, batch: Any) -> Tensor:
        inputs, target, key = batch
        buffers = {"2.strength": h["rate"].view(1), "2.key": key.clone()}
        return F.mse_loss(output(w, inputs, buffers), target)

    def outer(w: Tensor, batch: Any) -> Tensor:
        buffers = {"2.strength": torch.zeros(1, dtype=DOUBLE), "2.key": layer.key.clone()}
        return F.mse_loss(output(w, batch[0], buffers), batch[1])

    x = torch.randn(32, 6, dtype=DOUBLE)
    batches = [(x[:16], x[:16, :2].sin(), layer.key + i) for i in range(10)]
    problem = st.Problem(
        update=st.Update(st.rules.SGD()), inner_loss=inner, outer_loss=outer, backend=backend
    )
    values = {n: torch.tensor(v, dtype=DOUBLE) for n, v in {"lr": 0.1, "rate": 0.3}.items()}
    return (
        problem,
        layout.flatten(list(named.values())),
        values,
        batches,
        (x[16:], x[16:, :2].sin()),
    )


def test_rates_of_masks_are_no_differences() -> None:
    """The derivative had the wrong sign. Truth: the same net by double backward."""
    torch.manual_seed(0)
    first = nn.Linear(6, 16)
    rest = (nn.Tanh(), st.nn.Dropout(0.3), nn.Linear(16, 2))
    torch.manual_seed(1)
    problem, *given = dropped(nn.Sequential(first, *rest).double(), "auto")
    truth = st.hypergradient(problem, st.Unrolled(), *given).grads["rate"]
    assert st.hypergradient(problem, st.Forward(), *given).grads["rate"] == pytest.approx(
        float(truth)
    )
    torch.manual_seed(1)
    problem, *given = dropped(nn.Sequential(weight_norm(first), *rest).double(), "auto")
    found = st.hypergradient(problem, st.Unrolled(), *given).grads["rate"]
    assert problem.products.backend == "differences"
    assert bool(found.sign() == truth.sign())
    for estimator in (st.Forward(), st.Trace(1.0)):
        with pytest.raises(RuntimeError, match=r"\['rate'\], which differences.+use Unrolled"):
            st.hypergradient(problem, estimator, *given)


@pytest.mark.parametrize("backend", ["auto", "differences"])
def test_values_at_the_edge_of_their_range(backend: str) -> None:
    """It was NaN: a difference reaches below 0. Truth: the derivative by double backward."""

    def inner(w: Tensor, h: Any, batch: Any) -> Tensor:
        return (batch * w - 1).square().mean() + h["s"].sqrt() * w.abs().pow(1.5).sum()

    torch.manual_seed(0)
    problem = st.Problem(
        update=st.Update(st.rules.SGD()), inner_loss=inner, backend=backend,
        outer_loss=lambda w, batch: (batch * w - 1).square().mean(),
    )  # fmt: skip
    batches = [torch.rand(5) for _ in range(4)]
    given = torch.randn(5), {"lr": torch.tensor(0.1), "s": torch.tensor(1e-3)}, batches, batches[0]
    found = st.hypergradient(problem, st.Unrolled(), *given).grads["s"]
    assert found.isfinite()
    if backend == "auto":
        forward = st.hypergradient(problem, st.Forward(), *given).grads["s"]
        assert forward == pytest.approx(float(found), rel=1e-4)
    else:
        with pytest.raises(RuntimeError, match=r"\['s'\], which differences"):
            st.hypergradient(problem, st.Forward(), *given)


@pytest.mark.parametrize("estimator", [st.estimators.Exact(), st.estimators.FiniteDifference()])
def test_references_are_no_estimators_of_training_runs(estimator: Any) -> None:
    """They repeated the run without its schedule."""
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"reference for short runs.+Unrolled"):
        st.SGD(net.parameters(), lr=0.1, estimator=estimator)
    with pytest.raises(ValueError, match=r"reference for short runs.+Unrolled"):
        st.Tuner(net, F.mse_loss, estimator=estimator)


def test_group_penalties_of_problems_see_rows() -> None:
    """They were those of single weights. Truth: autograd on the penalty's formula."""
    torch.manual_seed(0)
    net, level = nn.Linear(4, 3).double(), 0.1
    batch = torch.randn(5, 4, dtype=DOUBLE), torch.randn(5, 3, dtype=DOUBLE)
    update = st.Update(st.rules.SGD(), penalties=(st.penalties.Group(),))
    problem, weights = st.as_problem(net, F.mse_loss, update)
    values = {"lr": torch.tensor(0.5, dtype=DOUBLE), "group": torch.tensor(level, dtype=DOUBLE)}
    point = problem.start(weights, values)._replace(batch=batch)
    after = problem.step(point, values).params

    optimizer = st.SGD(net, lr=0.5, momentum=0, penalty=st.penalties.Group(), tune=(), probe=False)
    optimizer.param_groups[0]["group"] = level
    F.mse_loss(net(batch[0]), batch[1]).backward()
    optimizer.step()
    assert torch.allclose(after, torch.cat([p.detach().ravel() for p in net.parameters()]))


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
     (torch.float32, torch.float64)],
)  # fmt: skip
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="torch.func refuses mixed dtypes up to torch 2.11 or 2.12",
)
def test_problems_of_half_and_mixed_models(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Truth: the loss of the model itself."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = (nn.Linear(3, 3, dtype=d) for d in dtypes)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.first(x.to(dtypes[0]))
            return self.last(hidden.to(dtypes[1]))  # type: ignore[no-any-return]

    net, batch = Mixed(), (torch.randn(4, 3), torch.randn(4, 3))
    problem, weights = st.as_problem(net, F.mse_loss, st.Update(st.rules.SGD()))
    assert torch.equal(problem.inner_loss(weights, {}, batch), F.mse_loss(net(batch[0]), batch[1]))
    values = {"lr": torch.tensor(0.1, dtype=weights.dtype)}
    assert (
        st.hypergradient(problem, st.Trace(1.0), weights, values, [batch], batch)
        .grads["lr"]
        .isfinite()
    )


def test_complex_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is complex.+view_as_real"):
        st.as_problem(nn.Linear(2, 2, dtype=torch.complex64), F.mse_loss, st.Update(st.rules.SGD()))


def test_a_loss_that_refuses_values_outside_of_their_range() -> None:
    """Estimators that move no hyperparameter are not affected. Truth: the steps by hand."""

    def inner(w: Tensor, h: Any, batch: Any) -> Tensor:
        if float(h["p"].detach()) > 1:
            raise ValueError("p is above 1")
        return (batch * w - h["p"]).square().mean()

    torch.manual_seed(0)
    batches, weights = [torch.rand(5) for _ in range(3)], torch.randn(5)
    values = {"lr": torch.tensor(0.1), "p": torch.tensor(0.999)}
    problem = st.Problem(
        update=st.Update(st.rules.SGD()), inner_loss=inner, backend="differences",
        outer_loss=lambda w, batch: (batch * w - 1).square().mean(),
    )  # fmt: skip
    given = weights, values, batches, batches[0]
    found = st.hypergradient(problem, st.Unrolled(), *given).grads["p"]
    moved = values["p"].clone().requires_grad_()
    w = weights
    for batch in batches:
        w = w - 0.1 * 2 / 5 * batch * (batch * w - moved)
    slope = (2 / 5 * batches[0] * (batches[0] * w - 1)).detach()
    (truth,) = torch.autograd.grad(w @ slope, moved)
    assert found == pytest.approx(float(truth), rel=1e-2)
    with pytest.raises(RuntimeError, match=r"\['p'\], which differences"):
        st.hypergradient(problem, st.Forward(), *given)
