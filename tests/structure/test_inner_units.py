"""Heads, feed-forward and recurrent units. Truths: layers of torch, the gated model, counts."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selftune.structure import Gate, Goal, Optional, Recurrent, gated, prune, with_gates
from selftune.structure._saliency import saliency


class SelfAttention(nn.Module):
    """Attention of one's own: projections, heads written out, scores by hand or by torch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "fused":
            self.qkv = nn.Linear(8, 24)
        else:
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.gate, self.out = Gate(4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "fused":
            first, second, third = self.qkv(x).chunk(3, dim=-1)
            parts = (first, second, third)
        else:
            parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.view(p.size(0), p.size(1), -1, 2).transpose(1, 2) for p in parts)
        if self.kind == "by hand":
            scores = (q @ k.transpose(-2, -1)) / 2**0.5
            heads = torch.softmax(scores, dim=-1) @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(self.gate(heads).permute(0, 2, 1, 3).flatten(2))


class Sequence(nn.Module):
    """A recurrent layer whose last output a head reads."""

    def __init__(self, cell: nn.Module, state: bool = False) -> None:
        super().__init__()
        self.up, self.gate, self.rnn = nn.Linear(5, 6), Gate(6, dim=-1), cell
        self.head, self.state = nn.Linear(8, 2), state
        self.pair = isinstance(cell, nn.LSTM)

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.rnn(self.gate(self.up(x)))
        if self.state:
            return self.head((state[0] if self.pair else state)[-1])
        return self.head(output[:, -1])


def lstm(**options: object) -> nn.LSTM:
    return nn.LSTM(6, 8, batch_first=True, **options)  # type: ignore[arg-type]


def gru(**options: object) -> nn.GRU:
    return nn.GRU(6, 8, batch_first=True, **options)  # type: ignore[arg-type]


def layer(**options: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 4, 12, batch_first=True, **options)  # type: ignore[arg-type]


TOKENS, FEATURES = (lambda: torch.randn(3, 6, 8)), (lambda: torch.randn(3, 6, 5))
PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "encoder layer": (layer, TOKENS),
    "norm first, GELU": (lambda: layer(norm_first=True, activation="gelu"), TOKENS),
    "no biases": (lambda: layer(bias=False), TOKENS),
    "length first": (lambda: nn.TransformerEncoderLayer(8, 2, 12), TOKENS),
    "encoder": (lambda: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False), TOKENS),
    "lstm": (lambda: Sequence(lstm()), FEATURES),
    "gru": (lambda: Sequence(gru(bias=False)), FEATURES),
    "lstm state": (lambda: Sequence(lstm(), state=True), FEATURES),
    "gru state": (lambda: Sequence(gru(), state=True), FEATURES),
    "two layers": (lambda: Sequence(lstm(num_layers=2)), FEATURES),
}
MODELS = {
    **{n: ((lambda m=m: with_gates(m())), x) for n, (m, x) in PLAIN.items()},  # type: ignore[misc]
    "projections": (lambda: SelfAttention("torch"), TOKENS),
    "by hand": (lambda: SelfAttention("by hand"), TOKENS),
    "fused": (lambda: SelfAttention("fused"), TOKENS),
}


