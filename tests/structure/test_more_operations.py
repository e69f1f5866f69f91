"""Operations through which units are followed, sizes of layers, and refused uses.

Truths: the gated model itself, counts by hand, torch's own layers, an error message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from selftune.structure import Gate, Goal, Optional, Recurrent, prune, with_gates

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Around(nn.Module):
    """An operation between a gate and a convolution, on units and their squeezed means."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 16, 3, padding=1), Gate(16)
        self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 16)
        self.inner, self.out = operation, nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(F.relu(self.conv(x)))
        weights = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3))))))
        return self.out(self.inner(y, weights))


FOLLOWED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "None as an index": lambda y, w: y * w[:, :, None, None],
    "None behind an ellipsis": lambda y, w: y * w[..., None, None],
    "unsqueeze": lambda y, w: y * w.unsqueeze(-1).unsqueeze(-1),
    "unsqueeze in front": lambda y, w: y.unsqueeze(1).squeeze(1),
    "squeeze": lambda y, w: y.mean((2, 3), keepdim=True).squeeze(-1).unsqueeze(3),
    "expand_as": lambda y, w: y * w.view(y.size(0), y.size(1), 1, 1).expand_as(y),
    "interpolate": lambda y, w: F.interpolate(y, scale_factor=2.0),
    "padding with 0": lambda y, w: F.pad(y, (1, 1, 0, 2)),
    "reflection": lambda y, w: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "minus": lambda y, w: -y,
    "another type": lambda y, w: y.to(torch.float32),
}
KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "padding with 1": lambda y, w: F.pad(y, (1, 1, 1, 1), value=1.0),
    "squeeze of every axis": lambda y, w: y.mean((2, 3), keepdim=True).squeeze()[..., None, None],
    "one unit": lambda y, w: y[:, 3:4].expand_as(y),
}


def half_closed(model: nn.Module, *gates: Gate) -> nn.Module:
    for gate in gates:
        with torch.no_grad():
            gate.gates.uniform_(0.5, 1.5)
            gate.gates[::2] = 0.0
    return model.eval()


@pytest.mark.parametrize("name", [*FOLLOWED, *KEPT])
def test_closed_units_go_through(name: str) -> None:
    torch.manual_seed(0)
    model = Around((FOLLOWED | KEPT)[name])
    half_closed(model, model.gate)
    small: Any = prune(model, X[:1])
    torch.testing.assert_close(small(X), model(X), rtol=1e-5, atol=1e-5)
    assert small.conv.out_channels == (8 if name in FOLLOWED else 16)


