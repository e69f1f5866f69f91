"""Networks that are wider than 5,000 images of Fashion-MNIST need, for ``benchmarks.structure``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

import selftune as st


@dataclass(frozen=True)
class Net:
    """A network of given widths.

    Attributes:
        make: Makes it, with gates or without, for a number of units in each group.
        widths: The numbers of units.
        groups: The layers whose rows are the units of each group; those of several layers are
            added to one another.
    """

    make: Callable[[bool, tuple[int, ...]], nn.Module]
    widths: tuple[int, ...]
    groups: tuple[tuple[str, ...], ...]

    def units(self, model: nn.Module) -> tuple[int, ...]:
        """Rows of each group that are not all 0."""
        rows = (
            torch.stack([_of(model, path).weight.detach().flatten(1).any(1) for path in group])
            for group in self.groups
        )
        return tuple(int(r.any(0).sum()) for r in rows)

    def size(self, widths: tuple[int, ...]) -> tuple[int, float]:
        """Parameters, and multiply-adds of linear layers and convolutions for one image."""
        model, multiplied = self.make(False, widths).eval(), 0.0

        def count(module: nn.Module, given: object, output: Tensor) -> None:
            nonlocal multiplied
            assert isinstance(module.weight, Tensor)
            multiplied += module.weight.numel() * output.numel() / len(module.weight)

        for module in model.modules():
            if isinstance(module, (nn.Linear, _ConvNd)):
                module.register_forward_hook(count)
        model(torch.zeros(1, 1, 28, 28))
        return sum(p.numel() for p in model.parameters()), multiplied


def norm_of(model: nn.Module, path: str) -> nn.BatchNorm2d | None:
    """The norm that follows a convolution in its ``nn.Sequential``."""
    parent, _, index = path.rpartition(".")
    after: nn.Module | None = dict(model.get_submodule(parent).named_children()).get(
        str(int(index) + 1)
    )
    return after if isinstance(after, nn.BatchNorm2d) else None


def _of(model: nn.Module, path: str) -> nn.Linear:
    layer = model.get_submodule(path)
    assert isinstance(layer.weight, Tensor)
    return layer  # type: ignore[return-value]  # or a convolution


def _gate(gates: bool, units: int) -> nn.Module:
    return st.structure.Gate(units) if gates else nn.Identity()


def cnn(gates: bool, widths: tuple[int, ...]) -> nn.Module:
    """Two convolutions and a hidden layer, with a gate after each or without."""
    a, b, c = widths
    return nn.Sequential(
        *(nn.Conv2d(1, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU(), _gate(gates, a)),
        *(nn.MaxPool2d(2), nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()),
        *(_gate(gates, b), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(49 * b, c), nn.ReLU(), _gate(gates, c), nn.Linear(c, 10)),
    )


class Residual(nn.Module):
    """Two convolutions beside a shortcut, with gates on the units within and after it."""

    def __init__(self, ins: int, within: int, outs: int, stride: int, gates: bool) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *(nn.Conv2d(ins, within, 3, stride, padding=1, bias=False), nn.BatchNorm2d(within)),
            *(nn.ReLU(), _gate(gates, within)),
            *(nn.Conv2d(within, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs)),
        )
        self.shortcut = nn.Sequential() if stride == 1 else nn.Sequential(
            nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs)
        )  # fmt: skip
        self.gate = _gate(gates, outs)

    def forward(self, x: Tensor) -> Tensor:
        """Activations, shape (batch, outs, height / stride, width / stride)."""
        output: Tensor = self.gate(F.relu(self.path(x) + self.shortcut(x)))
        return output


def resnet(gates: bool, widths: tuple[int, ...]) -> nn.Module:
    """Three residual blocks at 14 × 14, 7 × 7 and 4 × 4."""
    a, b, c, d, e, f = widths
    return nn.Sequential(
        *(nn.Conv2d(1, a, 3, 2, padding=1, bias=False), nn.BatchNorm2d(a), nn.ReLU()),
        *(_gate(gates, a), Residual(a, b, a, 1, gates), Residual(a, c, d, 2, gates)),
        *(Residual(d, e, f, 2, gates), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(f, 10),
    )


NETS = {
    "cnn": Net(cnn, (24, 48, 96), (("0",), ("5",), ("11",))),
    "resnet": Net(resnet, (24, 24, 48, 48, 96, 96), (
        ("0", "4.path.4"), ("4.path.0",), ("5.path.0",), ("5.path.4", "5.shortcut.0"),
        ("6.path.0",), ("6.path.4", "6.shortcut.0"),
    )),
}  # fmt: skip
"""Networks by name."""
