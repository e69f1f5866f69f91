"""Update rules. Truths: torch.optim's own steps, the paper (Lion), and finite differences."""

import copy
import io
import pickle

import pytest
import torch

import selftune as st
from selftune import rules
from selftune.penalties import L1, L2, AbstractPenalty, Elastic, Group, ProximalL1
from selftune.rules._base import hoist
from selftune.update import Clock, Update

OPTIONS = {
    "SGD": dict(momentum=0.0, dampening=0.0, nesterov=False),
    "Adam": dict(betas=(0.9, 0.999), eps=1e-8, amsgrad=False),
    "AdamW": dict(betas=(0.9, 0.999), eps=1e-8, amsgrad=False),
    "RMSprop": dict(alpha=0.99, eps=1e-8, momentum=0.0, centered=False),
}
TWINS = [
    ("SGD", dict()),
    ("SGD", dict(weight_decay=0.1)),
    ("SGD", dict(momentum=0.9, weight_decay=0.01)),
    ("SGD", dict(momentum=0.9, dampening=0.5)),
    ("SGD", dict(momentum=0.0, dampening=0.5)),
    ("SGD", dict(momentum=0.8, nesterov=True, weight_decay=0.1)),
    ("Adam", dict()),
    ("Adam", dict(weight_decay=0.1, betas=(0.5, 0.9), eps=1e-3)),
    ("Adam", dict(amsgrad=True, betas=(0.9, 0.6))),
    ("AdamW", dict(weight_decay=0.3)),
    ("AdamW", dict(weight_decay=0.3, amsgrad=True, betas=(0.0, 0.6))),
    ("RMSprop", dict()),
    ("RMSprop", dict(momentum=0.7, weight_decay=0.1, alpha=0.8)),
    ("RMSprop", dict(centered=True, momentum=0.5, eps=1e-4)),
]


def values_of(options: dict) -> dict:
    values = dict(lr=0.03, decay=0.0, weight_decay=0.0) | options
    if "betas" in values:
        values["beta1"], values["beta2"] = values.pop("betas")
    return values