def half_closed(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for _, module in gated(model):
            module.gates.normal_(1, 0.7)
            module.gates[torch.randperm(len(module.gates))[: len(module.gates) // 2]] = 0.0
    return model


def size(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if not n.endswith("gates"))


@pytest.mark.parametrize("name", PLAIN)
def test_open_gates_change_nothing(name: str) -> None:
    """Truth: torch's own layer, before it got gates."""
    torch.manual_seed(0)
    make, inputs = PLAIN[name]
    model, x = make().eval(), inputs()
    with torch.enable_grad():  # without torch's fused path
        before = model(x).detach()
    torch.testing.assert_close(with_gates(model)(x).detach(), before, rtol=1e-5, atol=1e-5)


# torch says so of any nn.LSTM and nn.GRU.
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_gated_model(name: str) -> None:
    """Truth: the gated model on other inputs, and a graph exported by torch."""
    make, inputs = MODELS[name]
    model = half_closed(make)
    pruned, x = prune(model, inputs()), inputs()
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
    assert size(pruned) < 0.75 * size(model)
    assert not any(type(m).__module__.startswith("selftune") for m in pruned.modules())
    exported = torch.export.export(pruned, (x,))
    torch.testing.assert_close(exported.module()(x), pruned(x))
    pruned.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())
    torch.save(pruned.state_dict(), buffer := io.BytesIO())
    assert buffer.tell() > 0


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_pruned_model(name: str) -> None:
    """Truth: parameters of the pruned model, counted."""
    make, inputs = MODELS[name]
    model, x = half_closed(make), inputs()
    with torch.no_grad():
        for _, module in gated(model):
            module.gates.fill_(1.0)
    goal = Goal(model, x, 0.7)
    assert goal.size()["parameters"] == size(model)
    goal.close(lambda: model(x).square().mean(), 1.0)
    assert goal.size()["parameters"] == size(prune(model, x)) <= 0.7 * size(model)


def test_sizes_by_hand() -> None:
    """Count: 4 heads of 2 to 1, 12 units to 3; 8 recurrent units to 2."""
    model = with_gates(layer())
    with torch.no_grad():
        model.attention.gate.gates[1:] = 0.0
        model.gate.gates[3:] = 0.0
    pruned = prune(model.eval(), torch.randn(3, 6, 8))
    attention = pruned.attention
    assert tuple(attention.query.weight.shape) == tuple(attention.value.weight.shape) == (2, 8)
    assert tuple(attention.out.weight.shape) == (8, 2)
    assert tuple(pruned.linear1.weight.shape) == (3, 8)
    sequence = with_gates(Sequence(lstm()))
    with torch.no_grad():
        sequence.rnn.gates[2:] = 0.0
    cell = prune(sequence, torch.randn(3, 6, 5)).rnn
    assert type(cell) is nn.LSTM
    assert (cell.hidden_size, cell.input_size) == (2, 6)
    assert tuple(cell.weight_ih_l0.shape) == (8, 6)
    assert tuple(cell.weight_hh_l0.shape) == (8, 2)


def test_gated_recurrence_by_hand() -> None:
    """Truth: the equations of the GRU, step by step, with a gate on the state."""
    torch.manual_seed(0)
    model = Recurrent(nn.GRU(3, 4, batch_first=True))
    with torch.no_grad():
        model.gates.normal_()
    x, h, g = torch.randn(2, 5, 3), torch.zeros(2, 4), model.gates.flatten()
    cell, outputs = model.cell, []
    for t in range(5):
        a = F.linear(x[:, t], cell.weight_ih_l0, cell.bias_ih_l0).chunk(3, 1)
        b = F.linear(g * h, cell.weight_hh_l0, cell.bias_hh_l0).chunk(3, 1)
        r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
        h = (1 - z) * torch.tanh(a[2] + r * b[2]) + z * h
        outputs.append(g * h)
    torch.testing.assert_close(model(x)[0], torch.stack(outputs, 1))
    torch.testing.assert_close(model(x)[1][0], outputs[-1])


def test_saliency_of_recurrent_units() -> None:
    """Truth: ½ N (g ∂L/∂g)² with the gradient by finite differences."""
    torch.manual_seed(0)
    model, x = with_gates(Sequence(lstm())).double(), torch.randn(3, 6, 5).double()

    def loss() -> Tensor:
        return model(x).square().mean()

    found = saliency(model, loss)["rnn"]
    slopes = []
    with torch.no_grad():
        for unit in range(8):
            values = []
            for change in (1e-5, -1e-5):
                model.rnn.gates[unit] += change
                values.append(float(loss()))
                model.rnn.gates[unit] -= change
            slopes.append((values[0] - values[1]) / 2e-5)
    torch.testing.assert_close(found, 1.5 * torch.tensor(slopes).double() ** 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["gru", "lstm", "encoder layer", "gate", "block"])
def test_saliencies_do_not_depend_on_the_order_of_dimensions(kind: str) -> None:
    """Truth: the same weights and data with the batch first."""
    found, x = [], torch.randn(10, 6, 4)
    for first in (True, False):
        torch.manual_seed(0)
        batch = 0 if first else 1
        make: dict[str, Callable[[], nn.Module]] = {
            "gru": lambda b=first: nn.GRU(4, 5, batch_first=b),
            "lstm": lambda b=first: nn.LSTM(4, 5, num_layers=2, batch_first=b),
            "encoder layer": lambda b=first: nn.TransformerEncoderLayer(
                4, 2, 6, dropout=0.0, batch_first=b
            ),
            "gate": lambda b=batch: nn.Sequential(
                nn.Linear(4, 5), nn.Tanh(), Gate(5, dim=-1, batch_dim=b), nn.Linear(5, 2)
            ),
            "block": lambda b=batch: Optional(nn.Linear(4, 4), batch_dim=b),
        }
        model = with_gates(make[kind]())
        given = x if first else x.transpose(0, 1)

        def loss(m: nn.Module = model, i: Tensor = given) -> Tensor:
            output = m(i)
            return (output[0] if isinstance(output, tuple) else output)[..., 0].square().mean()

        found.append(saliency(model, loss))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-7)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two directions": (lambda: lstm(bidirectional=True), r"nn\.LSTM\(bidirectional=True\)"),
    "projection": (lambda: lstm(proj_size=3), r"nn\.LSTM\(proj_size=3\)"),
    "bias of keys": (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv=True"),
    "zeros": (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn=True"),
    "dropout": (lambda: nn.MultiheadAttention(8, 2, dropout=0.1), r"dropout=0\.1"),
    "decoder": (lambda: nn.TransformerDecoderLayer(8, 2), "TransformerDecoderLayer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_gated_is_named(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        with_gates(make())


def test_layers_in_one_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_layers=2.* must be 1"):
        Recurrent(lstm(num_layers=2))


@pytest.mark.slow
def test_it_loads_where_the_library_is_not_installed(tmp_path: Path) -> None:
    """Truth: a Python process in which the library cannot be imported."""
    saved = []
    for name in ("encoder", "two layers"):
        make, inputs = MODELS[name]
        x = inputs()
        pruned = prune(half_closed(make), x)
        whole = pruned if name == "encoder" else pruned.rnn
        saved.append((whole, x if name == "encoder" else torch.randn(3, 6, pruned.up.out_features)))
    torch.save([(m, x, m(x)) for m, x in saved], tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['selftune'] = None\n"
        "import torch\n"
        f"for model, x, y in torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False):\n"
        "    torch.testing.assert_close(model(x), y)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
