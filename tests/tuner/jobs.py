"""Small jobs that the tests of the tuner share."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import selftune as st

Batch = tuple[Tensor, Tensor]


def points(count: int, seed: int = 0) -> Batch:
    """Three noisy classes of points in the plane."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (count,), generator=generator)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[targets] + torch.randn(count, 2, generator=generator), targets


def net(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
    )


def loader(count: int = 200, seed: int = 0, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*points(count, seed)), **{"batch_size": 20} | options)


def tuner(model: nn.Module | None = None, **options: Any) -> st.Tuner:
    rule = st.rules.SGD()
    given = {"rule": rule, "hparams": {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}}
    given |= {"loss_fn": F.cross_entropy, "compile": False} | options
    return st.Tuner(model or net(), **given)


def loss_of(model: nn.Module, batch: Batch) -> float:
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(batch[0]), batch[1]))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dictionaries of tensors or arrays are equal bit for bit, NaN included."""
    pairs = [(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one]
    return one.keys() == other.keys() and all(
        a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in pairs
    )


class Dying:
    """Batches of a loader until the power goes out."""

    def __init__(self, batches: Any, after: float) -> None:
        self.batches, self.left = batches, after

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.left == 0:
                raise Outage
            self.left -= 1
            yield batch


class Outage(Exception):
    pass
