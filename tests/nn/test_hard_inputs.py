"""Masked logits, half precision, checkpoints and parametrizations. Truths: torch itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import selftune as st


def test_smoothing_of_masked_logits() -> None:
    """Truth: torch's cross-entropy, of which positions with −inf everywhere are no part."""

    def slopes(loss: Any) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 4)
        x, y = torch.randn(2, 5, 3), torch.randint(4, (2, 5))
        y[:, 3:] = -100
        logits = layer(x).masked_fill((y == -100).unsqueeze(-1), -torch.inf).transpose(1, 2)
        value = loss(logits, y)
        value.backward()
        assert layer.weight.grad is not None
        return value.detach(), layer.weight.grad

    torch.testing.assert_close(
        slopes(st.nn.LabelSmoothing(0.1)),
        slopes(lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1)),
    )


def test_smoothing_of_many_half_precision_logits() -> None:
    """More targets than float16 can count. Truth: torch in float32."""
    logits, target = torch.zeros(70_000, 2, dtype=torch.float16), torch.zeros(70_000).long()
    loss = st.nn.LabelSmoothing(0.1)(logits, target)
    expected = F.cross_entropy(logits.float(), target, label_smoothing=0.1)
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("layer", [st.nn.ActivationPenalty(1.0), st.nn.TemporalPenalty(1.0)])
def test_penalties_in_activation_checkpoints(layer: nn.Module) -> None:
    """Truth: the pass without a checkpoint."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), layer), torch.randn(2, 4, requires_grad=True)
    grads = []
    for checked in (False, True):
        net.zero_grad()
        output = checkpoint(net, x, use_reentrant=False) if checked else net(x)
        (output.mean() + st.nn.extra_loss(net)).backward()
        grads.append(net[0].weight.grad.clone())
        assert st.nn.extra_loss(net) == 0  # the second pass left nothing behind
    torch.testing.assert_close(*grads)
    output = checkpoint(net, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        (output.mean() + st.nn.extra_loss(net)).backward()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_dropped_weights_that_are_parametrized() -> None:
    """weight_norm divides by the length of a direction, which a mask can make 0."""
    for module in (weight_norm(nn.Linear(4, 8)), nn.utils.weight_norm(nn.Linear(4, 8))):
        with pytest.raises(ValueError, match="weight_norm does: name other matrices"):
            st.nn.DropConnect(module, 0.5)
    layer = st.nn.DropConnect(spectral_norm(nn.Linear(4, 8)), 0.5)
    assert all(bool(layer(torch.ones(2, 4)).isfinite().all()) for _ in range(20))


def test_hyperparameters_of_a_half_precision_model_move() -> None:
    """Steps of an optimizer would round away in bfloat16. Truth: the model in float32."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        net = st.hypernet.convert(nn.Sequential(st.nn.Dropout(0.2), nn.Linear(8, 3)).to(dtype))
        tuner = torch.optim.Adam(net.hyper_parameters(), lr=3e-3)
        weights = torch.optim.Adam(net.weights(), lr=1e-2)
        x = torch.randn(32, 8).to(dtype)
        y, before = x[:, :3].argmax(1), net.hparams()["dropout"]
        for _ in range(20):
            F.cross_entropy(net(x), y).backward()
            weights.step()
            net.zero_grad()
            with net.tuning():
                (F.cross_entropy(net(x), y) - 1e-3 * net.entropy()).backward()
            tuner.step()
            net.zero_grad()
        assert all(p.dtype == dtype for p in net.revert().parameters())
        moved[dtype] = net.hparams()["dropout"] - before
    assert abs(moved[torch.bfloat16]) > 1e-4
