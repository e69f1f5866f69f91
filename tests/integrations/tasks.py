"""One tiny task, and the plain self-tuned loop on it: the truth that frameworks are held to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import selftune as st
from selftune.integrations import ValidationBatches

STEPS = 24  # of four epochs
EPOCH = 6


def needs(extra: str) -> pytest.MarkDecorator:
    """Skip where an extra is not installed; .ci/run installs them all."""
    names = {"integrations": ("peft", "jsonargparse")}.get(extra, (extra,))
    missing = any(importlib.util.find_spec(name) is None for name in names)
    return pytest.mark.skipif(missing, reason=f"needs the extra {extra}: pip install -e .[{extra}]")


def dataset(size: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=generator)
    return TensorDataset(x, (x[:, :2].sum(1) > 0).long())


def train_loader(ranks: int = 1) -> DataLoader[Any]:
    return DataLoader(dataset(16 * EPOCH, 0), batch_size=16 // ranks)


def val_loader(ranks: int = 1) -> DataLoader[Any]:
    return DataLoader(dataset(60, 1), batch_size=20 // ranks)


def network(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 12), nn.BatchNorm1d(12) if norm else nn.Tanh(), nn.ReLU(), nn.Linear(12, 2)
    )


def tuned(model: nn.Module, **options: Any) -> Any:
    return st.AdamW(model, lr=0.01, **{"total_steps": STEPS, "every": 2, **options})


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def plain(
    model: nn.Module,
    opt: Any,
    epochs: int = 4,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: Callable[[], Any] = nullcontext,
    seed: int = 0,
    position: Callable[[int], tuple[int, ...]] = lambda step: (step,),
) -> Iterator[None]:
    """The loop by hand; yields after every epoch, in which the weights are those of training."""
    batches, step = ValidationBatches(val_loader(), seed), 0
    for _ in range(epochs):
        for index, batch in enumerate(train_loader()):
            model.train()
            with autocast():
                loss = loss_of(model, batch) / accumulate
            loss.backward()
            if (index + 1) % accumulate:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()
            step += 1
            drawn = batches.at(*position(step))

            def value(drawn: Iterator[Any] = drawn) -> Tensor:
                model.eval()
                with autocast():
                    return loss_of(model, next(drawn))

            opt.hyper_step(value)
        yield


def run(model: nn.Module, opt: Any, epochs: int = 4, **options: Any) -> dict[str, Tensor]:
    """The whole loop; returns the averaged weights."""
    for _ in plain(model, opt, epochs, **options):
        pass
    return averaged(model, opt)


def averaged(model: nn.Module, opt: Any) -> dict[str, Tensor]:
    with opt.averaged():
        return copied(model)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def equal(one: Any, other: Any) -> bool:
    """Whether two state dictionaries are the same bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def score(model: nn.Module, state: dict[str, Tensor]) -> float:
    """The mean loss of weights on the validation set."""
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        losses = [float(loss_of(model, batch)) for batch in val_loader()]
    return sum(losses) / len(losses)
