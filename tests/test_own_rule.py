"""Rules, penalties and hyperparameters of a user. Truths: closed forms, torch's steps, bounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune import rules
from selftune.bijections import Identity, Memory
from selftune.hparams import Hparam
from selftune.penalties import AbstractPenalty

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BATCHES = list(zip(X.split(8), X.sum(1, keepdim=True).sin().split(8), strict=True))


class Own(rules.SGD):
    tangent = rules.AbstractRule.tangent


@pytest.mark.parametrize("closed", [True, False])
def test_it_tunes_alike(closed: bool) -> None:
    ends = []
    for rule in (rules.SGD(), Own()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        tuner = st.Tuner(
            net, F.mse_loss, rule=rule, hparams={"lr": 0.01, "momentum": 0.5, "weight_decay": 1e-4},
            estimator=st.Trace(closed_forms=closed), probe=False, compile=False,
        )  # fmt: skip
        ends.append(tuner.fit(BATCHES[:6], BATCHES[6:], steps=40, progress=False).hparams)
    assert ends[1] == pytest.approx(ends[0], rel=1e-9)
    assert ends[0]["lr"] != 0.01


class Clamped(rules.AdamW):
    def direction(
        self, grads: Tensor, state: dict[str, Tensor], values: Mapping[str, Any], age: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        direction, after = super().direction(grads, state, values, age)
        return direction.clamp(-0.01, 0.01), after


FIXED: dict[str, Any] = dict(tune=(), probe=False, guard=False, schedule="constant", compile=False)


def trained(rule: rules.AbstractRule, hparams: dict[str, float], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(4, 1).double()
    tuner = st.Tuner(net, F.mse_loss, rule=rule, hparams=hparams, **{**FIXED, **options})
    tuner.fit(BATCHES[:6], BATCHES[6:], steps=5, progress=False)
    return net


def test_a_direction_of_ones_own_is_taken() -> None:
    """Law: a step is at most a hundredth of the rate; AdamW's kernel would take whole ones."""
    torch.manual_seed(0)
    start = nn.Linear(4, 1).double()
    ends = trained(Clamped(), {"lr": 0.1, "weight_decay": 0.0})
    assert (ends.weight - start.weight).abs().max() <= 5 * 0.1 * 0.01 + 1e-12  # type: ignore[operator]


def test_a_rule_with_a_name_of_torchs_is_not_torchs() -> None:
    own = type("AdamW", (Clamped,), {})()
    (weight,) = params = [torch.ones(1)]
    made = rules.PlainOptimizer.of(own, {"lr": 0.1, "weight_decay": 0.0}).make(params)
    weight.grad = torch.ones(1)
    made.step()
    assert float(weight.detach()) == pytest.approx(1 - 0.1 * 0.01)


