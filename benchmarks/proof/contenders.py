"""The methods: ours, fixed hyperparameters, and optimizers that need no learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.proof.drivers import SelfTuned
from benchmarks.proof.training import Contender, Make
from benchmarks.workloads import Batch, Workload

WARM_UP = 0.05
STATISTICS = 25  # batches by which Schedule-Free's BatchNorm statistics are computed


@dataclass(frozen=True)
class Config:
    """AdamW's hyperparameters and the shape of the learning rate over the run."""

    lr: float = 1e-3
    beta1: float = 0.9
    weight_decay: float = 1e-2
    schedule: str = "constant"
    decay: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        """Of the learning rate at a step."""
        if self.schedule == "linear":
            return 1 - step / steps
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / steps))
        return 1 / (1 + self.decay * step)


def search_space(number: Callable[[str, float, float], float], choice: Callable) -> Config:
    """A configuration from a source of log-uniform numbers and of choices: four decades each."""
    schedule = choice("schedule", ["constant", "linear", "cosine"])
    return Config(
        lr=number("lr", 1e-5, 1e-1),
        beta1=1 - number("one_minus_beta1", 1e-3, 1.0),
        weight_decay=number("weight_decay", 1e-4, 1.0),
        schedule=schedule,
        decay=number("decay", 1e-6, 1e-2) if schedule == "constant" else 0.0,
    )


def draw(seed: int) -> Config:
    """The seed's random configuration."""
    generator = torch.Generator().manual_seed(10_000 + seed)

    def number(name: str, low: float, high: float) -> float:
        u = torch.rand((), generator=generator, dtype=torch.float64).item()
        return low * (high / low) ** u

    def choice(name: str, among: list[str]) -> str:
        return among[int(torch.randint(len(among), (), generator=generator))]

    return search_space(number, choice)


class Stepping(Contender):
    """One or more torch optimizers, each of its own parameters, perhaps under one schedule."""

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        *optimizers: torch.optim.Optimizer,
        factor: Callable[[int], float] | None = None,
    ) -> None:
        self.workload, self.model, self.optimizers = workload, model, optimizers
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers if factor is not None
        ]

    def step(self, batch: Batch) -> None:
        """Gradient, step, schedule."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.workload.loss(self.model, batch).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        for schedule in self.schedules:
            schedule.step()
        self.gradients += 1


class Fixed(Stepping):
    """AdamW with fixed hyperparameters."""

    def __init__(self, workload: Workload, model: nn.Module, config: Config) -> None:
        self.config = config
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(config.beta1, 0.999),
            weight_decay=config.weight_decay,
        )  # fmt: skip
        super().__init__(
            workload, model, optimizer, factor=lambda t: config.factor(t, workload.steps)
        )

    def ends(self) -> dict[str, float]:
        """The configuration."""
        return asdict(self.config)


def fixed(config: Config) -> Make:
    """AdamW at a configuration."""
    return lambda workload, model, seed: Fixed(workload, model, config)


class ScheduleFree(Stepping):
    """Schedule-Free AdamW: judged at its own average, with BatchNorm statistics of that."""

    averages = True

    def __init__(self, workload: Workload, model: nn.Module, seed: int) -> None:
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(
            model.parameters(), weight_decay=1e-2, warmup_steps=int(WARM_UP * workload.steps)
        )
        optimizer.train()
        super().__init__(workload, model, optimizer)
        self.optimizer = optimizer
        self.batches = workload.batches("train", seed)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Its averaged weights."""
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        kept = [{k: v.clone() for k, v in m.state_dict().items()} for m in norms]
        self.optimizer.eval()
        if norms:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            with torch.no_grad():
                for _ in range(STATISTICS):
                    self.model(next(self.batches)[0])
        try:
            yield
        finally:
            self.optimizer.train()
            for norm, state in zip(norms, kept, strict=True):
                norm.momentum = 0.1
                running = {k: v for k, v in state.items() if k not in ("weight", "bias")}
                norm.load_state_dict(running, strict=False)


def cosine(steps: int, warm_up: float = 0.0) -> Callable[[int], float]:
    """The factor of the learning rate by step: a linear warm-up, then a cosine to 0.

    With W = ⌊warm_up · steps⌋ the factor is (t + 1) / W for t < W, afterwards
    (1 + cos(π (t − W) / (steps − W))) / 2.

    Args:
        steps: Length of the run.
        warm_up: Share of the run.

    Examples:
        >>> [round(cosine(8, warm_up=0.5)(t), 3) for t in (0, 3, 4, 6, 8)]
        [0.25, 1.0, 1.0, 0.5, 0.0]
    """
    rise = int(warm_up * steps)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        # Clamped: an optimizer's scheduler may ask for one step more than the run has.
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / (steps - rise))))

    return factor


def prodigy(workload: Workload, model: nn.Module, seed: int) -> Contender:
    """Prodigy with a cosine, as its authors recommend."""
    from prodigyopt import Prodigy

    optimizer = Prodigy(model.parameters(), weight_decay=1e-2)
    return Stepping(workload, model, optimizer, factor=cosine(workload.steps))


