"""Models whose parameters are used outside their layers. Truth: finite differences of w + J δ."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import selftune as st

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 5, 4, generator=GENERATOR, dtype=torch.float64)


class Tied(nn.Module):
    """The output layer is a function of the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.drop = nn.Embedding(4, 4), st.nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.drop(self.words(x.argmax(-1)))), self.words.weight)


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input).tanh()


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.layer = st.nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=self.drop(x))


class Flat(nn.Module):
    """Its layers see tokens, not examples."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.layer = st.nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.drop(x).flatten(0, 1))


def frozen_inside() -> nn.Module:
    """Only the output projection of attention responds, which calls it as a function."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.inner = st.nn.Dropout(0.2), nn.MultiheadAttention(4, 2, bias=False)
            self.inner.in_proj_weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(x)
            out: Tensor = self.inner(x, x, x, need_weights=False)[0]
            return out

    return Attends()


MODELS: dict[str, Any] = {
    "tied by a function": Tied,
    "a forward of its own": lambda: nn.Sequential(st.nn.Dropout(0.2), Doubled(4, 3)),
    "spectral norm by a hook": lambda: nn.Sequential(
        st.nn.Dropout(0.2), torch.nn.utils.spectral_norm(nn.Linear(4, 3))
    ),
    "attention, inner weights frozen": frozen_inside,
    "LayerNorm over two dimensions": lambda: nn.Sequential(
        st.nn.Dropout(0.2), nn.LayerNorm((5, 4))
    ),
    "called by keyword": ByKeyword,
    "batch and length as one dimension": Flat,
}


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    net = st.hypernet.convert(MODELS[name]().double(), **options)
    with torch.no_grad():
        for param in net.response_parameters():
            param.copy_(torch.linspace(-1, 1, param.numel()).view_as(param))
        net.spread.fill_(-50.0)  # no perturbation
    return net


@pytest.mark.parametrize("name", MODELS)
def test_the_hypergradient_is_that_of_all_uses_of_a_parameter(name: str) -> None:
    net = make(name)
    assert net.report.per_example
    with net.tuning():
        net(X).square().mean().backward()
    assert not net.report.per_example

    def loss(move: float) -> float:
        weights = net.moved(torch.tensor([move], dtype=torch.float64))
        with torch.no_grad():
            return float(functional_call(net.model.eval(), weights, (X,)).square().mean())

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert float(net.raw.grad) == pytest.approx(slope, rel=1e-5)


def test_examples_perturbed_on_request_are_refused_if_the_model_does_not_follow() -> None:
    net = make("tied by a function", perturb="example")
    with pytest.raises(ValueError, match="perturb='example' is not possible"):
        net(X)


def test_the_comparison_leaves_weights_buffers_and_random_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(5), st.nn.Dropout(0.5)).double()
    net = st.hypernet.convert(model, scale=1e-9)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    net.eval()
    net.perturbation((X,), {})
    assert net.report.per_example
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    torch.set_rng_state(state)
    torch.randn(len(X), 1, dtype=torch.float64)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    net.perturbation((X,), {})
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_respond_like_the_original(how: str) -> None:
    """A copy used to keep the hooks of the original, and did not respond at all."""
    torch.manual_seed(0)
    net = st.hypernet.convert(nn.Sequential(st.nn.Dropout(0.2), nn.Linear(4, 3)).double())
    with torch.no_grad():
        for gain in net.gains.values():
            gain.normal_()
    if how == "deepcopy":
        other = copy.deepcopy(net)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    outputs = []
    for one in (net, other):
        torch.manual_seed(1)
        outputs.append(one(X))
        outputs[-1].square().mean().backward()
    assert torch.equal(*outputs)
    for mine, its in zip(net.response_parameters(), other.response_parameters(), strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, its.grad)
        assert mine is not its


def plain() -> nn.Module:
    return nn.Sequential(st.nn.Dropout(0.2), nn.Linear(4, 3))


