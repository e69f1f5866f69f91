"""Problems and models that estimators are tried on; everything starts from random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

import selftune as st

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def data(seed: int, rows: int = 20, columns: int = 6) -> tuple[Tensor, Tensor]:
    x = random(rows, columns, seed=seed)
    return x, x @ random(columns, seed=1) + random(rows, seed=seed + 100)


def square(w: Tensor, hparams: Any, batch: Any) -> Tensor:
    return (batch[0] @ w - batch[1]).square().mean() / 2


def logistic(w: Tensor, hparams: Any, batch: Any) -> Tensor:
    return nn.functional.softplus(-batch[0] @ w * batch[1].sign()).mean()


LOSSES = {"ridge": square, "logistic": logistic}


def regression(name: str, rule: Any = None, **options: Any) -> st.Problem:
    loss = LOSSES[name]
    return st.Problem(
        update=st.Update(rule or st.rules.SGD()), inner_loss=loss,
        outer_loss=lambda w, b: loss(w, {}, b), options=options,
    )  # fmt: skip


def smoothed(output: Tensor, target: Tensor, label_smoothing: Tensor | float = 0.0) -> Tensor:
    """Cross-entropy whose label smoothing is a tensor."""
    uniform = -log_softmax(output, -1).mean()
    return (1 - label_smoothing) * cross_entropy(output, target) + label_smoothing * uniform


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


MODELS = {
    "MLP": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.GELU(),
                              nn.Linear(5, 3)),
        (4,),
    ),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.Flatten(),
                              nn.Linear(12, 3)),
        (1, 4, 4),
    ),
    "LSTM": (Recurrent, (5, 3)),
    "transformer": (Attentive, (5, 4)),
}  # fmt: skip


def model(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A small model in float64 and batches for it."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    net = make().double()
    batches = [
        (random(8, *shape, seed=s), torch.arange(8) % 3)
        for s in range(6)
    ]  # fmt: skip
    return net, batches


class Once(torch.autograd.Function):
    """A square that can be differentiated once."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope
