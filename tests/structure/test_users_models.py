"""Models as users write them. Truth: the gated model, sizes by hand, torch's pickles."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from selftune.search._pruning import sizes_of
from selftune.structure import Choice, Gate, Goal, Optional, prune, with_gates


class Auxiliary(nn.Module):
    """A second head, with a gate, that only training calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.out = nn.Conv2d(3, 8, 3), Gate(8), nn.Conv2d(8, 2, 1)
        self.second = nn.Sequential(nn.Conv2d(3, 8, 1), Gate(8), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        first = self.out(self.gate(F.relu(self.conv(x))))
        return (first, self.second(x)) if self.training else first


@pytest.mark.parametrize("size", [8, 10])
def test_a_gate_that_only_training_calls_keeps_its_axis(size: int) -> None:
    net, x = Auxiliary(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        net.gate.gates[:4] = 0
        net.second[1].gates.uniform_(0.5, 1.5)
    small = prune(net, x)
    torch.testing.assert_close(small.train()(x)[1], net.train()(x)[1])


class Wrapped(nn.Module):
    """An encoder with the defaults of torch's."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, is_causal: bool | None = None) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if is_causal else None
        return self.encoder(x, mask=mask, is_causal=is_causal)


def test_an_encoder_called_with_is_causal_none() -> None:
    x = torch.randn(3, 5, 8)
    net = with_gates(Wrapped())
    goal = Goal(net, x, budget=0.5, total_steps=1, closings=1, start=0.5, end=1.0)
    goal.step(lambda: net(x).square().mean())
    small = prune(net, x)
    torch.testing.assert_close(small(x), net.eval()(x))
    assert sum(p.numel() for p in small.parameters()) == goal.size()["parameters"]
    torch.testing.assert_close(small.encoder(x, is_causal=True), net.encoder(x, is_causal=True))


class Positions(nn.Module):
    """The positions of torch's tutorial: a buffer, cut to the length of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.register_buffer("positions", torch.randn(20, 8))
        self.feed = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), Gate(32, -1), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(self.embedding(x) + self.positions[: x.size(1)])


def test_a_buffer_cut_to_the_length_of_the_input() -> None:
    net, x = Positions(), torch.randint(11, (3, 5))
    with torch.no_grad():
        net.feed[2].gates[:20] = 0
    Goal(net, x, budget=0.9)
    small = prune(net, x).eval()
    assert small.feed[0].out_features == 12
    for length in (5, 3):
        torch.testing.assert_close(small(x[:, :length]), net.eval()(x[:, :length]))


class Domains(nn.Module):
    """Two norms with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.out = nn.Conv2d(3, 8, 1), Gate(8), nn.Conv2d(8, 2, 1)
        self.one, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.other.weight, self.other.bias = self.one.weight, self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.one(self.conv(x)), self.other(self.conv(-x))
        return self.out(self.gate(F.relu(first))) + self.out(self.gate(F.relu(second)))


class Dilated(nn.Module):
    """Two depthwise convolutions with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.out = nn.Conv2d(3, 8, 1), Gate(8), nn.Conv2d(8, 2, 1)
        self.one = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.other = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.out(self.gate(self.one(x) + self.other(x)))


@pytest.mark.parametrize("make", [Domains, Dilated])
def test_units_of_shared_weights_remain(make: type[nn.Module]) -> None:
    net, x = make(), torch.randn(2, 3, 5, 5)
    with pytest.raises(ValueError, match="no unit of gate can be removed"):
        Goal(net, x, budget=0.6)
    with torch.no_grad():
        net.gate.gates[:4] = 0
    torch.testing.assert_close(prune(net.eval(), x)(x), net(x))


def test_a_pruned_model_with_weight_norm_can_be_pickled() -> None:
    net = nn.Sequential(weight_norm(nn.Linear(4, 8)), Gate(8), nn.Linear(8, 2))
    with torch.no_grad():
        net[1].gates[:5] = 0
    x, file = torch.randn(3, 4), io.BytesIO()
    torch.save(prune(net, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), net.eval()(x))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), Gate(8), nn.Linear(8, 2))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.layers(batch["x"])


def test_multiply_adds_of_one_example_of_a_dictionary() -> None:
    goal = Goal(Named(), {"x": torch.randn(16, 4)}, budget=0.9)
    assert goal.size()["multiply_adds"] == 4 * 8 + 8 * 2


def test_a_block_inside_a_removed_block_is_not_left() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), Optional(nn.Linear(4, 4)))
    net = nn.Sequential(nn.Linear(4, 4), Optional(inner))
    with torch.no_grad():
        net[1].mask.zero_()
    assert sizes_of(net, prune(net, torch.randn(1, 4))) == {"blocks": 0, "parameters": 20}


class ByNumpysNames(nn.Module):
    """Arguments by NumPy's names, which torch's functions take too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.out = nn.Linear(4, 8), Gate(8, -1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gate(self.up(x)).chunk(2, axis=-1)
        both = torch.cat([torch.tanh(a), b], axis=-1)
        return self.out(both.mean(axis=1, keepdims=True))


def test_numpys_names_of_arguments() -> None:
    net, x = ByNumpysNames(), torch.randn(3, 5, 4)
    with torch.no_grad():
        net.gate.gates[1::4] = 0
        net.gate.gates[5::4] = 0
    small = prune(net, x)
    torch.testing.assert_close(small(x), net(x))
    assert small.up.out_features == 6


class LastState(nn.Module):
    """The usual head, on the last layer's last state."""

    def __init__(self, kind: type[nn.Module], layers: int) -> None:
        super().__init__()
        self.rnn, self.out = kind(3, 4, layers, batch_first=True), nn.Linear(4, 2)
        self.pair = kind is nn.LSTM

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x)
        return self.out((state[0] if self.pair else state)[-1])


