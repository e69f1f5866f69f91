"""Converted models. Truths: the plain model bit for bit, a loop over examples, double backward."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

import selftune as st


class Tied(nn.Module):
    """An LSTM language model whose output layer has the weights of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.drop = nn.Embedding(12, 6), st.nn.Dropout(0.2)
        self.lstm, self.head = nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 12)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.lstm(self.words(x))[0])).transpose(1, 2)


class UNet(nn.Module):
    """Down, and up again by a transposed convolution, with a way around."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, padding=1)
        self.norm, self.drop = nn.GroupNorm(2, 8), st.nn.Dropout2d(0.2)
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.first(x))
        deep = self.drop(F.relu(self.norm(self.down(wide))))
        return self.last(torch.cat([wide, self.up(deep)], 1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), Block(), Block(), st.nn.Dropout2d(0.2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(st.nn.Dropout(0.2), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))


def mlp() -> nn.Module:
    return nn.Sequential(
        st.nn.Dropout(0.2, name="in"), nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(),
        st.nn.Dropout(0.3), nn.Linear(8, 3),
    )  # fmt: skip


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "MLP": (mlp, images(8, 5), classes(8)),
    "residual": (residual, images(8, 1, 6, 6), classes(8)),
    "U-Net": (UNet, images(4, 1, 8, 8), classes(4, 8, 8)),
    "tied LSTM": (Tied, classes(4, 7), classes(4, 7)),
    "encoder": (encoder, images(4, 5, 8), classes(4)),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 8)), nn.ReLU(),
                              st.nn.Dropout(0.2), nn.Linear(8, 3)),
        images(8, 5), classes(8),
    ),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 4, 3)), st.nn.Dropout(0.2),
                              nn.Flatten(), nn.Linear(12, 3)),
        images(4, 2, 5), classes(4),
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", CASES)


def case(name: str) -> tuple[nn.Module, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    make, x, y = CASES[name]
    torch.manual_seed(0)
    model = make()

    def loss(output: Tensor) -> Tensor:
        output = output.mean(1) if name == "encoder" else output
        return F.cross_entropy(output, y)

    return model, x, y, loss


def stirred(net: st.hypernet.SelfTuned) -> st.hypernet.SelfTuned:
    """With a response that is not 0."""
    generator = torch.Generator().manual_seed(1)
    for gain in net.gains.values():
        gain.data = 0.3 * torch.randn(gain.shape, generator=generator).to(gain)
    return net


@each
def test_the_plain_model_comes_out_bit_for_bit(name: str) -> None:
    model, x, _, _ = case(name)
    before = copy.deepcopy(model).eval()(x)
    net = stirred(st.hypernet.convert(model)).eval()
    assert torch.equal(net(x), before)
    plain = net.revert()
    assert plain is model
    assert torch.equal(plain(x), before)
    assert not any(m._forward_hooks for m in model.modules())


@each
@pytest.mark.parametrize("mode", ["stn", "delta"])
def test_it_trains_tunes_and_reverts(name: str, mode: str) -> None:
    model, x, _, loss = case(name)
    start = copy.deepcopy(model.state_dict())
    net = st.hypernet.convert(model).train()
    weights = torch.optim.SGD(net.weights(), lr=0.05)
    hyper = torch.optim.Adam(net.hyper_parameters(), lr=0.05)
    before = net.hparams()
    losses = []
    for _ in range(20):
        weights.zero_grad()
        if mode == "stn":
            value = loss(net(x))
            value.backward()
        else:
            value = st.hypernet.delta_backward(net, loss, x)
        losses.append(float(value.detach()))
        weights.step()
        with net.tuning():
            hyper.zero_grad()
            (loss(net(x)) - 1e-3 * net.entropy()).backward()
        hyper.step()
        assert net.training
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(net.hparams()[n] != before[n] for n in before)
    plain = net.revert().eval()
    assert plain.state_dict().keys() == start.keys()
    found = {n: float(f.value) for n, f in st.nn.tunables(plain).items()}
    assert found == pytest.approx(net.hparams())
    assert torch.equal(plain(x), net.eval()(x))


def test_each_example_responds_to_its_own_perturbation() -> None:
    """Truth: the model called on one example after the other, with weights w + J δ."""
    for name in ("MLP", "U-Net"):
        model, x, _, _ = case(name)
        net = stirred(st.hypernet.convert(model)).double().eval()
        assert net.report.per_example
        x = x.double()
        delta = torch.randn(len(x), len(net.raw), dtype=torch.float64)
        together = net.at(delta, (x,), {})
        for i in range(len(x)):
            alone = functional_call(net.model, net.moved(delta[i]), (x[i : i + 1],))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-12)


def test_words_respond_to_the_perturbation_of_their_example() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), st.nn.Dropout(0.2), nn.Linear(4, 3))
    net = stirred(st.hypernet.convert(model)).double().eval()
    words, delta = classes(4, 6) + 1, torch.randn(4, 1, dtype=torch.float64)
    together = net.at(delta, (words,), {})
    for i in range(4):
        alone = functional_call(net.model, net.moved(delta[i]), (words[i : i + 1],))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("perturb", ["example", "batch"])
@pytest.mark.parametrize("name", ["MLP", "U-Net", "tied LSTM", "encoder"])
def test_delta_gradients_are_those_of_double_backward(name: str, perturb: str) -> None:
    if perturb == "example" and name in ("tied LSTM", "encoder"):
        perturb = "auto"  # one a batch
    model, x, _, loss = case(name)
    net = stirred(st.hypernet.convert(model, perturb=perturb)).double().train()
    x = x.double() if x.is_floating_point() else x
    for module in net.modules():  # the same draws in all passes
        if isinstance(module, st.nn.Stochastic):
            module.eval()
    torch.manual_seed(5)
    st.hypernet.delta_backward(net, loss, x)
    found = [p.grad for p in net.weights()]
    torch.manual_seed(5)
    delta, _ = net.perturbation((x,), {})
    centre = loss(net.model(x))
    expected = list(torch.autograd.grad(centre, list(net.model.parameters()), retain_graph=True))

    named = dict(net.model.named_parameters())
    held = {n: w.detach().requires_grad_() for n, w in named.items()}
    parts = []
    for i in range(len(x)) if delta.ndim == 2 else [None]:
        rows = x if i is None else x[i : i + 1]
        with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            out = functional_call(net.model, held, (rows,))
        dummy = torch.zeros_like(out, requires_grad=True)  # what the way back is linear in
        names = [p.name for p in net._places]
        back = torch.autograd.grad(out, [held[n] for n in names], dummy, create_graph=True)
        moves = net.moved(delta if i is None else delta[i])
        shift = [moves[n] - named[n].detach() for n in names]
        (forward,) = torch.autograd.grad(back, dummy, shift, create_graph=True)
        parts.append(out.detach() + forward)
    value = loss(torch.cat(parts))
    expected += torch.autograd.grad(value, list(net.response_parameters()))
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= 1e-6 * float(b.norm()) + 1e-12


def test_what_is_not_known_is_named_and_left_plain() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = nn.Sequential(st.nn.Dropout(0.2), nn.Linear(4, 3), Own())
    net = st.hypernet.convert(model)
    assert net.report.plain == {"2.scale": "Own is not supported"}
    assert net.report.responding == ("1.weight", "1.bias")
    assert "plain: 2.scale (Own is not supported)" in str(net.report)
    assert net.train()(torch.randn(5, 4)).shape == (5, 3)

    model[2].scale = model[1].bias
    with pytest.raises(ValueError, match=r"2\.scale is shared between layers"):
        st.hypernet.convert(model)


def test_frozen_parameters_do_not_respond() -> None:
    model = mlp()
    model[1].requires_grad_(False)
    assert "1.weight" not in st.hypernet.convert(model).report.responding


@pytest.mark.slow
def test_penalties_are_hyperparameters_of_the_loss() -> None:
    """Truth: ridge regression, whose response to log λ is known in closed form."""
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64)
    y = x @ torch.randn(5, 1, dtype=torch.float64) + torch.randn(40, 1, dtype=torch.float64)
    model = nn.Linear(5, 1, bias=False).double()
    net = st.hypernet.convert(model, {"l2": 0.3}, scale=0.1).train()
    weights = torch.optim.SGD(model.parameters(), lr=0.1)
    response = torch.optim.Adam(net.response_parameters(), lr=0.003)
    for _ in range(1500):
        net.zero_grad()
        # Joint training as in STN: penalty and prediction at the perturbed weights.
        delta, net._present = net.perturbation((x,), {})
        delta = delta[0]
        moved = net.moved(delta)["weight"]
        out = functional_call(model, {"weight": moved}, (x,))
        value = (out - y).square().mean() / 2 + net.value("l2") * moved.square().sum() / 2
        value.backward()
        weights.step()
        response.step()
    hessian = x.T @ x / 40 + 0.3 * torch.eye(5, dtype=torch.float64)
    w = torch.linalg.solve(hessian, x.T @ y / 40)
    truth = -torch.linalg.solve(hessian, 0.3 * w)  # dw/d log λ
    place = net._places[0]
    found = net.along(place, torch.ones(1, dtype=torch.float64)).T
    assert float((found.detach() - truth).norm() / truth.norm()) < 0.05


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: st.hypernet.convert(nn.Linear(2, 2)), "holds no hyperparameter"),
        (lambda: st.hypernet.convert(mlp(), {"dropout": 0.99}), "must be 0 or between"),
        (lambda: st.hypernet.convert(mlp(), perturb="layer"), "perturb='layer' must be 'auto'"),
        (lambda: st.hypernet.convert(mlp(), scale=0), "scale=0 must be above 0"),
        (lambda: st.hypernet.convert(Tied(), perturb="example"), "perturb='example' is not"),
        (lambda: st.hypernet.convert(st.hypernet.convert(mlp())), "already converted"),
        (lambda: st.hypernet.convert(st.nn.Dropout(0.1)), "no layer of model can respond"),
        (lambda: st.hypernet.convert(mlp()).value("dopout"), "name='dopout' is unknown"),
        (lambda: st.hypernet.delta_backward(st.hypernet.convert(mlp()).eval(), torch.sum,
                                            images(8, 5)), "in evaluation mode"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_hyperparameters_without_a_path_into_the_loss_are_named() -> None:
    net = st.hypernet.convert(mlp(), {"l2": 0.1})
    net(images(8, 5))
    with pytest.raises(ValueError, match=r"\['l2'\] do not enter the loss"), net.tuning():
        pass
    net.value("l2")
    with net.tuning():
        assert net(images(8, 5)).shape == (8, 3)


def test_the_spread_is_learned_with_the_entropy() -> None:
    model, x, _, loss = case("MLP")
    net = stirred(st.hypernet.convert(model))
    with net.tuning():
        loss(net(x)).backward()
    curved = net.spread.grad.clone()
    assert bool((curved != 0).all())
    net.spread.grad = None
    net.entropy().backward()
    torch.testing.assert_close(net.spread.grad, torch.ones_like(net.spread))


@pytest.mark.slow
def test_a_residual_net_of_torchvision() -> None:
    """ResNet-18, whose code knows nothing of hyperparameters: they are put in front of it."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(st.nn.Noise(0.1), models.resnet18(num_classes=3), st.nn.Dropout(0.1))
    x, y = images(4, 3, 32, 32), classes(4)
    before = copy.deepcopy(model).eval()(x)
    net = st.hypernet.convert(model)
    assert len(net.report.responding) == 62
    assert net.report.per_example
    assert not net.report.plain
    assert torch.equal(net.eval()(x), before)
    net.train()
    for mode in ("stn", "delta"):
        net.zero_grad()
        if mode == "stn":
            F.cross_entropy(net(x), y).backward()
        else:
            st.hypernet.delta_backward(net, lambda out: F.cross_entropy(out, y), x)
        assert all(bool(torch.isfinite(p.grad).all()) for p in net.weights())
    assert torch.equal(net.revert().eval()(x), net.eval()(x))