def problem(seed: int = 0):
    """A random quartic in five dimensions and its gradient."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    start = torch.randn(5, generator=generator, dtype=torch.float64)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return (matrix @ w).square().sum() / 2 + w.pow(4).sum() / 4

    return start, loss


@pytest.mark.parametrize(("name", "options"), TWINS)
def test_equals_torch_step_for_step(name: str, options: dict) -> None:
    start, loss = problem()
    param = torch.nn.Parameter(start.clone())
    twin = getattr(torch.optim, name)([param], lr=0.03, **({"weight_decay": 0.0} | options))
    update = Update(getattr(rules, name)())
    values = values_of(OPTIONS[name] | options)
    ours, state = start.clone(), update.rule.init(start, values)
    for step in range(50):
        twin.zero_grad()
        loss(param).backward()
        twin.step()
        grads = torch.func.grad(loss)(ours)
        ours, state = update(ours, grads, state, values, Clock(step, 1.0, step))
        assert (ours - param.detach()).abs().max() <= 1e-12


def test_lion_equals_its_paper() -> None:
    """Algorithm 2 of Chen et al. 2023, written out."""
    start, loss = problem()
    beta1, beta2, lr, decay = 0.9, 0.99, 0.01, 0.1
    theta, m = start.clone(), torch.zeros(5, dtype=torch.float64)
    update = Update(rules.Lion())
    values = dict(lr=lr, decay=0.0, weight_decay=decay, beta1=beta1, beta2=beta2)
    ours, state = start.clone(), update.rule.init(start, values)
    for step in range(50):
        grads = torch.func.grad(loss)(theta)
        c = beta1 * m + (1 - beta1) * grads
        theta = theta - lr * (torch.sign(c) + decay * theta)
        m = beta2 * m + (1 - beta2) * grads
        ours, state = update(
            ours, torch.func.grad(loss)(ours), state, values, Clock(step, 1.0, step)
        )
        assert (ours - theta).abs().max() <= 1e-12


SMOOTH = [
    ("SGD", dict(momentum=0.9, dampening=0.1, nesterov=False)),
    ("SGD", dict(momentum=0.9, dampening=0.0, nesterov=True)),
    ("Adam", dict(betas=(0.9, 0.99), eps=1e-8, amsgrad=False)),
    ("AdamW", dict(betas=(0.9, 0.99), eps=1e-8, amsgrad=False)),
    ("AdamW", dict(betas=(0.9, 0.99), eps=1e-8, amsgrad=True)),
    ("RMSprop", dict(alpha=0.9, eps=1e-8, momentum=0.5, centered=False)),
    ("RMSprop", dict(alpha=0.9, eps=1e-8, momentum=0.5, centered=True)),
]


@pytest.mark.parametrize(("name", "options"), [*SMOOTH, ("Lion", dict(betas=(0.9, 0.99)))])
def test_gradcheck_through_every_hyperparameter(name: str, options: dict) -> None:
    """Finite differences of four steps in lr, α, weight decay, λ₁, λ₂ and the rule's own."""
    start, loss = problem()
    update = Update(getattr(rules, name)(), (L1(), L2()))
    values = values_of(options) | dict(lr=0.02, decay=0.1, weight_decay=0.05, l1=0.02, l2=0.03)
    names = list(update.hparams)

    def end(*moving: torch.Tensor) -> torch.Tensor:
        hparams = values | dict(zip(names, moving, strict=True))
        w, state = start, update.rule.init(start, values)
        for step in range(4):
            w, state = update(w, torch.func.grad(loss)(w), state, hparams, Clock(step, 1.0, step))
        return w

    inputs = [torch.tensor(values[n], dtype=torch.float64, requires_grad=True) for n in names]
    assert torch.autograd.gradcheck(end, inputs, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("discount", "steps"), [(1.0, 1), (0.9, 1), (0.9, 3)])
@pytest.mark.parametrize(("name", "options"), SMOOTH)
def test_hand_derived_tangents_equal_forward_mode(
    name: str, options: dict, discount: float, steps: int
) -> None:
    """``rule.tangent`` for each hyperparameter against forward mode, from a random state."""
    rule = getattr(rules, name)()
    generator = torch.Generator().manual_seed(1)
    w, g, other = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    values = values_of(options)
    for age in (0, 3, torch.tensor([0.0, 1, 2, 3, 4, 5, 6], dtype=torch.float64)):
        state = {k: other.square() + 1 + v for k, v in rule.init(w, values).items()}
        if name == "RMSprop" and "grad_avg" in state:
            state["grad_avg"] = 0.1 * other
        moved = rule.direction(g, state, values, age)
        rows = [(None, {h.name: 0.3}) for h in rule.hparams] + [(other, {})]
        for grads_dot, hparams_dot in rows:
            for state_dot in ({}, {k: other * 0.2 for k in state}):
                at = rules.Evaluation(g, state, values, age, *moved)
                dots = rules.Dots(grads_dot, state_dot, hparams_dot, discount, steps)
                want = rules.AbstractRule.tangent(rule, at, dots)
                copied = {k: v.clone() for k, v in state_dot.items()}
                got = rule.tangent(at, dots._replace(state=copied))
                torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
                for key, value in want[1].items():
                    zero = torch.zeros_like(value)
                    torch.testing.assert_close(got[1].get(key, zero), value, rtol=1e-12, atol=1e-14)


