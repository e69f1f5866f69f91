"""Values that are not 0 although a gate is closed, and layers that a gate cannot be folded into.

Truths: the gated model itself, the size of the pruned model, a log message.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.nn.utils import spectral_norm

from selftune.structure import Gate, Goal, Optional, parameter_groups, prune


def size(model: nn.Module) -> int:
    """Number of parameters without gates."""
    return sum(p.numel() for n, p in model.named_parameters() if "gates" not in n)


def assert_pruned_equal(model: nn.Module, x: Tensor) -> nn.Module:
    """The pruned model, whose outputs are those of the gated one."""
    model.eval()
    pruned = prune(model, x)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
    return pruned


class Between(nn.Module):
    """An operation between gated units, some closed, and a linear layer."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.beside, self.gate = nn.Linear(4, 8), nn.Linear(4, 8), Gate(8)
        self.operation, self.out = operation, nn.Linear(8, 2)
        with torch.no_grad():
            self.gate.gates[[1, 2, 5]] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.operation(self.gate(self.first(x)), self.beside(x)))


def added(y: Tensor, z: Tensor) -> Tensor:
    y.add_(z)
    return y


KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add_ without its result": added,
    "hardtanh above 0": lambda y, z: F.hardtanh(y, 0.5, 1.0),
    "hardsigmoid": lambda y, z: F.hardsigmoid(y),
    "pooling along the units": lambda y, z: F.max_pool1d(y, 3, 1, 1),
    "chunks joined again": lambda y, z: torch.cat(y.chunk(2, 1), 1),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", KEPT)
def test_closed_units_that_do_not_stay_0_are_kept(name: str) -> None:
    """Truth: the gated model's outputs (these were an error)."""
    x = torch.randn(5, 4)
    pruned = assert_pruned_equal(Between(KEPT[name]), x)
    assert size(pruned) == size(Between(KEPT[name]))


MAPPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hardtanh around 0": lambda y, z: F.hardtanh(y, -0.5, 1.0),
    "type of another tensor": lambda y, z: y.to(z.dtype),
    "dropout": lambda y, z: F.dropout(y, p=0.5, training=False),
}


@pytest.mark.parametrize("name", MAPPED)
def test_closed_units_are_removed_behind_a_function_that_maps_0_to_0(name: str) -> None:
    """Truth: outputs of the gated model, and a count by hand: 3 of 8 units have 5 + 2 weights."""
    model = Between(MAPPED[name])
    assert size(assert_pruned_equal(model, torch.randn(5, 4))) == size(model) - 3 * (5 + 2)


class Tied(nn.Module):
    """An autoencoder whose decoder uses the encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.relu, self.gate = nn.Linear(8, 16), nn.ReLU(), Gate(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.gate(self.relu(self.encoder(x))), self.encoder.weight.t())


def masked() -> nn.Module:
    layer = nn.Linear(8, 16)
    torch_prune.l1_unstructured(layer, "weight", 0.3)
    return nn.Sequential(layer, nn.ReLU(), Gate(16), nn.Linear(16, 2))


UNFOLDED: dict[str, Callable[[], nn.Module]] = {
    "spectral norm": lambda: nn.Sequential(
        spectral_norm(nn.Linear(8, 16)), nn.ReLU(), Gate(16), spectral_norm(nn.Linear(16, 2))
    ),
    "pruned by torch": masked,
    "tied": Tied,
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_gates_beside_computed_or_shared_weights_stay_factors(name: str) -> None:
    """Truth: the gated model's outputs (this was an error)."""
    torch.manual_seed(0)
    model, x = UNFOLDED[name](), torch.randn(5, 8)
    gate = next(m for m in model.modules() if isinstance(m, Gate))
    with torch.no_grad():
        gate.gates.mul_(torch.rand(16).view(gate.gates.shape) + 0.5)
        model(x)  # spectral norms begin
    assert_pruned_equal(model, x)


def test_factors_have_the_type_of_their_input() -> None:
    """Truth: outputs of the gated model, with float32 gates in a bfloat16 model."""
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)]
    layers = [layer.to(torch.bfloat16) for layer in layers]
    layers.insert(2, Gate(8))
    with torch.no_grad():
        layers[2].gates[0], layers[2].gates[1] = 0.0, -0.5  # type: ignore[index, union-attr]
    model = nn.Sequential(*layers)
    x = torch.randn(4, 3, 2, 2, dtype=torch.bfloat16)
    torch.testing.assert_close(prune(model, x)(x), model(x), rtol=0.05, atol=0.05)