class Clips:
    """A mixin, as users share between rules."""

    def direction(
        self, grads: Tensor, state: dict[str, Tensor], values: Mapping[str, Any], age: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        direction, after = super().direction(grads, state, values, age)  # type: ignore[misc]
        return direction.clamp(-0.01, 0.01), after


class Mixed(Clips, rules.SGD):
    pass


class More(rules.SGD):
    defaults = MappingProxyType({**rules.SGD.defaults, "more": 0.5})


@pytest.mark.parametrize(("rule", "moved"), [(Mixed(), 0.001), (More(), 0.1)])
def test_a_mixin_and_a_further_option_are_not_torchs(rule: rules.SGD, moved: float) -> None:
    (weight,) = params = [torch.ones(1)]
    made = rules.PlainOptimizer.of(rule, {"lr": 0.1}).make(params)
    weight.grad = torch.ones(1)
    made.step()
    assert float(weight.detach()) == pytest.approx(1 - moved)
    assert (rule.in_place({**rule.defaults, "lr": 0.1, "decay": 0.0}) is None) == (moved < 0.1)


class Late(rules.SGD):
    """Momentum from the fourth step on."""

    def at(self, values: Mapping[str, Any], step: Any) -> Mapping[str, Any]:
        return {**values, "momentum": values["momentum"] * (step >= 3)}


def test_values_that_depend_on_the_step_do_so_without_tuning() -> None:
    """Closed form: the momentum buffer is g in three steps, then 0.9 of the one before more."""
    params = [torch.zeros(1)]
    made = rules.Untuned(params, Late(), lr=1.0, momentum=0.9)
    buffer = moved = 0.0
    for step in range(6):
        params[0].grad = torch.ones(1)
        made.step()
        buffer = (0.9 * buffer if step >= 3 else 0.0) + 1
        moved -= buffer
    assert float(params[0]) == pytest.approx(moved)


def test_a_state_that_begins_elsewhere_is_refused() -> None:
    class Adagrad(rules.SGD):
        def init(self, params: Tensor, values: Mapping[str, Any]) -> dict[str, Tensor]:
            return {"momentum_buffer": torch.ones_like(params)}

    with pytest.raises(ValueError, match="rule=Adagrad: init returns a state 'momentum_buffer'"):
        trained(Adagrad(), {})


class Signed(rules.SGD):
    hparams = (
        Hparam(name="mix", bijection=Identity(), lower=-2.0, upper=2.0, from_zero=0.0),
        Hparam(
            name="short", bijection=Memory(), lower=0.0, upper=0.5, from_zero=0.1, role="momentum"
        ),
    )
    tuned = ("lr", "mix", "short")
    defaults = MappingProxyType(dict(lr=1e-2, mix=0.0, short=0.4, weight_decay=0.0))

    def direction(
        self, grads: Tensor, state: dict[str, Tensor], values: Mapping[str, Any], age: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        buffer = values["short"] * state["momentum_buffer"] + (1 - values["short"]) * grads
        return grads + values["mix"] * buffer, {"momentum_buffer": buffer}


def test_bounds_and_signs_of_ones_own_hyperparameters_hold() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    tuner = st.Tuner(net, F.mse_loss, rule=Signed(), hparams={"mix": -0.3}, compile=False)
    assert tuner.scales["short"].upper == 0.5
    result = tuner.fit(BATCHES[:6], BATCHES[6:], steps=300, progress=False)
    assert result.history["mix"][0] == pytest.approx(-0.3)
    assert max(result.history["short"]) <= 0.5


@dataclass(frozen=True)
class Pull(AbstractPenalty):
    """Half the squared distance from a point."""

    name = "pull"
    to: float = 0.0

    def value(self, params: Tensor) -> Tensor:
        return 0.5 * (params - self.to).square().sum()

    def gradient(self, params: Tensor) -> Tensor:
        return params - self.to


@pytest.mark.parametrize(
    "name", ["lr", "decay", "momentum", "dampening", "weight_decay", "maximize", "params"]
)
def test_a_penalty_has_a_name_of_its_own(name: str) -> None:
    own = type("Own", (Pull,), {"name": name})(0.1)
    message = f"has the name '{name}' of a hyperparameter or option of SGD"
    with pytest.raises(ValueError, match=message):
        st.SGD(nn.Linear(4, 1), penalty=own)
    with pytest.raises(ValueError, match=message):
        st.Tuner(nn.Linear(4, 1), F.mse_loss, rule=rules.SGD(), penalty=own)


def test_penalties_may_come_from_an_iterator() -> None:
    tuner = st.Tuner(nn.Linear(4, 1), F.mse_loss, penalty=iter([Pull(0.1)]))  # type: ignore[arg-type]
    assert tuner.starts["pull"] == pytest.approx(0.1)


def test_a_penalty_is_known_by_a_function_without_its_address() -> None:
    @dataclass(frozen=True)
    class Named(Pull):
        name = "named"
        what: Any = None

    def optimizer() -> st.SGD:
        return st.SGD(nn.Linear(4, 1), penalty=Named(0.1, what=lambda: 1.0))

    optimizer().load_state_dict(optimizer().state_dict())


def test_a_penalty_and_a_layer_have_different_names() -> None:
    net = nn.Sequential(st.nn.Dropout(0.1), nn.Linear(4, 1))
    own = type("Own", (Pull,), {"name": "dropout"})(0.1)
    with pytest.raises(ValueError, match=r"layers named \['dropout'\] have the names of hyperpara"):
        st.Tuner(net, F.mse_loss, penalty=own)


def test_a_proximal_map_of_ones_own_is_refused() -> None:
    own = type("Own", (Pull,), {"proximal": True})(0.1)
    with pytest.raises(ValueError, match="proximal=True is for ProximalL1"):
        st.SGD(nn.Linear(4, 1), penalty=own)


PENALTIES = [
    (Pull(0.1), Pull(0.1, to=1.0), r"Pull\(to=0.0\) there and Pull\(to=1.0\)"),
    (st.penalties.L1(0.1), st.penalties.ProximalL1(0.1), r"L1\(\) there and ProximalL1"),
    (st.penalties.L1(0.1), st.penalties.L1(0.5), r"'l1': 0.1\} there and \{'l1': 0.5"),
    (st.penalties.L1(0.1), None, r"penalties is L1\(\) there and none here"),
]


@pytest.mark.parametrize(("first", "second", "message"), PENALTIES)
def test_a_run_resumes_with_its_own_penalties(
    tmp_path: Path, first: Any, second: Any, message: str
) -> None:
    options: dict[str, Any] = {"tune": ("lr",), "compile": False}

    def fit(penalty: Any, **more: Any) -> None:
        tuner = st.Tuner(nn.Linear(4, 1).double(), F.mse_loss, penalty=penalty, **options)
        tuner.fit(BATCHES[:6], BATCHES[6:], steps=10, progress=False, log_dir=tmp_path, **more)

    fit(first)
    with pytest.raises(ValueError, match=message):
        fit(second, resume=True)
    fit(first, resume=True)


def test_a_state_is_of_an_optimizer_with_the_same_penalties() -> None:
    net = nn.Linear(4, 1)
    state = st.SGD(net, penalty=Pull(0.1)).state_dict()
    with pytest.raises(ValueError, match=r"Pull\(to=0.0\).*Pull\(to=1.0\)"):
        st.SGD(net, penalty=Pull(0.1, to=1.0)).load_state_dict(state)
    st.SGD(net, penalty=Pull(0.3)).load_state_dict(state)


class TwoKinds(nn.Module):
    """Weights of two dtypes, which a run keeps in separate tensors, as those of large models."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 16), nn.Linear(16, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.float()).relu().double())


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rules.SGD(), rules.Adam()])
def test_compiled_steps_have_the_untuned_strengths_of_eager_ones(rule: rules.AbstractRule) -> None:
    """Truth: the eager run. torch's compiler took a weight decay added to a product for 1."""
    nets = []
    for compiled in (False, True):
        torch.manual_seed(0)
        nets.append(TwoKinds())
        tuner = st.Tuner(
            nets[-1], F.mse_loss, rule=rule, hparams={"lr": 0.01, "weight_decay": 1e-3, "l1": 1e-3},
            **{**FIXED, "tune": ("lr",), "compile": compiled},
        )  # fmt: skip
        tuner.fit(BATCHES[:6], BATCHES[6:], steps=6, progress=False)
    for mine, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_a_signed_hyperparameter_is_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"hparams\['mix'\]=.* must be finite"):
        st.Tuner(nn.Linear(4, 1), F.mse_loss, rule=Signed(), hparams={"mix": value})
