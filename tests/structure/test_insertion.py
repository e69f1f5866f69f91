"""What with_gates keeps. Truth: the model before it got gates."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from selftune.structure import gated, with_gates

FROZEN: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "other sizes": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
    "no bias": lambda: nn.MultiheadAttention(8, 2, bias=False),
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0),
    "gru": lambda: nn.GRU(3, 4),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_weights_stay_frozen(name: str) -> None:
    """Truth: the gates are the only parameters that were not frozen; trained ones stay trained."""
    model = with_gates(FROZEN[name]().requires_grad_(False))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{n}.gates".lstrip(".") for n, _ in gated(model)
    }
    with torch.no_grad():
        model = with_gates(FROZEN[name]())
    assert all(p.requires_grad for p in model.parameters())


def test_parts_that_are_frozen_stay_frozen() -> None:
    """Truth: which parameters of torch's layer are frozen."""
    plain = nn.MultiheadAttention(8, 2)
    plain.out_proj.bias.requires_grad_(False)
    plain.in_proj_weight.requires_grad_(False)
    model = with_gates(plain)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"query.weight", "key.weight", "value.weight", "out.bias"}


class Shared(nn.Module):
    """One layer of two parents, and under two names of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.GRU(3, 3)
        self.second, self.block = self.first, nn.Sequential(nn.Identity(), self.first)
        self.register_module("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.block[1](self.second(self.first(x)[0])[0])[0]


def test_shared_layers_stay_one() -> None:
    """Truth: parameters and outputs of the model before."""
    model, x = Shared(), torch.randn(4, 2, 3)
    count, before = sum(p.numel() for p in model.parameters()), model(x)
    with_gates(model)
    assert model.first is model.second is model.block[1]
    assert sum(p.numel() for p in model.parameters()) == count + 3
    torch.testing.assert_close(model(x), before)


def test_dropout_of_attention_weights_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def encoder(dropout: float) -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=dropout, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    with caplog.at_level(logging.WARNING, "selftune"):
        with_gates(encoder(0.0))
        assert not caplog.records
        with_gates(encoder(0.3))
    (record,) = caplog.records
    assert "0.layers.0 (dropout=0.3), 0.layers.1 (dropout=0.3)" in record.getMessage()


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def test_a_layer_used_twice_in_an_encoder_stays_one() -> None:
    """Truth: parameters and outputs of the model before (as in ALBERT)."""
    plain = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    plain.layers = nn.ModuleList([plain.layers[0]] * 2)
    x, count = torch.randn(5, 3, 8), sum(p.numel() for p in plain.parameters())
    before = plain(x)
    model = with_gates(plain)
    assert count == sum(p.numel() for n, p in model.named_parameters() if "gates" not in n)
    torch.testing.assert_close(model(x), before)


class Doubled(nn.TransformerEncoderLayer):
    """An encoder layer with its own feed-forward block."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return 2 * super()._ff_block(x)


class Reversed(nn.LSTM):
    """An LSTM with its own forward."""

    def forward(self, input: Tensor, hx: object = None) -> tuple[Tensor, object]:
        output, state = super().forward(input, hx)
        return output.flip(1), state


class Initialised(nn.GRU):
    """A subclass that changes nothing but its initial weights."""

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            nn.init.uniform_(weight, -0.1, 0.1)


def hooked() -> nn.Module:
    layer = encoder_layer()
    layer.norm1.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "block": (lambda: Doubled(8, 2, 16, dropout=0.0), "Doubled is a subclass of nn.Transformer"),
    "forward": (lambda: Reversed(3, 4), "Reversed is a subclass of nn.LSTM"),
    "hook": (hooked, "LayerNorm has hooks"),
    "parametrization": (
        lambda: parametrizations.spectral_norm(nn.LSTM(3, 4), "weight_hh_l0"),
        "LSTM has hooks or a parametrization",
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_a_gated_layer_would_lose_is_refused(name: str) -> None:
    """Truth: an error message, and a model that still has all of its layers."""
    make, message = UNUSUAL[name]
    model = nn.Sequential(nn.GRU(3, 3), make())
    with pytest.raises(ValueError, match=f"1: .*{message}"):
        with_gates(model)
    assert isinstance(model[0], nn.GRU)


def test_a_subclass_with_other_initial_weights_gets_gates() -> None:
    """Truth: its outputs before."""
    plain, x = Initialised(3, 4), torch.randn(5, 2, 3)
    before = plain(x)[0]
    torch.testing.assert_close(with_gates(plain)(x)[0], before)


def test_parameters_tied_between_layers_are_refused() -> None:
    """Truth: an error message with the name (they were untied in silence)."""
    model = nn.Sequential(encoder_layer(), encoder_layer())
    model[1].linear1.weight = model[0].linear1.weight  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"1\.linear1\.weight is shared with another layer"):
        with_gates(model)
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match="is shared with another layer"):
        with_gates(nn.ModuleList([encoder, encoder.layers[0]]))