def d_adaptation(workload: Workload, model: nn.Module, seed: int) -> Contender:
    """D-Adaptation of Adam with a cosine."""
    from dadaptation import DAdaptAdam

    optimizer = DAdaptAdam(model.parameters(), weight_decay=1e-2, decouple=True)
    return Stepping(workload, model, optimizer, factor=cosine(workload.steps))


def mechanic(workload: Workload, model: nn.Module, seed: int) -> Contender:
    """Mechanic over AdamW with a cosine."""
    from mechanic_pytorch import mechanize

    optimizer = mechanize(torch.optim.AdamW)(model.parameters(), lr=1.0)
    return Stepping(workload, model, optimizer, factor=cosine(workload.steps))


class AliG(Contender):
    """ALI-G: SGD with momentum at the Polyak step min(η, loss / ‖gradient‖²), without a schedule.

    The cap η = 0.1 and the momentum of 0.9 are its authors'. The step presumes that every training
    loss can reach 0.

    Source: Berrada, Zisserman & Kumar 2020.
    """

    def __init__(self, workload: Workload, model: nn.Module, seed: int) -> None:
        from pytorch_optimizer import AliG as Optimizer

        self.workload, self.model = workload, model
        self.optimizer = Optimizer(model.parameters(), max_lr=0.1, momentum=0.9)

    def step(self, batch: Batch) -> None:
        """Gradient, and the step that needs its loss."""
        self.optimizer.zero_grad()
        loss = self.workload.loss(self.model, batch)
        loss.backward()
        self.optimizer.step(loss.item)
        self.gradients += 1


class UltimateOptimizer(Contender):
    """Gradient descent, the ultimate optimizer: Adam whose rates descend the training loss."""

    def __init__(self, workload: Workload, model: nn.Module, seed: int) -> None:
        from gradient_descent_the_ultimate_optimizer import gdtuo

        self.workload, self.model = workload, model
        self.wrapper = gdtuo.ModuleWrapper(model, optimizer=gdtuo.Adam(optimizer=gdtuo.SGD(1e-5)))
        self.wrapper.initialize()

    def step(self, batch: Batch) -> None:
        """As its documentation has it."""
        self.wrapper.begin()
        loss = self.workload.loss(self.model, batch)
        self.wrapper.zero_grad()
        loss.backward(create_graph=True)
        self.wrapper.step()
        self.gradients += 1


class TruncatedUnroll(Contender):
    """torchopt's AdamW, unrolled over windows: log lr descends the validation loss at their ends.

    What a user of that library would write: one validation batch a window, Adam at 0.05 on log lr.
    """

    def __init__(self, workload: Workload, model: nn.Module, seed: int, window: int = 5) -> None:
        import torchopt

        self.workload, self.model, self.window, self.taken = workload, model, window, 0
        self.log_lr = torch.tensor(math.log(Config.lr), requires_grad=True)
        self.outer = torch.optim.Adam([self.log_lr], lr=0.05)
        self.torchopt, self.validation = torchopt, workload.batches("val", seed + 777)
        self.optimizer = self._adamw()

    def step(self, batch: Batch) -> None:
        """A differentiable weight step; at the end of a window one of log lr."""
        self.optimizer.step(self.workload.loss(self.model, batch))
        self.gradients += 1
        self.taken += 1
        if self.taken % self.window:
            return
        loss = self.workload.loss(self.model, next(self.validation))
        (self.log_lr.grad,) = torch.autograd.grad(loss, [self.log_lr])
        self.gradients += 1
        if self.log_lr.grad.isfinite():
            self.outer.step()
        state = self.torchopt.extract_state_dict(self.optimizer, by="copy", detach_buffers=True)
        self.torchopt.stop_gradient(self.model)
        self.optimizer = self._adamw()
        self.torchopt.recover_state_dict(self.optimizer, state)
        self.torchopt.stop_gradient(self.optimizer)

    def _adamw(self) -> Any:
        # A root of exactly 0 has no derivative.
        return self.torchopt.MetaAdamW(
            self.model, lr=self.log_lr.exp(), weight_decay=1e-2, eps_root=1e-14
        )

    def ends(self) -> dict[str, float]:
        """The learning rate."""
        return {"lr": math.exp(float(self.log_lr.detach()))}


def selftune(start: Config | None = None, **options: Any) -> Make:
    """This library's AdamW, from the defaults or from a start.

    Args:
        start: Where hyperparameters start; the schedule is our own.
        options: Of :class:`~benchmarks.proof.drivers.SelfTuned`.
    """
    if start is not None:
        names = "lr", "beta1", "weight_decay"
        options = {"start": {n: getattr(start, n) for n in names}, **options}
    return partial(SelfTuned, **options)


METHODS: dict[str, Make] = {
    "selftune": selftune(),
    "default": fixed(Config()),
    "prodigy": prodigy,
    "schedule-free": ScheduleFree,
    "d-adaptation": d_adaptation,
    "mechanic": mechanic,
    "ali-g": AliG,
    "ultimate-optimizer": UltimateOptimizer,
    "torchopt": TruncatedUnroll,
}
"""Methods that take one run; searches are in ``searches``."""
