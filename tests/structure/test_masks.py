"""Masks of gated attention. Truth: torch's own layers, before they got gates."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selftune.structure import prune, with_gates

CAUSAL = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
FLOATS = torch.zeros(5, 5).masked_fill(CAUSAL, -torch.inf)
BIAS = -torch.arange(25.0).view(5, 5) / 10
PADDED = torch.tensor([[False, False, False, True, True], [False] * 5])

MASKS: dict[str, dict[str, Any]] = {
    "bool": {"mask": CAUSAL},
    "floats": {"mask": FLOATS},
    "biases": {"mask": BIAS},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "causal floats": {"mask": FLOATS, "is_causal": True},
    "padding": {"padding": PADDED},
    "padding in floats": {"padding": PADDED * -2.0},
    "both": {"mask": CAUSAL, "padding": PADDED},
    "both in floats": {"mask": BIAS, "padding": PADDED * -2.0, "is_causal": False},
}
NAMES = {
    "attention": ("attn_mask", "key_padding_mask"),
    "layer": ("src_mask", "src_key_padding_mask"),
    "encoder": ("mask", "src_key_padding_mask"),
}


def plain(kind: str, batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    if kind == "attention":
        return nn.MultiheadAttention(8, 2, batch_first=batch_first)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
    return layer if kind == "layer" else nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def output(model: nn.Module, kind: str, x: Tensor, given: dict[str, Any]) -> Tensor:
    mask, padding = NAMES[kind]
    renamed = {{"mask": mask, "padding": padding}.get(n, n): v for n, v in given.items()}
    if kind == "attention":
        return model(x, x, x, need_weights=False, **renamed)[0]
    return model(x, **renamed)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", NAMES)
def test_masks_mean_what_they_mean_in_torch(kind: str, name: str, batch_first: bool) -> None:
    """Truth: outputs of the layer of torch."""
    model, x = plain(kind, batch_first), torch.randn(2, 5, 8)
    x = x if batch_first else x.transpose(0, 1)
    before = output(model, kind, x, MASKS[name]).detach()
    assert not torch.allclose(before, output(model, kind, x, {}), atol=1e-3)
    after = output(with_gates(model), kind, x, MASKS[name]).detach()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_the_fourth_argument_is_the_padding() -> None:
    """Truth: the call of torch's layers by position."""
    x = torch.randn(2, 5, 8)
    for kind, given in (("attention", (x, x, PADDED, False)), ("layer", (None, PADDED))):
        model = plain(kind, True)
        before, after = model(x, *given), with_gates(copy.deepcopy(model))(x, *given)
        pick: Callable[[Any], Tensor] = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
        torch.testing.assert_close(pick(after), pick(before), rtol=1e-5, atol=1e-5)


class Masked(nn.Module):
    """An encoder whose mask is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = with_gates(plain("encoder", True))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(x, mask=mask)


@pytest.mark.parametrize("name", ["bool", "floats", "none"])
def test_pruned_models_take_masks(name: str) -> None:
    """Truth: the gated model; other masks than those of the example are refused."""
    model, x = Masked().eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        model.encoder.layers[0].attention.gate.gates[0] = 0.0
        model.encoder.layers[0].gate.gates[3:] = 0.0
    mask = MASKS[name]["mask"] if name in MASKS else None
    pruned = prune(model, (x, mask))
    torch.save(pruned.encoder, buffer := io.BytesIO())
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for small in (pruned.encoder, loaded):
        torch.testing.assert_close(small(x, mask=mask), model(x, mask), rtol=1e-5, atol=1e-5)
        with pytest.raises((AssertionError, RuntimeError)):
            small(x, mask=FLOATS if name == "bool" else CAUSAL)
    weight = pruned.encoder.get_parameter("layers.0.linear1.weight")
    assert tuple(weight.shape) == (3, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"need_weights": True}, "need_weights=True"),
        ({"attn_mask": CAUSAL.expand(4, 5, 5)}, r"attn_mask of shape \(4, 5, 5\)"),
        ({"attn_mask": CAUSAL.int()}, r"attn_mask of type torch\.int32"),
        ({"key_padding_mask": PADDED, "is_causal": True}, "needs attn_mask"),
    ],
)
def test_what_gated_attention_cannot_do_is_named(given: dict[str, Any], message: str) -> None:
    x = torch.randn(2, 5, 8)
    model = with_gates(plain("attention", True))
    with pytest.raises(ValueError, match=message):
        model(x, x, x, **given)
    with pytest.raises(ValueError, match=r"query of shape \(5, 8\)"):
        model(x[0], x[0], x[0])
