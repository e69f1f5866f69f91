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


@pytest.mark.parametrize("classes_first", [False, True])
def test_mixed_classes_are_in_dimension_one(classes_first: bool) -> None:
    """Truth: torch's cross-entropy of classes, which at strength 0 are mixed with nothing."""
    shape = (6, 4, 5) if classes_first else (6, 4)
    logits, target = torch.randn(6, 4, *shape[2:]), torch.randint(4, (6, *shape[2:]))
    _, mixed = st.nn.Mixup(4, 0.0)(torch.randn(6, 3), target)
    assert mixed.shape == logits.shape
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(F.cross_entropy(logits, mixed), expected)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
def test_classes_of_any_whole_type_are_mixed(kind: torch.dtype) -> None:
    _, mixed = st.nn.Mixup(4, 0.5)(torch.randn(6, 3), torch.randint(4, (6,)).to(kind))
    torch.testing.assert_close(mixed.sum(1), torch.ones(6))


@pytest.mark.parametrize("kinds", [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_inputs_and_targets_of_two_types_are_mixed(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    x, y = torch.randn(6, 3, dtype=kinds[0]), torch.randn(6, 2).to(kinds[1])
    mixed = st.nn.Mixup(0, 0.5)(x, y)
    assert [t.dtype for t in mixed] == [*kinds]


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [st.nn.Scale, st.nn.Translate])
def test_images_in_half_precision(layer: Any, kind: torch.dtype, size: int) -> None:
    """Truths: the image at strength 0, and the layer in single precision."""
    images = torch.rand(2, 3, size, size).to(kind)
    torch.testing.assert_close(layer(0.0)(images), images, rtol=1e-2, atol=1e-3)
    half, whole = layer(0.1), layer(0.1)
    whole.key.copy_(half.key)
    found, expected = half(images), whole(images.float())
    assert found.dtype == kind
    assert float((found.float() - expected).abs().mean()) < 0.005


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "strength"), [(100.0, 1e-2), (0.1, 1e-6), (300.0, 1.0)])
@pytest.mark.parametrize("layer", [st.nn.ActivationPenalty, st.nn.TemporalPenalty])
def test_penalties_in_half_precision(
    layer: Any, size: float, strength: float, kind: torch.dtype
) -> None:
    """Truth: the mean square in single precision (it overflowed, or was 0)."""
    x = torch.full((4, 6, 3), size).to(kind)
    x[:, ::2] = 0
    penalty = layer(strength)
    penalty(x)
    exact = (
        x.float().square() if layer is st.nn.ActivationPenalty else x.float().diff(dim=1).square()
    )
    assert float(st.nn.extra_loss(penalty)) == pytest.approx(strength * float(exact.mean()))


def test_penalties_of_complex_activations_are_real() -> None:
    x = torch.full((3,), 1 + 1j, requires_grad=True)
    penalty = st.nn.ActivationPenalty(1.0)
    penalty(x)
    loss = st.nn.extra_loss(penalty)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2)
    torch.testing.assert_close(x.grad, 2 * x.detach() / 3)


@pytest.mark.parametrize("layer", [st.nn.Dropout(0.5), st.nn.Noise(0.1)])
def test_numbers_keep_their_shape(layer: nn.Module) -> None:
    assert layer(torch.tensor(2.0)).shape == ()
