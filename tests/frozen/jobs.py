"""Small training jobs in float64, whose trajectories are kept as plain data.

A job is named ``driver/job``. Its trajectory is a dictionary of what was found at some steps.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

STEPS = 160
OPTIMIZER_EVERY, TUNER_EVERY = 20, 40
FILES = {driver: Path(__file__).parent / f"{driver}.json" for driver in ("optimizer", "tuner")}

Batch = tuple[Tensor, Tensor]
Trajectory = dict[str, dict[str, Any]]


# models and data


class Recurrent(nn.Module):
    """A recurrent layer and a linear one on its last output."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.body, self.head = kind(4, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Transformer(nn.Module):
    """One encoder layer, whose outputs are averaged over the sequence.

    Without biases: the gradient of the keys' is a rounding error, which Adam enlarges.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.body = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


class Skipping(nn.Module):
    """A net whose side branch is left out of every second training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 3)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training
        hidden = self.body(x)
        if not self.training or self.passes % 2:
            hidden = hidden + self.side(x)
        return self.head(hidden.tanh())


def mlp(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, outputs))


def cnn() -> nn.Module:
    """Without biases before BatchNorm, whose gradients are rounding errors that Adam enlarges."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


def dropping() -> nn.Module:
    hidden = st.nn.Dropout(0.2, name="hidden")
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), hidden, nn.Linear(32, 3))


@dataclass(frozen=True)
class Task:
    """A model and its data: noisy classes by a random linear map, or its noisy values.

    Args:
        make: Makes the model; weights are drawn from torch's generator.
        shape: Of an input.
        regression: Whether there is one output and a squared error.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (8,)
    regression: bool = False

    def model(self) -> nn.Module:
        return self.make().double()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (F.mse_loss if self.regression else F.cross_entropy)(output, target)

    def batches(self) -> tuple[list[Batch], list[Batch]]:
        """Eight batches for training, four for validation."""
        draw = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        x = draw(256, *self.shape)
        found = x.flatten(1) @ draw(x[0].numel(), 3) / x[0].numel() ** 0.5
        found = found + 0.3 * draw(256, 3)
        y = found[:, :1] if self.regression else found.argmax(1)
        batches = list(zip(x.split(16), y.split(16), strict=True))
        return batches[:8], list(zip(x[128:].split(32), y[128:].split(32), strict=True))


MLP, REGRESSION = Task(mlp), Task(partial(mlp, 1), regression=True)
CNN = Task(cnn, (1, 8, 8))
LSTM, GRU = (Task(partial(Recurrent, kind), (6, 4)) for kind in (nn.LSTM, nn.GRU))
TRANSFORMER = Task(Transformer, (6, 4))
SKIPPING, DROPPING = Task(Skipping), Task(dropping)


# what is kept


def numbers(tensors: Iterable[Tensor]) -> list[float]:
    """Sum, sum of squares, and dot product with a fixed random vector."""
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    generator = torch.Generator().manual_seed(3)
    other = torch.randn(flat.numel(), dtype=torch.float64, generator=generator)
    return [float(flat.sum()), float(flat.square().sum()), float(flat @ other)]


def contents(model: nn.Module) -> dict[str, list[float]]:
    """The numbers of a model's weights and, where it has any, of its buffers."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    found = {"weights": numbers(model.parameters())}
    return found | ({"buffers": numbers(buffers)} if buffers else {})


class Events(logging.Handler):
    """Counts what the library's logger tells: warnings, and returns to the last good weights."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"warnings": 0, "rollbacks": 0}

    def emit(self, record: logging.LogRecord) -> None:
        self.counts["warnings"] += record.levelno >= logging.WARNING
        self.counts["rollbacks"] += "back to the last good weights" in record.getMessage()


@contextmanager
def listening() -> Iterator[Events]:
    """Counts the events within the block."""
    log, events = logging.getLogger("selftune"), Events()
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(events)
    try:
        yield events
    finally:
        log.removeHandler(events)
        log.setLevel(level)


# drivers