class Net(nn.Module):
    """A U-Net, whose skip connection is padded and upsampled in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(3, 8, 3, padding=1), Gate(8)
        self.down, self.two = nn.Conv2d(8, 12, 3, stride=2, padding=1), Gate(12)
        self.up, self.three = nn.ConvTranspose2d(12, 6, 2, stride=2), Gate(6)
        self.wide, self.pad = nn.Upsample(scale_factor=2), nn.ZeroPad2d(1)
        self.out = nn.Conv2d(8 + 6 + 12, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.one(self.first(x).relu())
        deep = self.two(self.down(skip).relu())
        return self.out(self.pad(torch.cat([skip, self.three(self.up(deep)), self.wide(deep)], 1)))


def test_a_u_net_with_a_transposed_convolution_becomes_smaller() -> None:
    torch.manual_seed(0)
    net = Net()
    half_closed(net, net.one, net.two, net.three)
    small: Any = prune(net, X[:1])
    torch.testing.assert_close(small(X), net(X), rtol=1e-5, atol=1e-5)
    assert small.up.weight.shape == (6, 3, 2, 2)
    assert small.out.weight.shape[1] == 4 + 3 + 6
    goal = Goal(net, X[:1], budget=0.5, of="multiply_adds", total_steps=10)
    now = 64 * 3 * 4 * 9 + 16 * 4 * 6 * 9 + 16 * 6 * 3 * 4 + 64 * 13 * 2 * 9
    assert goal.size()["multiply_adds"] == now


class Words(nn.Module):
    """A language model with a tied output layer, an ungated LSTM and ungated attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.rnn = nn.LSTM(8, 6, bidirectional=True, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.hidden, self.gate = nn.Linear(12, 8), Gate(8, dim=-1)
        self.last, self.out = nn.Linear(8, 8), nn.Linear(8, 50, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        states = self.rnn(self.words(x))[0]
        seen = self.attention(states, states, states)[0]
        return self.out(self.last(self.gate(self.hidden(seen))))


def test_multiply_adds_of_tied_recurrent_and_attention_layers_by_hand() -> None:
    goal = Goal(Words(), torch.randint(50, (1, 5)), budget=0.99, of="multiply_adds")
    rnn = 2 * 4 * 6 * (8 + 6) + 2 * 4 * 6 * (12 + 6)
    attention = 3 * 12 * 12 + 12 * 12
    assert goal.size()["multiply_adds"] == 5 * (rnn + attention + 12 * 8 + 8 * 8 + 8 * 50)


class Cells(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.up, self.gate, self.cell = nn.Linear(4, 6), Gate(6), kind(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for _ in range(3):
            state = self.cell(x, state)
        return self.gate(self.up(x)) @ (state[0] if isinstance(self.cell, nn.LSTMCell) else state).T


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_multiply_adds_of_cells(kind: Any) -> None:
    """Truth: torch's counter, without the product at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(Cells(kind), nn.Linear(1, 4), Gate(4), nn.Linear(4, 1))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 4))
    counted = Goal(model, torch.randn(1, 4), budget=0.99).size()["multiply_adds"]
    assert counted == counter.get_total_flops() / 2 - 6


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_multiply_adds_of_encoders_and_decoders_by_hand(padded: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = Optional(nn.TransformerEncoder(layer, 2), residual=False)
            self.decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.decoder(x[:, :3], self.encoder(x, src_key_padding_mask=mask))

    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    fused = torch.backends.mha.get_fastpath_enabled()
    goal = Goal(Both(), (torch.randn(2, 5, 8), mask if padded else None), budget=0.9)
    encoder = 2 * 5 * (4 * 8 * 8 + 2 * 8 * 16)
    decoder = 3 * (6 * 8 * 8 + 2 * 8 * 16) + 5 * 2 * 8 * 8
    assert goal.size()["multiply_adds"] == encoder + decoder
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_a_gate_on_values_of_several_ranks() -> None:
    class Ranks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.dense, self.gate = nn.Conv2d(3, 8, 1), nn.Linear(3, 8), Gate(8, dim=1)
            self.out, self.last = nn.Conv2d(8, 2, 1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            images = self.out(self.gate(self.conv(x).tanh())).mean((2, 3))
            return images + self.last(self.gate(self.dense(x.mean((2, 3))).tanh()))

    torch.manual_seed(0)
    model = Ranks()
    half_closed(model, model.gate)
    small: Any = prune(model, X[:1])
    torch.testing.assert_close(small(X), model(X), rtol=1e-5, atol=1e-5)
    assert small.conv.out_channels == 4


def test_heads_stay_where_a_mask_has_an_entry_for_each() -> None:
    """Before, a goal closed heads that could not be removed at the end of the run."""

    class Biased(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.qkv, self.gate, self.out = nn.Linear(8, 24), Gate(4, dim=1), nn.Linear(8, 2)
            self.bias = nn.Parameter(torch.randn(heads, 5, 5))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            heads = [part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in (q, k, v)]
            seen = F.scaled_dot_product_attention(*heads, attn_mask=self.bias)
            return self.out(self.gate(seen).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    for heads, kept in ((4, 24), (1, 12)):
        model = Biased(heads)
        half_closed(model, model.gate)
        small: Any = prune(model, x[:1])
        torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
        assert small.qkv.out_features == kept


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_gated_cell_refuses_another_number_of_features(kind: Any) -> None:
    """torch.lstm itself reads beyond the weights then."""
    with pytest.raises(ValueError, match="has 5 features, and the cell input_size=2"):
        Recurrent(kind(2, 3))(torch.randn(4, 1, 5))


def test_gates_are_added_once() -> None:
    model = nn.ModuleDict({"one": nn.LSTM(2, 3), "two": nn.GRU(2, 3, num_layers=2)})
    once = [id(m) for m in with_gates(model).modules()]
    assert [id(m) for m in with_gates(model).modules()] == once


def test_gates_keep_the_type_that_autocast_chose() -> None:
    net = nn.Sequential(nn.Linear(3, 4), Gate(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.ones(2, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
def test_weights_that_hooks_compute_are_named(kind: str) -> None:
    layer: Any = nn.Linear(8, 3)
    if kind == "prune":
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    else:
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(layer)
    net = nn.Sequential(nn.Linear(5, 8), Gate(8), layer)
    net[1].gates.data[0] = 0.0
    with pytest.raises(ValueError, match=r"weights of 2 are set by hooks.*parametrizations"):
        prune(net, torch.zeros(1, 5))


def test_units_beside_a_layer_with_a_hook_stay() -> None:
    """Truth: the gated model; the hook would compute a weight of the size before."""
    torch.manual_seed(0)
    last = torch.nn.utils.spectral_norm(nn.Linear(6, 2))
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Gate(8), nn.Linear(8, 6), Gate(6), last)
    half_closed(net, net[2], net[4])
    x = torch.randn(3, 5)
    small: Any = prune(net, x[:1])
    torch.testing.assert_close(small(x), net(x))
    assert (small[0].out_features, small[3].out_features) == (4, 6)


@pytest.mark.parametrize("pad", [(1, -1), (1, -1, 0, 0)])
def test_padding_along_the_units_keeps_them(pad: tuple[int, ...]) -> None:
    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = nn.Linear(3, 8), Gate(8, dim=-1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.pad(self.gate(self.first(x)), pad))

    torch.manual_seed(0)
    model = Shifts()
    half_closed(model, model.gate)
    x = torch.randn(2, 5, 3)
    small: Any = prune(model, x[:1])
    torch.testing.assert_close(small(x), model(x))
    assert small.first.out_features == 8


def test_multiply_adds_of_attention_with_a_mask() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
            self.first, self.gate, self.last = nn.Linear(8, 8), Gate(8, dim=-1), nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.last(self.gate(self.first(x)))
            return self.inner(x, x, x, key_padding_mask=mask, need_weights=False)[0]

    example = (torch.randn(1, 5, 8), torch.zeros(1, 5, dtype=torch.bool))
    goal = Goal(Masked(), example, budget=0.99, of="multiply_adds")
    assert goal.size()["multiply_adds"] == 5 * 6 * 8 * 8


def test_gates_of_integers_are_not_rounded() -> None:
    gate = Gate(2)
    gate.gates.data = torch.tensor([[0.5], [1.5]]).view_as(gate.gates)
    assert gate(torch.tensor([[2, 2]])).tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize(
    ("closure", "match"),
    [
        (lambda net: 3.0, "closure returned float"),
        (lambda net: net(torch.ones(4, 5)), r"closure returned \(4, 2\)"),
        (lambda net: net(torch.ones(4, 5)).sum().detach(), "has no gradient"),
    ],
)
def test_closures_without_a_loss_are_named(closure: Callable[[nn.Module], Any], match: str) -> None:
    net = nn.Sequential(nn.Linear(5, 8), Gate(8), nn.Linear(8, 2))
    goal = Goal(net, torch.zeros(1, 5), budget=0.5, total_steps=1, closings=1, end=1.0)
    with pytest.raises(ValueError, match=match):
        goal.step(lambda: closure(net))


def test_frozen_gates_are_named() -> None:
    net = nn.Sequential(nn.Linear(5, 8), Gate(8), nn.Linear(8, 2))
    net[1].gates.requires_grad_(False)
    goal = Goal(net, torch.zeros(1, 5), budget=0.5, total_steps=1, closings=1, end=1.0)
    with pytest.raises(ValueError, match="with gates that require a gradient"):
        goal.step(lambda: net(torch.ones(4, 5)).sum())


def test_weights_of_nan_are_named() -> None:
    net = nn.Sequential(nn.Linear(5, 8), Gate(8), nn.Linear(8, 2))
    net[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        prune(net, torch.zeros(1, 5))
