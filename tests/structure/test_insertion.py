"""What with_gates keeps. Truth: the model before it got gates."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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