class Dense(nn.Module):
    """A network with a norm before each convolution (DenseNet), gated after the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Conv2d(3, 16, 1, bias=False), Gate(16)
        self.norm, self.out = nn.BatchNorm2d(16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(self.gate(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("trained", [False, True])
def test_a_goal_does_not_count_what_training_makes_different_from_0(trained: bool) -> None:
    """Truth: a trained network, from which pruning removes nothing, and the documented error.

    The bias and mean of a new norm are 0, so the goal counted its units as removable.
    """
    torch.manual_seed(0)
    model, x = Dense(), torch.randn(32, 3, 4, 4)
    if trained:
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), (x[:, 0].mean((1, 2)) > 0).long()).backward()
            optimizer.step()
        with torch.no_grad():
            model.gate.gates[3:] = 0.0
        assert size(prune(model, x)) == size(model)
    with pytest.raises(ValueError, match="no unit"):
        Goal(model, x[:1], budget=0.5, total_steps=10)


def test_a_block_of_two_optionals_is_counted_until_both_are_closed() -> None:
    """Truth: the size of the pruned model."""
    block = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), Gate(32), nn.Linear(32, 8))
    model, x = nn.Sequential(Optional(block), Optional(block), nn.Linear(8, 1)), torch.zeros(1, 8)
    goal = Goal(model, x, budget=0.5, total_steps=10)
    model[0].mask.zero_()  # type: ignore[operator, union-attr]
    assert goal.size()["parameters"] == size(prune(model, x)) == size(model)


class Auxiliary(nn.Module):
    """A second head in training, on gated features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), Gate(8))
        self.head, self.auxiliary = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> object:
        y = self.features(x)
        return (self.head(y), self.auxiliary(y)) if self.training else self.head(y)


class Observed(nn.Module):
    """A forward with effects in training: a running value, a count and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.out = nn.Linear(4, 8), Gate(8), nn.Linear(8, 2)
        self.register_buffer("scale", torch.ones(1))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.first(x))
        if self.training:
            self.steps += 1
            self.scale.mul_(0.9)
            self.penalty = y.square().mean()
            y = y + 0 * torch.rand(8)
        return self.out(y / self.scale)


def test_pruning_does_not_run_the_forward_of_training() -> None:
    """Truth: state and attributes before, outputs of the gated model, torch's generator."""
    model, x, state = Observed(), torch.randn(5, 4), torch.get_rng_state()
    with torch.no_grad():
        model.gate.gates[2:4] = 0.0
    pruned = assert_pruned_equal(model, x)
    assert (pruned.steps, float(pruned.scale), hasattr(pruned, "penalty")) == (0, 1.0, False)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    prune(model, x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_gates_on_integers_are_factors(dtype: torch.dtype) -> None:
    """Truth: the gated model's outputs."""
    model = nn.Sequential(Gate(4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].gates[1], model[0].gates[2] = 0.0, 0.7  # type: ignore[index, union-attr]
    assert_pruned_equal(model, torch.randint(0, 2, (5, 4)).to(dtype))


def test_padding_of_a_later_axis_keeps_closed_units_removable() -> None:
    """Truth: the gated model's outputs, and fewer parameters."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.out = nn.Linear(4, 8), Gate(8, dim=2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = F.pad(self.gate(self.first(x).transpose(2, 3)), (1, 1))
            return self.out(y.transpose(2, 3))

    model = Padded()
    with torch.no_grad():
        model.gate.gates[:3] = 0.0
    pruned = assert_pruned_equal(model, torch.randn(2, 3, 5, 4))
    assert size(pruned) == size(model) - 3 * (5 + 2)


def test_layers_of_training_alone_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Truth: a log message, and modes as before."""
    model = Auxiliary().train()
    prune(model, torch.randn(2, 4))
    (message,) = (r.getMessage() for r in caplog.records)
    assert message.startswith("auxiliary: called in training mode only")
    assert all(m.training for m in model.modules())
