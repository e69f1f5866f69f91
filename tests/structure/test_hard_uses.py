"""What users do with gates, goals and batches besides the usual. Truth: by hand, or a message."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from selftune.structure import Batches, Choice, Gate, Goal, Optional, open_gates, prune, with_gates
from selftune.structure._saliency import saliency

X, Y = torch.randn(32, 8), torch.randn(32, 1)


def network() -> nn.Sequential:
    """Only its first four units have an effect."""
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), Gate(32), nn.Linear(32, 1))
    with torch.no_grad():
        net[3].weight[:, 4:] = 0
        net[3].weight[:, :4] = 1
    return net


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_a_loader_with_workers_counts_once(workers: int) -> None:
    """Truth: a noise scale far above, and a factor of two for each epoch."""
    batches = Batches(range(2000), start=4, most=256, interval=None)
    loader = DataLoader(TensorDataset(torch.arange(2000)), batch_sampler=batches,
                        num_workers=workers)  # fmt: skip
    sizes, first = [], []
    for _ in range(3):
        epoch = [batch[0] for batch in loader]
        assert len(torch.cat(epoch).unique()) == 2000
        sizes.append(len(epoch[0]))
        first.append(epoch[0][:4].tolist())
        batches.scale.observe(1 + 500 / 8, 1 + 500 / 16, 8, 16)
    assert (sizes, batches.epoch) == ([4, 8, 16], 3)
    again = Batches(range(2000), start=4, most=256, interval=None)
    assert [next(iter(again))[:4] for _ in range(3)] == first


def test_a_loss_of_nan_postpones_a_closing(caplog: pytest.LogCaptureFixture) -> None:
    net, seen = network(), []
    goal = Goal(net, X[:1], budget=0.2, total_steps=100, closings=1)

    def closure() -> Tensor:
        seen.append(0)
        return F.mse_loss(net(X), Y) * (float("nan") if len(seen) == 1 else 1)

    closed = [step for step in range(100) if goal.step(closure)]
    assert closed == [20]  # one step later than due
    assert net[2].mask[:4].tolist() == [1] * 4
    assert "closing is postponed" in caplog.text


def test_a_tolerance_waits_until_the_model_has_learned() -> None:
    """Truth: a product that takes most of the run to learn; a first fifth leaves a constant."""
    torch.manual_seed(1)
    x = torch.randn(600, 2)
    y = x[:, :1] * x[:, 1:]
    net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), Gate(24), nn.Linear(24, 1))
    goal = Goal(net, x[:1], tolerance=0.02, total_steps=400)
    opt = torch.optim.Adam(net.parameters(), lr=0.02)
    for step in range(400):
        opt.zero_grad()
        F.mse_loss(net(x[:500]), y[:500]).backward()
        opt.step()
        if goal.step(lambda: F.mse_loss(net(x[500:]), y[500:])):
            assert step >= 200
    with torch.no_grad():
        assert float(F.mse_loss(net(x[500:]), y[500:])) < 0.1 * float(y[500:].var())


def test_a_compiled_model(caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    compiled: Any = torch.compile(net, backend="eager")
    compiled(X)
    goal = Goal(compiled, X[:1], budget=0.5, total_steps=10)
    with pytest.raises(ValueError, match="of a compiled model, the original one"):
        goal.close(lambda: F.mse_loss(compiled(X), Y), 1.0)
    assert goal.close(lambda: F.mse_loss(net(X), Y), 1.0)
    small = prune(compiled, X[:1])
    assert torch.allclose(small(X), net(X), atol=1e-6)
    assert small[0].out_features < 32


def test_gates_that_can_remove_nothing_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    images = torch.randn(1, 3, 8, 8)
    parts = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), Gate(8)]
    with pytest.raises(ValueError, match="no unit of 3 can be removed"):
        Goal(nn.Sequential(*parts, nn.Flatten(), nn.Linear(512, 2)), images, budget=0.7)
    more = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), Gate(8), nn.Flatten(), nn.Linear(512, 2)]
    net = nn.Sequential(*parts, *more)
    Goal(net, images, budget=0.9)
    assert "no unit of 3 can be removed" in caplog.text
    with torch.no_grad():
        net[3].gates[2:] = 0
    prune(net, images)
    assert "kept because other layers need them, or as the last of a layer: 3 (6)" in caplog.text


class Scored(nn.Module):
    """As language models often are: the loss, if there are targets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), Gate(32), nn.Linear(32, 3))

    def forward(self, x: Tensor, targets: Tensor | None = None, features: bool = False) -> Any:
        found = self.net(x)
        if features:
            return found
        return found if targets is None else (found, F.cross_entropy(found, targets))


