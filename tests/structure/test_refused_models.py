"""Models that cannot be pruned, or in part. Truths: the gated model, and what errors name."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selftune.structure import Gate, Optional, prune


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), Gate(6), nn.Linear(6, 2))


def test_what_cannot_be_pruned_is_named() -> None:
    """Each error says what to do."""
    with pytest.raises(ValueError, match="no gates"):
        prune(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"example of shape \(1, 7\) does not fit"):
        prune(mlp(), torch.zeros(1, 7))
    with pytest.raises(ValueError, match="pass the model"):
        prune(Optional(nn.Linear(2, 2)), torch.zeros(1, 2))

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 3, 3), Gate(3))
            self.head = nn.Linear(48, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x).view(-1, 48))

    model = Written()
    model.net[1].gates.data[1] = 0.0
    with pytest.raises(RuntimeError, match=r"x\.flatten\(1\)"):
        prune(model, torch.zeros(2, 1, 6, 6))

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="cannot be traced"):
        prune(Branching(), torch.ones(3, 5))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate, self.head = nn.LSTM(5, 6, batch_first=True), Gate(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self.body(x)[0][:, -1]))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.norm = nn.Linear(5, 6), Gate(6, dim=-1), nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last, self.head = Gate(6, dim=-1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.gate(self.up(x)))
        return self.head(self.last(x + self.attention(x, x, x)[0]))


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(5, 6), Gate(6, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.layer(x))


class Functional(nn.Module):
    """Grouped convolution, weights that are used by hand, and a product with an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(5, 6), Gate(6, dim=-1)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.gate(self.layer(x)) * torch.linspace(0, 1, 6)
        return x @ self.last.weight + hidden


@pytest.mark.parametrize("make", [Recurrent, Normed, Output, Functional])
def test_units_that_something_unknown_needs_stay(make: type[nn.Module]) -> None:
    """Truth: the gated model. Its gates become factors, and its layers keep their sizes."""
    torch.manual_seed(0)
    model = make().eval()
    sizes = [p.shape for n, p in model.named_parameters() if "gates" not in n]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Gate):
                module.gates.normal_()
                module.gates[[1, 4]] = 0.0
    x = torch.randn(3, 4, 5)
    pruned = prune(model, x)
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
    assert [p.shape for p in pruned.parameters()] == sizes
    assert not any(isinstance(m, Gate) for m in pruned.modules())


@dataclass
class Scores:
    logits: Tensor
    more: Any = None


class Returning(nn.Module):
    """Returns a function of its output and of its hidden units."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.up, self.gate, self.head = nn.Linear(5, 6), Gate(6), nn.Linear(6, 2)
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        hidden = self.gate(self.up(x))
        return self.returned(self.head(hidden), hidden)


RETURNED: dict[str, tuple[Any, Any]] = {
    "in a dataclass": (lambda y, h: Scores(y, {"of": h.mT.std(0)}), lambda out: out.more["of"]),
    "in two": (lambda y, h: Scores(y, Scores(h.data)), lambda out: out.more.logits),
    "plain": (lambda y, h: (y, h.T), lambda out: out[1]),
}


@pytest.mark.parametrize("name", RETURNED)
def test_hidden_units_that_are_returned_stay(name: str) -> None:
    """Truth: the output of the gated model."""
    torch.manual_seed(0)
    returned, units = RETURNED[name]
    model, x = Returning(returned), torch.randn(3, 5)
    model.gate.mask[::2] = 0
    torch.testing.assert_close(units(prune(model, x)(x)), units(model(x)))
    model.up.weight.data[1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        prune(model, x)


def test_outputs_that_cannot_be_compared_are_named() -> None:
    with pytest.raises(ValueError, match="its output, a str, has no tensors"):
        prune(Returning(lambda y, h: "no tensor"), torch.randn(3, 5))
