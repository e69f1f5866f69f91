"""Pruning. Truths: outputs of the gated model, and sizes counted by hand."""

import copy
import io
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selftune.structure import Gate, Optional, gated, open_gates, prune


class Residual(nn.Module):
    """Two convolutions whose result is added to the input, with gates inside and before the sum."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, hidden, 3, padding=1), nn.BatchNorm2d(hidden)
        self.inner = Gate(hidden)
        self.second, self.last = nn.Conv2d(hidden, channels, 3, padding=1), Gate(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(F.relu(self.norm(self.first(x))))
        return F.relu(x + self.last(self.second(inner)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.gate = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), Gate(6)
        self.blocks = nn.Sequential(Residual(6, 7), Residual(6, 5))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.gate(F.relu(self.norm(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class FeedForward(nn.Module):
    """A transformer's, around which the sum stands."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.gate, self.down = nn.Linear(8, 16), Gate(16, dim=-1), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(self.gate(F.gelu(self.up(self.norm(x)))))
        return self.head(x)


class Branches(nn.Module):
    """Two branches behind one another, a depthwise convolution, and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 5, 1)
        self.gate_a, self.gate_b = Gate(4), Gate(5)
        self.depthwise = nn.Conv2d(9, 9, 3, padding=1, groups=9, bias=False)
        self.squeeze, self.excite = nn.Linear(9, 3), nn.Linear(3, 9)
        self.out = nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.gate_a(F.silu(self.a(x))), self.gate_b(F.relu(self.b(x)))], 1)
        x = self.depthwise(x)
        weight = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.out(x * weight.view(weight.size(0), -1, 1, 1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 12), nn.ReLU(), Gate(12), nn.Dropout(0.3), nn.Linear(12, 9), Gate(9),
        nn.Tanh(), nn.Linear(9, 2),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Gate(8), nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 3), nn.BatchNorm2d(10), Gate(10), nn.ReLU(), nn.Flatten(),
        nn.Linear(160, 7), nn.ReLU(), Gate(7), nn.Linear(7, 3),
    )  # fmt: skip


def optional() -> nn.Module:
    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Gate(8), nn.Linear(8, 6))

    return nn.Sequential(
        nn.Linear(4, 6), Gate(6), Optional(branch()), Optional(branch()),
        Optional(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), residual=False), nn.Linear(6, 1),
    )  # fmt: skip


IMAGE = (3, 1, 14, 14)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(3, 5)),
    "cnn": (cnn, lambda: torch.randn(IMAGE)),
    "resnet": (ResNet, lambda: torch.randn(IMAGE)),
    "feed forward": (FeedForward, lambda: torch.randint(11, (3, 7))),
    "branches": (Branches, lambda: torch.randn(3, 2, 6, 6)),
    "optional": (optional, lambda: torch.randn(3, 4)),
}


def half_closed(make: Callable[[], nn.Module], seed: int = 0, share: float = 0.5) -> nn.Module:
    """A model with random statistics and gates, of which a share is closed."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr,operator]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
                module.bias.normal_()
        for _, module in gated(model):
            module.gates.normal_(1, 0.7)
            module.gates[torch.rand(len(module.gates)) < share] = 0.0
    return model.eval()


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_gated_model(name: str, seed: int) -> None:
    """Truth: the gated model, on other inputs than the example, of another batch size."""
    make, inputs = MODELS[name]
    model = half_closed(make, seed)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    pruned = prune(model, inputs())
    x = inputs().repeat_interleave(2, 0)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
    assert size(pruned) < size(model)
    assert not any(type(m).__module__.startswith("selftune") for m in pruned.modules()
                   if type(m).__module__.startswith("selftune.structure"))  # fmt: skip
    for n, t in model.state_dict().items():
        assert torch.equal(t, before[n])


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_model_trains_as_the_gated_one_with_closed_gates(name: str) -> None:
    """Law: parameters of the smaller model are parameters, and gradients flow into all of them."""
    make, inputs = MODELS[name]
    pruned = prune(half_closed(make), inputs()).train()
    pruned(inputs()).square().sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_sizes_by_hand() -> None:
    """Count: 8 channels to 3, 10 to 2 of 16 pixels each, 7 units to 4."""
    model = half_closed(cnn, share=0.0)
    gates = [m for m in model.modules() if isinstance(m, Gate)]
    with torch.no_grad():
        for gate, count in zip(gates, (3, 2, 4), strict=True):
            gate.gates[count:] = 0.0
    model[6].bias.data.abs_()
    pruned = prune(model, torch.zeros(IMAGE))
    assert [tuple(p.shape) for p in pruned.parameters() if p.ndim > 1] == [
        (3, 1, 3, 3), (2, 3, 3, 3), (4, 32), (3, 4),
    ]  # fmt: skip
    assert (pruned[0].out_channels, pruned[1].num_features, pruned[10].in_features) == (3, 3, 32)
    assert open_gates(model) == {"3": (3, 8), "7": (2, 10), "12": (4, 7)}


def test_shared_channels_go_where_every_summand_is_closed() -> None:
    """Count: channels of the stream that are closed in stem and both blocks."""
    model = half_closed(ResNet, share=0.0)
    with torch.no_grad():
        model.gate.gates[[0, 1, 2]] = 0.0
        model.blocks[0].last.gates[[0, 1, 3]] = 0.0
        model.blocks[1].last.gates[[0, 1, 4]] = 0.0
    pruned = prune(model, torch.zeros(IMAGE))
    assert pruned.stem.out_channels == pruned.head.in_features == 4
    assert pruned.blocks[0].first.out_channels == 7
    x = torch.randn(IMAGE)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)