@dataclass(frozen=True)
class Loop:
    """A training loop of one's own around an optimizer.

    Args:
        task: Model and data.
        make: Makes the optimizer of a model.
        hyper: Whether ``hyper_step`` is called, after every step.
        training: Whether validation passes are made in training mode.
        drawn: Whether the closure takes another batch each time it is called.
    """

    task: Task
    make: Callable[[Any], Any]
    hyper: bool = True
    training: bool = False
    drawn: bool = False

    def run(self) -> Trajectory:
        model = self.task.model()
        opt = self.make(model)
        train, val = self.task.batches()
        stream, found = cycle(val), {}

        def validate(batch: Batch) -> Tensor:
            x, y = next(stream) if self.drawn else batch
            model.train(self.training)
            loss = self.task.loss(model(x), y)
            model.train()
            return loss

        with listening() as events:
            for step in range(1, STEPS + 1):
                x, y = train[step % len(train)]
                opt.zero_grad()
                self.task.loss(model(x), y).backward()
                opt.step()
                if self.hyper:
                    opt.hyper_step(partial(validate, val[step % len(val)]))
                if step % OPTIMIZER_EVERY == 0:
                    found[str(step)] = {"hparams": dict(opt.hparams), **contents(model)}
                    with opt.averaged():
                        found[str(step)] |= {"averaged": contents(model), **events.counts}
        return found


@dataclass(frozen=True)
class Fit:
    """A run of the tuner.

    Args:
        task: Model and data.
        options: Of ``st.Tuner``.
    """

    task: Task
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Trajectory:
        model = self.task.model()
        tuner = st.Tuner(model, self.task.loss, compile=False, tangents=None, **self.options)
        found: Trajectory = {}

        def keep(progress: Any) -> None:
            found[str(progress.step)] = {
                "hparams": dict(progress.hparams), "scores": dict(progress.scores),
                "train_loss": progress.train_loss, **contents(model), **events.counts,
            }  # fmt: skip

        with listening() as events:
            result = tuner.fit(
                *self.task.batches(), steps=STEPS, evaluate_every=TUNER_EVERY, progress=False,
                callbacks=[keep],
            )  # fmt: skip
        best = [t for t in result.best_weights.values() if t.is_floating_point()]
        found["end"] = {
            "hparams": dict(result.hparams), "best_loss": result.best_loss, "best": numbers(best),
            "rollbacks": len(result.history["rewinds"]),
        }  # fmt: skip
        return found


def two_rates(model: Recurrent) -> st.Adam:
    groups = [
        {"params": model.body.parameters(), "lr": 1e-3},
        {"params": model.head.parameters(), "lr": 3e-3},
    ]
    return st.Adam(groups, weight_decay=1e-3, per="group", total_steps=STEPS)


def penalized(model: nn.Module) -> st.SGD:
    return st.SGD(
        model, lr=0.05, momentum=0.9, weight_decay=1e-4, l1=1e-5,
        tune=("lr", "momentum", "weight_decay", "l1"), total_steps=STEPS,
    )  # fmt: skip


def opaque(model: nn.Module) -> st.SelfTuning:
    inner = torch.optim.NAdam(model.parameters(), weight_decay=1e-3)
    return st.SelfTuning(inner, total_steps=STEPS)


ADAMW = partial(st.AdamW, total_steps=STEPS)
RMSPROP = partial(st.RMSprop, momentum=0.5, per="tensor")
STEADY = partial(ADAMW, probe=False)
"""At the rate that the sweep selects, rounding errors of a transformer grow a hundredfold in twenty
steps."""
FAST = partial(st.SGD, lr=100.0, momentum=0.9, probe=False, total_steps=STEPS)
HIGH = {"lr": 100.0, "momentum": 0.9}
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "l1": 1e-5}

JOBS: dict[str, Loop | Fit] = {
    "optimizer/mlp-adamw": Loop(MLP, ADAMW),
    "optimizer/mlp-sgd": Loop(REGRESSION, penalized, drawn=True),
    "optimizer/cnn-bn-adamw": Loop(CNN, ADAMW, training=True),
    "optimizer/lstm-adam": Loop(LSTM, two_rates),
    "optimizer/transformer-adamw": Loop(TRANSFORMER, STEADY),
    "optimizer/unused-rmsprop": Loop(SKIPPING, RMSPROP),
    "optimizer/opaque": Loop(MLP, opaque),
    "optimizer/alone": Loop(MLP, st.AdamW, hyper=False),
    "optimizer/diverging": Loop(REGRESSION, FAST),
    "tuner/mlp-adamw": Fit(MLP),
    "tuner/mlp-sgd": Fit(REGRESSION, {"rule": st.rules.SGD(), "hparams": SGD}),
    "tuner/cnn-bn": Fit(CNN),
    "tuner/gru": Fit(GRU),
    "tuner/transformer": Fit(TRANSFORMER),
    "tuner/dropout": Fit(DROPPING),
    "tuner/diverging": Fit(REGRESSION, {"rule": st.rules.SGD(), "hparams": HIGH, "probe": False}),
}


def run(name: str) -> Trajectory:
    """The trajectory of a job, on one thread; torch's generator is left as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return JOBS[name].run()
    finally:
        torch.set_num_threads(threads)