def test_arguments_with_defaults() -> None:
    net, targets = Scored(), torch.zeros(32).long()
    goal = Goal(net, X[:1], budget=0.5, total_steps=10)
    assert goal.close(lambda: net(X, targets)[1], 1.0)
    small = prune(net, X[:1])
    assert small.net[0].out_features < 32
    assert torch.allclose(small(X, targets)[1], net(X, targets)[1], atol=1e-6)


def test_what_gated_recurrent_layers_take() -> None:
    x = torch.randn(2, 5, 3)
    for layers in (1, 2):
        gated = with_gates(nn.GRU(3, 4, layers, batch_first=True))
        assert torch.equal(gated(x, None)[0], gated(x)[0])
        with pytest.raises(ValueError, match="starts from a state of 0"):
            gated(x, torch.zeros(layers, 2, 4))
        with pytest.raises(ValueError, match="pad_packed_sequence"):
            gated(nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True))
        with pytest.raises(ValueError, match="no batch dimension"):
            gated(x[0])


def test_a_model_that_cannot_be_gated_stays_as_it_was() -> None:
    net = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(3, 4, bidirectional=True)])
    nested = nn.Sequential(nn.ModuleDict({"rnn": nn.LSTM(3, 4, proj_size=2)}))
    with pytest.raises(ValueError, match=r"^0\.rnn: nn\.LSTM\(proj_size=2\)"):
        with_gates(nested)
    kinds = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=r"^1: nn\.LSTM\(bidirectional.* parts of the model"):
        with_gates(net)
    assert [type(m) for m in net.modules()] == kinds


def test_optional_passes_arguments_on() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    found = Optional(layer, residual=False)(x, src_key_padding_mask=padding)
    assert torch.allclose(found, layer(x, src_key_padding_mask=padding), atol=1e-6)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_layers_are_cut(kind: str) -> None:
    """Truth: the outputs of the gated model; sizes by hand."""
    wrap = getattr(nn.utils.parametrizations, kind)
    torch.manual_seed(0)
    gates = [Gate(8), Gate(8)]
    net = nn.Sequential(
        wrap(nn.Linear(8, 8)), nn.ReLU(), gates[0], wrap(nn.Linear(8, 8)), nn.ReLU(), gates[1],
        nn.Linear(8, 1),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for gate in gates:
            gate.gates.uniform_(0.5, 1.5)
            gate.gates[3:] = 0.0
    net[3].requires_grad_(False)
    x = torch.randn(5, 8)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    small = prune(net, x)
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == (8 + 1) * 3 + (3 + 1) * 3 + 4
    assert nn.utils.parametrize.is_parametrized(net[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [m.weight.requires_grad for m in small if isinstance(m, nn.Linear)] == [
        True,
        False,
        True,
    ]
    Goal(net, x, budget=0.3)  # can be reached


class Changed(nn.Module):
    """A block whose gated output is changed in place, as in torchvision's residual blocks."""

    def __init__(self, *after: nn.Module) -> None:
        super().__init__()
        self.gate, self.after = Gate(8), nn.Sequential(*after)

    def forward(self, x: Tensor) -> Tensor:
        out = self.gate(x)
        out += x
        return self.after(out).sum(1)


@pytest.mark.parametrize("after", [nn.SiLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)])
def test_saliencies_of_gates_that_are_changed_in_place(after: nn.Module) -> None:
    """Closed form, example by example: the mean of (g ∂L/∂g)²/2, with derivatives by autograd."""
    torch.manual_seed(0)
    net = Changed(after)
    found = saliency(net, lambda: net(X).mean())["gate"]
    slopes = [torch.autograd.grad(net(x[None]).sum(), net.gate.gates)[0].flatten() for x in X]
    torch.testing.assert_close(found, torch.stack(slopes).square().mean(0) / 2)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Choice([nn.Tanh(), nn.ReLU(inplace=True)]), r"Choice: branches\[1\] changes its input"),
        (Optional(nn.Sequential(nn.SiLU(inplace=True), nn.Linear(8, 8))), "its block changes its"),
    ],
)
def test_parts_that_change_their_input_in_place_are_named(layer: nn.Module, message: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8), layer)
    with pytest.raises(ValueError, match=f"{message}.*: pass inplace=False"):
        net(X)