def test_units_that_stay_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """A gate of one summand alone removes nothing, and the log says which."""
    model = half_closed(ResNet, share=0.0)
    with torch.no_grad():
        model.gate.gates[[0, 1]] = 0.0
    with caplog.at_level(logging.INFO, "selftune"):
        pruned = prune(model, torch.zeros(IMAGE))
    assert "gate (2)" in caplog.text
    assert pruned.stem.out_channels == 6


def test_a_gate_before_a_norm_that_moves_zero_keeps_its_units() -> None:
    """Truth: the gated model; a closed channel is a constant after BatchNorm, not 0."""
    model = half_closed(lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), Gate(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)))  # fmt: skip
    pruned = prune(model, torch.zeros(IMAGE))
    x = torch.randn(IMAGE)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
    assert pruned[0].out_channels == 4


def test_everything_closed_leaves_one_unit_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = half_closed(mlp, share=1.1)
    with caplog.at_level(logging.WARNING, "selftune"):
        pruned = prune(model, torch.zeros(3, 5))
    assert (pruned[0].out_features, pruned[4].out_features) == (1, 1)
    x = torch.randn(3, 5)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
    told = [r.getMessage() for r in caplog.records if "all units are closed" in r.getMessage()]
    assert len(told) == len(set(told)) == 2


def test_layers_and_gates_that_are_used_twice() -> None:
    """Truth: the gated model; a gate at two places closes both, and tied weights stay whole."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate = nn.Linear(6, 6), Gate(6)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.gate(self.first(x))
            return self.last(self.gate(self.layer(x)))

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gate = nn.Embedding(7, 6), Gate(6, -1)
            self.hidden, self.head = nn.Linear(6, 6), nn.Linear(6, 7)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gate(self.hidden(self.embed(x))))

    for make, x in ((Shared, torch.randn(3, 4)), (Tied, torch.randint(7, (3, 5)))):
        model = half_closed(make, 1)
        pruned = prune(model, x)
        torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
    assert pruned.head.in_features == 6


@pytest.mark.parametrize(("lowest", "removed"), [(-1.0, 4), (0.1, 0)])
def test_bounds_that_move_0_keep_the_units(lowest: float, removed: int) -> None:
    gates = Gate(8)
    model = nn.Sequential(nn.Linear(5, 8), gates, nn.Hardtanh(lowest, 0.5), nn.Linear(8, 2))
    with torch.no_grad():
        gates.gates[:4] = 0.0
    x = torch.randn(16, 5)
    pruned = prune(model, x)
    assert pruned[0].out_features == 8 - removed
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-6)


def test_the_threshold_closes_traces_of_gates() -> None:
    """Truth: the model with these gates at exactly 0."""
    model = half_closed(mlp, share=0.0)
    with torch.no_grad():
        model[2].gates[:5] = 0.009
        pruned = prune(model, torch.zeros(3, 5))
        model[2].gates[:5] = 0.0
    x = torch.randn(3, 5)
    assert pruned[0].out_features == 7
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_it_goes_through_export(name: str) -> None:
    """Truth: the smaller model itself."""
    make, inputs = MODELS[name]
    pruned, x = prune(half_closed(make), inputs()), inputs()
    exported = torch.export.export(pruned, (x,))
    torch.testing.assert_close(exported.module()(x), pruned(x))


@pytest.mark.slow
def test_it_loads_where_the_library_is_not_installed(tmp_path: Path) -> None:
    """Truth: a Python process in which the library cannot be imported."""
    model, x = half_closed(optional), torch.randn(3, 4)
    pruned = prune(model, x)
    torch.save((pruned, x, pruned(x)), tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['selftune'] = None\n"
        "import torch\n"
        f"model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(model(x), y)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_state_dict_fits_a_plain_model_of_the_smaller_size() -> None:
    """Truth: a plain model written by hand."""
    model, x = half_closed(mlp), torch.randn(3, 5)
    pruned, buffer = prune(model, x), io.BytesIO()
    torch.save(pruned.state_dict(), buffer)
    buffer.seek(0)
    a, b = pruned[0].out_features, pruned[4].out_features
    plain = nn.Sequential(
        nn.Linear(5, a), nn.ReLU(), nn.Identity(), nn.Dropout(), nn.Linear(a, b), nn.Identity(),
        nn.Tanh(), nn.Linear(b, 2),
    ).eval()  # fmt: skip
    loaded = torch.load(buffer)
    plain.load_state_dict({k: v for k, v in loaded.items() if "factors" not in k})
    if all("factors" not in k for k in loaded):
        torch.testing.assert_close(plain(x), pruned(x))


def test_modes_and_training_flags_are_kept() -> None:
    model = half_closed(mlp).train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    pruned = prune(model, torch.zeros(3, 5))
    assert pruned.training
    assert not pruned[3].training
    assert not pruned[0].weight.requires_grad


def test_copies_are_independent() -> None:
    """Law: training the smaller model leaves the gated one alone."""
    model = half_closed(optional)
    twin = copy.deepcopy(model)
    pruned = prune(model, torch.zeros(3, 4))
    with torch.no_grad():
        for p in pruned.parameters():
            p.zero_()
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), twin(x))