# torch says so of any nn.LSTM and nn.GRU.
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_last_state_of_several_layers(kind: type[nn.Module], layers: int) -> None:
    """It had an axis more with gates, and was broadcast in silence."""
    net, x = LastState(kind, layers), torch.randn(5, 6, 3)
    before = net(x)
    gated = with_gates(net)
    torch.testing.assert_close(gated(x), before)
    with torch.no_grad():
        for module in net.modules():
            if hasattr(module, "gates"):
                module.gates[::2] = 0
    small = prune(gated, x)
    torch.testing.assert_close(small(x), gated(x))
    assert small(x).shape == before.shape
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters()) / 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: Optional(nn.GRU(4, 4)), lambda: Choice([nn.GRU(4, 4), nn.LSTM(4, 4)]),
        lambda: nn.Sequential(nn.GRU(4, 4), Gate(4, -1)),
    ],
)  # fmt: skip
def test_layers_with_several_outputs_are_named(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"tuple: .* one tensor"):
        make()(torch.randn(2, 3, 4))


class CalledTwice(nn.Module):
    """A module after gated units, and on another input that has none."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.before, self.gate, self.shared = nn.Linear(4, 8), Gate(8, -1), module
        self.after, self.gate2, self.out = nn.Linear(8, 16), Gate(16, -1), nn.Linear(16, 2)
        self.other = nn.Linear(8, 2)
        self.pair = not isinstance(module, (nn.Linear, nn.BatchNorm1d, Gate))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = self.last(self.shared(self.gate(F.relu(self.before(x)))))
        second = self.last(self.shared(y))
        return self.out(self.gate2(F.relu(self.after(first)))) + self.other(second)

    def last(self, value: Any) -> Any:
        return value[0][:, -1] if self.pair else value


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(8, 8), ()), (lambda: nn.BatchNorm1d(8), ()), (lambda: Gate(8), ()),
        (lambda: with_gates(nn.LSTM(8, 8, batch_first=True)), (5,)),
        (lambda: with_gates(nn.GRU(8, 8, batch_first=True)), (5,)),
    ],
)  # fmt: skip
def test_a_module_that_is_also_called_on_ungated_units_keeps_its_inputs(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """Its inputs were cut for both calls, so that pruning failed at the end of the run."""
    net = CalledTwice(make())
    x, y = torch.randn(6, *shape, 4), torch.randn(6, *shape, 8)
    with torch.no_grad():
        net.gate.gates[:3] = 0
        net.gate2.gates[:5] = 0
    small = prune(net, (x, y))
    torch.testing.assert_close(small(x, y), net(x, y))
    assert small.get_submodule("after").out_features == 11
    goal = Goal(net, (x, y), budget=0.9, total_steps=10)
    assert goal.size()["parameters"] == sum(p.numel() for p in small.parameters())


class Iterated(nn.Module):
    """A depthwise convolution on an image, and then on the gated output of the same block."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.mix = nn.Conv2d(8, 8, 1)
        self.gate, self.out = Gate(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.gate(F.relu(self.mix(self.deep(x))))
        return self.out(x)


def test_a_block_that_is_applied_again_keeps_the_units_of_its_first_input() -> None:
    net, x = Iterated(), torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        net.gate.gates[:4] = 0
    torch.testing.assert_close(prune(net, x)(x), net(x))


def test_a_gate_that_closures_do_not_reach_is_left_open_by_a_goal() -> None:
    """Goal said that no unit of it can be removed, and its first closing was an error."""
    net, x = Auxiliary().eval(), torch.randn(4, 3, 6, 6)
    goal = Goal(net, x, budget=0.8, total_steps=4, start=0.0, end=0.5, closings=1)

    def closure() -> Tensor:
        loss: Tensor = net(x).square().mean()
        return loss

    for _ in range(4):
        goal.step(closure)
    closed, of = goal.open()["gate"]
    assert closed < of
    assert goal.open()["second.1"] == (8, 8)


class MixedInside(nn.Module):
    """Mixed precision within the forward pass."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(4, 8), kind(8, 6, 2, batch_first=True)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.rnn(self.first(x))[0]
        return self.out(hidden.float()[:, -1]), hidden


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_have_the_type_of_autocast(kind: type[nn.Module]) -> None:
    """Gated ones returned float32, torch's bfloat16."""
    net, x = MixedInside(kind), torch.randn(2, 5, 4)
    expected = net(x)[1].dtype
    gated = with_gates(net)
    assert gated(x)[1].dtype == expected == torch.bfloat16
    with torch.no_grad():
        for layer in net.modules():
            if hasattr(layer, "gates"):
                layer.gates[:2] = 0
    small = prune(gated, x)
    assert small(x)[1].dtype == expected
    torch.testing.assert_close(small(x)[0], gated(x)[0])