def test_group_and_elastic_enter_the_gradient() -> None:
    """The penalised gradient equals autograd's of J + λ₁Ω₁ + λ₂Ω₂."""
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    update = Update(rules.AdamW(), (Elastic(), Group()))
    values = dict(weight_decay=0.0, elastic=0.3, group=0.2)
    total = 0.3 * Elastic().value(w) + 0.2 * Group().value(w)
    (want,) = torch.autograd.grad(total, w)
    got = update.penalised(w.detach(), torch.zeros_like(w), values)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (st.rules.Lion(), "beta1"),
        (st.rules.Lion(), "l1"),
        (st.rules.Mixture([st.rules.Lion(), st.rules.AdamW()]), "lion_beta2"),
    ],
)
def test_what_has_no_derivative_is_not_tuned_by_gradient(
    rule: rules.AbstractRule, name: str
) -> None:
    """Both drivers refuse it by name; a population chooses by loss instead."""
    model, match = torch.nn.Linear(2, 1), f"tune='{name}' would have no effect: the steps of "
    loss_fn = torch.nn.functional.mse_loss
    with pytest.raises(ValueError, match=match + type(rule).__name__):
        st.Tuner(model, loss_fn, rule=rule, penalty=L1(1e-3), tune=("lr", name))
    if isinstance(rule, rules.Lion):
        st.Tuner(model, loss_fn, rule=rule, penalty=L1(1e-3), tune=("lr", name), population=2)
        with pytest.raises(ValueError, match=match):
            st.Lion(model, penalty=L1(1e-3), tune=("lr", name))


def test_lion_tunes_proximal_penalties_alone(caplog: pytest.LogCaptureFixture) -> None:
    def starts(penalty: AbstractPenalty) -> dict[str, float]:
        loss_fn = torch.nn.functional.mse_loss
        return st.Tuner(torch.nn.Linear(2, 1), loss_fn, rule=rules.Lion(), penalty=penalty).starts

    assert starts(ProximalL1(1e-3))["l1"] == 1e-3
    assert not caplog.text
    assert "l1" not in starts(L1(1e-3))
    assert "l1 keeps its value" in caplog.text
    loss_fn, model = torch.nn.functional.mse_loss, torch.nn.Linear(2, 1)
    several = st.Tuner(model, loss_fn, rule=rules.Lion(), penalty=L1(1e-3), population=2)
    assert several.starts["l1"] == 1e-3  # chosen by loss


def test_hoisted_scalars_keep_their_values() -> None:
    """Law: also gradients through them; numbers, and tensors with a value per weight, as given."""
    given = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.1, 2.0)]
    kept = hoist(*given)
    assert [float(v.detach()) for v in kept] == [0.1, 2.0]
    grads = torch.autograd.grad(kept[0] * kept[1], given)
    assert [float(g) for g in grads] == [2.0, 0.1]
    assert hoist(torch.tensor(3.0))[0].ndim == 0
    each = torch.ones(3), torch.tensor(2.0)
    assert all(a is b for a, b in zip(hoist(*each), each, strict=True))
    assert hoist(1.5, torch.tensor(2.0))[0] == 1.5


def test_hyperparameters_of_a_rule_are_those_of_the_run() -> None:
    with pytest.raises(TypeError, match=r"hparams=\{'momentum': 0.9\} to st.Tuner"):
        rules.SGD(momentum=0.9)
    assert repr(rules.AdamW()) == "AdamW()"


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_plain_optimizers_without_a_twin_can_be_copied(how: str) -> None:
    """Truth: the optimizer that was copied."""
    params = [torch.nn.Parameter(torch.ones(3))]
    opt = rules.PlainOptimizer.of(rules.Lion(), {"lr": 0.1}).make(params)

    def step(params: list, opt: torch.optim.Optimizer) -> torch.Tensor:
        params[0].grad = torch.tensor([1.0, -2.0, 0.5])
        opt.step()
        return params[0].detach().clone()

    step(params, opt)
    if how == "deepcopy":
        copies = copy.deepcopy((params, opt))
    elif how == "pickle":
        copies = pickle.loads(pickle.dumps((params, opt)))
    else:
        file = io.BytesIO()
        torch.save((params, opt), file)
        file.seek(0)
        copies = torch.load(file, weights_only=False)
    assert torch.equal(step(*copies), step(params, opt))
