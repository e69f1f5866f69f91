"""Gates around and within choices. Truths: the model with closed gates, sizes by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from selftune.structure import Choice, Gate, Goal, Optional, open_gates, prune


def kernels(ins: int, outs: int) -> Choice:
    return Choice([nn.Conv2d(ins, outs, k, padding=k // 2) for k in (1, 3, 5)])


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), Choice([nn.ReLU(), nn.Tanh()]), Gate(8),
        kernels(8, 6), nn.BatchNorm2d(6), nn.ReLU(), Gate(6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip


def within() -> nn.Module:
    """A branch with gates of its own, in a block that can be removed."""
    wide = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), Gate(12), nn.Linear(12, 8))
    choice = Choice([wide, nn.Linear(8, 8)])
    block = Optional(choice, residual=False)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Gate(8), block, nn.Linear(8, 2))


@pytest.mark.parametrize("chosen", [0, 1])
@pytest.mark.parametrize(
    ("make", "example"), [(images, torch.randn(3, 1, 7, 7)), (within, torch.randn(5, 4))]
)
def test_units_on_both_sides_of_a_choice_are_removed(
    make: Callable[[], nn.Module], example: torch.Tensor, chosen: int
) -> None:
    """Truth: the outputs of the model with closed gates and the branch that is chosen."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Choice):
                module.scores.fill_(-200.0)[chosen] = 200.0
            if isinstance(module, Gate):
                module.gates[::2] = 0.0
    small = prune(model, example, loss=lambda m: m(example).square().mean())
    torch.testing.assert_close(small(example), model(example))
    sizes = {n: tuple(p.shape) for n, p in small.named_parameters()}
    assert sizes["0.weight"][0] == 4
    if make is images:
        kernel = (1, 3)[chosen]
        assert sizes["3.weight"] == (3, 4, kernel, kernel)
    else:
        branch = (4 * 6 + 6) + (6 * 8 + 8) if chosen == 0 else 4 * 8 + 8
        assert sum(p.numel() for p in small.parameters()) == 20 + branch + 18


def test_a_goal_closes_units_around_a_choice() -> None:
    """Sizes by hand: every branch loses the units that all of them share."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 10), nn.ReLU(), Gate(10), Choice([nn.Linear(10, 10), nn.Linear(10, 10)]),
        nn.ReLU(), Gate(10), nn.Linear(10, 1),
    )  # fmt: skip
    x = torch.randn(64, 4)
    goal = Goal(net, x[:1], budget=0.5, total_steps=10, closings=1)
    assert goal.size()["parameters"] == 50 + 2 * 110 + 11
    for _ in range(10):
        goal.step(lambda: (net(x) - x[:, :1]).square().mean())
    a, b = (kept for kept, _ in open_gates(net).values())
    assert goal.size()["parameters"] == 5 * a + 2 * (a + 1) * b + b + 1 <= 281 / 2
    assert a < 10
    assert b < 10
