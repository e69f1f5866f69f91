"""Models that cannot be pruned. Truth: the error names the model's fault and the remedy."""

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