@pytest.mark.parametrize(
    "layer",
    [
        Choice([nn.Tanh(), nn.ReLU()]),
        Optional(nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))),
    ],
)
def test_inputs_are_looked_at_under_every_transform(layer: nn.Module) -> None:
    """Truth: the plain pass."""
    net = nn.Sequential(nn.Linear(8, 8), layer)
    want = net(X)
    compiled: Any = torch.compile(net, backend="eager", fullgraph=True)
    exported = torch.export.export(net, (X,)).module()
    for run in (compiled, torch.func.vmap(net), exported):
        torch.testing.assert_close(run(X), want)
    with torch.inference_mode():
        torch.testing.assert_close(net(X), want)


def test_an_interrupted_tolerance_search_closes_nothing() -> None:
    """Truth: the open gates before; no unit may be closed at a tolerance of 0."""
    net, calls = network(), iter(range(100))
    goal = Goal(net, X[:1], tolerance=0.0, total_steps=10, batches=1)

    def closure() -> Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return F.mse_loss(net(X), Y)

    with pytest.raises(KeyboardInterrupt):
        goal.close(closure, 1.0)
    assert open_gates(net) == {"2": (32, 32)}


class Conditioned(nn.Module):
    """Blocks that take a second argument, which one of them needs."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Optional(Block(), residual=i > 0) for i in range(3))
        self.head, self.named = nn.Linear(8, 1), named

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, shift=shift) if self.named else block(x, shift)
        return self.head(block(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 6), Gate(6), nn.Linear(6, 8)

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
        hidden = torch.relu(self.up(x if shift is None else x + shift))
        return scale * self.down(self.gate(hidden))


@pytest.mark.parametrize("named", [False, True])
def test_blocks_with_further_arguments_are_pruned(named: bool) -> None:
    """Truth: outputs of the gated model, and the number of parameters that are left."""
    torch.manual_seed(0)
    net, shift = Conditioned(named), torch.randn(1, 8)
    assert Goal(net, (X, shift), budget=0.5).size()["parameters"] == 3 * 110 + 9
    net.blocks[1].mask.zero_()
    net.blocks[0].block.gate.mask[:4] = 0
    small = prune(net, (X, shift))
    torch.testing.assert_close(small(X, shift), net(X, shift))
    assert sum(p.numel() for p in small.parameters()) == 110 + 42 + 9


def test_blocks_that_are_used_twice_have_a_goal() -> None:
    """Truth: the size by hand, and that of the pruned model."""
    block = Optional(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Gate(6), nn.Linear(6, 8)))
    net = nn.Sequential(nn.Linear(8, 8), block, nn.ReLU(), block, nn.Linear(8, 2))
    goal = Goal(net, X, budget=0.5)
    assert goal.size() == {"parameters": 72 + 110 + 18, "multiply_adds": 64 + 2 * 96 + 16}
    block.block[2].mask[:4] = 0
    assert goal.size() == {"parameters": 72 + 42 + 18, "multiply_adds": 64 + 2 * 32 + 16}
    small = prune(net, X)
    assert sum(p.numel() for p in small.parameters()) == goal.size()["parameters"]
    block.mask.zero_()
    assert goal.size() == {"parameters": 90, "multiply_adds": 80}


def test_a_model_pruned_in_inference_mode_can_be_trained() -> None:
    net = network()
    net[2].mask[4:] = 0
    with torch.inference_mode():
        small = prune(net, torch.randn(3, 8))
    small(X).sum().backward()
    assert small[0].weight.grad.shape == (4, 8)
