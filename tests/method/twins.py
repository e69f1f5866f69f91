"""The hyper optimizer and torch's optimizers beside it, which the tests of its steps share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selftune.bijections import Identity
from selftune.hparams import Hparam
from selftune.method import HyperOptimizer, HyperSettings, HyperState
from selftune.optim._shifts import TorchProposal

SETTINGS = HyperSettings()
SIZE = 0.05


def free(index: int = 0, **known: Any) -> Hparam:
    """A hyperparameter that is its own raw value, within no bounds that matter."""
    given = dict(name=f"h{index}", bijection=Identity(), lower=-1e9, upper=1e9, from_zero=1.0)
    return Hparam(**{**given, **known})


def frees(count: int, **known: Any) -> dict[str, Hparam]:
    return {h.name: h for h in (free(i, **known) for i in range(count))}


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def adam(raw: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(raw, lr=SIZE, betas=SETTINGS.betas, eps=SETTINGS.eps)


def sgd(raw: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(raw, lr=0.05)


def rmsprop(raw: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(raw, lr=0.01, momentum=0.5)


class Ours:
    """The hyper optimizer, with its own Adam or one from outside, and its shifts from 0 on."""

    def __init__(self, hparams: dict[str, Hparam], make: Any = adam, **options: Any) -> None:
        self.hyper = HyperOptimizer(hparams, size=SIZE, **options)
        self.state = HyperState.begin(torch.zeros(len(hparams), dtype=torch.float64))
        self.frame = self.hyper.frame()
        self.propose = None if make is adam else TorchProposal(make, self.state.raw)

    def step(self, signal: Tensor, **options: Any) -> Tensor:
        self.state = self.hyper.step(
            self.state, signal, self.frame, propose=self.propose, **options
        )
        return self.state.raw


class Twin:
    """torch's optimizer alone."""

    def __init__(self, count: int, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.raw = torch.zeros(count, dtype=torch.float64, requires_grad=True)
        self.optimizer = make([self.raw])

    def step(self, signal: Tensor) -> Tensor:
        self.raw.grad = signal.clone()
        self.optimizer.step()
        return self.raw.detach().clone()


def noise(steps: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, size, dtype=torch.float64, generator=generator)