@pytest.mark.parametrize("perturb", ["auto", "example"])
def test_a_call_that_fails_decides_nothing(perturb: str) -> None:
    """The error is that of the model, and the next call is compared."""
    net = st.hypernet.convert(plain().double(), perturb=perturb)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(torch.randn(6, 7, dtype=torch.float64))
    net(X)
    assert net.report.per_example
    tied = make("tied by a function")
    with pytest.raises((RuntimeError, IndexError)):
        tied(torch.randn(6, 5, 9, dtype=torch.float64))
    tied(X)
    assert not tied.report.per_example


class Masks(nn.Module):
    """Some logits are −inf."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plain()

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out.masked_fill(torch.arange(3) == 2, -torch.inf)


class Own(nn.Module):
    """Draws from a generator of its own, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.generator = plain(), torch.Generator().manual_seed(0)
        self.calls = 0
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes, self.calls = self.passes + 1, self.calls + 1
        return self.inner(x) + torch.rand(3, generator=self.generator)


class Residual(nn.Module):
    """A small change of a large input, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(st.nn.Dropout(0.2), nn.Linear(4, 4)).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        return x + 0.02 * self.inner(x)


@pytest.mark.parametrize("model", [Masks, Own, Residual])
def test_correct_models_keep_perturbations_of_examples(model: type[nn.Module]) -> None:
    net = st.hypernet.convert(model().float(), perturb="auto")
    if model is Residual:
        net = st.hypernet.convert(model(), perturb="auto")
    for _ in range(2):
        net(X.float())
    assert net.report.per_example
    if model is Own:
        assert float(net.model.passes) == 2


def test_a_graph_made_before_the_first_pass_stays_valid() -> None:
    net = st.hypernet.convert(plain().double())
    penalty = sum(g.square().sum() for g in net.gains.values())
    (net(X).sum() + penalty).backward()
    assert all(g.grad is not None for g in net.gains.values())


@pytest.mark.slow
def test_a_converted_model_compiles_as_one_graph() -> None:
    net = st.hypernet.convert(plain().double(), scale=1e-9)
    torch.testing.assert_close(
        torch.compile(net, fullgraph=True, backend="eager")(X).shape, net(X).shape
    )


def test_the_comparison_is_made_once_even_if_outputs_are_random() -> None:
    """Count: a pass each after the first."""
    net = st.hypernet.convert(Own())
    net(X.float())
    before = net.model.calls
    for _ in range(3):
        net(X.float())
    assert net.model.calls == before + 3


def normed(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(st.nn.Dropout(0.2), nn.Linear(8, 6), layer, nn.Linear(6, 3))


@pytest.mark.parametrize("perturb", ["example", "batch"])
def test_running_statistics_of_delta_backward_are_those_of_one_plain_pass(perturb: str) -> None:
    """Truth: a forward pass of the plain model; counters of random numbers advance."""
    model, x = normed(nn.BatchNorm1d(6)), torch.randn(16, 8)
    net = st.hypernet.convert(copy.deepcopy(model), perturb=perturb)
    st.hypernet.delta_backward(net, lambda out: out.square().mean(), x)
    model.load_state_dict(copy.deepcopy(model.state_dict()) | {"0.key": net.model[0].key - 1})
    model(x)
    for name, buffer in model[2].named_buffers():
        torch.testing.assert_close(net.model[2].get_buffer(name), buffer, msg=name)


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.BatchNorm1d(6), nn.Softmax(1)], ids=str)
def test_layers_that_torch_cannot_differentiate_under_autocast_are_named(layer: nn.Module) -> None:
    """Perturbed per batch, the gradients are those without autocast, to its precision."""
    x, y = torch.randn(16, 8), torch.randn(16, 3)

    def gradient(perturb: str, autocast: bool) -> Tensor:
        net = st.hypernet.convert(normed(copy.deepcopy(layer)), perturb=perturb)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            st.hypernet.delta_backward(net, lambda out: (out.float() - y).square().mean(), x)
        return torch.cat([p.grad.flatten() for p in net.weights() if p.grad is not None])

    with pytest.raises(RuntimeError, match=r"outside of autocast.*perturb='batch'"):
        gradient("example", autocast=True)
    plain = gradient("batch", autocast=False)
    assert float((gradient("batch", autocast=True) - plain).norm()) < 0.1 * float(plain.norm())
