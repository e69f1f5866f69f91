"""Derivatives of a whole step. Truth: autograd through the step itself."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import selftune as st
from selftune.functionalize import flat
from selftune.penalties import L2
from selftune.problem import Point, Problem
from selftune.update import Clock, Update

RULES = {
    "SGD": (st.rules.SGD(), dict(momentum=0.8)),
    "AdamW": (st.rules.AdamW(), dict(eps=1e-6)),
    "RMSprop": (st.rules.RMSprop(), dict(momentum=0.5, eps=1e-6)),
}


def inner(params: Tensor, hparams: dict[str, Tensor], batch: Tensor) -> Tensor:
    return (torch.tanh(params) * batch).sum() ** 2 * hparams["scale"] + (params**4).sum()


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def posed(name: str) -> tuple[Problem, Callable[[], Tensor]]:
    """A problem under a rule, and random vectors for it."""
    rule, options = RULES[name]
    problem = Problem(
        update=Update(rule, (L2(),)), inner_loss=inner, outer_loss=lambda w, b: w.sum(),
        options=options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return problem, lambda: torch.randn(5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", RULES)
def test_push_and_pull_are_the_derivative_of_a_step(name: str) -> None:
    problem, draw = posed(name)
    hparams = {"lr": number(0.03), "weight_decay": draw().abs() * 0.1, "l2": number(0.02),
               "scale": number(1.3)}  # fmt: skip
    point = problem.start(draw(), hparams, draw())
    state = {k: draw().abs() for k in point.state}
    point = Point(point.params, state, point.batch, Clock(3, 0.7, 3))

    def step(params: Tensor, state: dict[str, Tensor], h: dict[str, Tensor]) -> tuple:
        after = problem.step(point._replace(params=params, state=state), h)
        return after.params, after.state

    inputs = (point.params, dict(state), hparams)
    tangent = (draw(), {k: draw() for k in state})
    moving = {"lr": number(0.4), "weight_decay": draw(), "l2": number(-1.0), "scale": number(2.0)}
    expected = torch.func.jvp(step, inputs, (*tangent, moving))[1]
    curved = problem.products.push(point.params, hparams, point.batch)(tangent[0], moving)
    pushed = problem.push_update(point, hparams, tangent, curved, moving)
    torch.testing.assert_close(pushed, expected, rtol=1e-10, atol=1e-12)
    params, states, hyper = torch.func.vjp(step, *inputs)[1](tangent)
    before, found = problem.pull(point, hparams, tangent)
    torch.testing.assert_close(before, (params, states), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, hyper, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_parts_of_derivatives_are_those_of_the_whole(name: str) -> None:
    """``turning`` is ``pull`` less the hyperparameters; ``hessian`` and ``mixing`` by autograd."""
    problem, draw = posed(name)
    hparams = {"lr": number(0.03), "l2": number(0.02), "scale": number(1.3)}
    point = problem.start(draw(), hparams, draw())
    cotangent = draw(), {k: draw() for k in point.state}
    torch.testing.assert_close(
        problem.turning(point, hparams)(cotangent), problem.pull(point, hparams, cotangent)[0]
    )

    def slope(w: Tensor, h: dict[str, Tensor]) -> Tensor:
        grads = problem.products.gradient(w, h, point.batch)
        return problem.update.penalised(w, grads, problem.values(h))

    vector = draw()
    in_weights, in_hparams = torch.func.vjp(slope, point.params, hparams)[1](vector)
    torch.testing.assert_close(problem.hessian(point, hparams)(vector), in_weights)
    torch.testing.assert_close(problem.mixing(point, hparams)(vector), in_hparams)


def test_a_model_becomes_a_problem_without_a_second_copy_of_its_weights() -> None:
    """Tied and frozen weights, buffers, what torch does not copy; truth: the model itself."""
    torch.manual_seed(0)
    tied = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)
    )
    tied[2].weight = tied[0].weight
    tied[2].bias.requires_grad_(False)
    odd = torch.nn.utils.spectral_norm(torch.nn.Linear(4, 4)).eval()
    odd(torch.randn(6, 4))  # now it holds a tensor that it has computed
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(odd)
    for model in (tied, odd):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        weights, call = flat(model)
        x = torch.randn(6, 4)
        torch.testing.assert_close(call(weights, x), model(x))
        assert weights.numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert not torch.equal(call(2 * weights, x), model(x))
        if model is odd:
            assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_options_that_the_update_does_not_know() -> None:
    """Torch's names of pairs, or a typing error, were ignored."""
    net, loss = torch.nn.Linear(2, 1), torch.nn.functional.mse_loss
    for name in ("betas", "amsgard"):
        with pytest.raises(ValueError, match=f"options: '{name}' is unknown to the update"):
            st.as_problem(net, loss, st.Update(st.rules.Adam()), options={name: 0.5})
