"""Hostile starts: short runs of every shell from where nobody would begin."""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

Data = tuple[Tensor, Tensor]
PLAIN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
    "Lion": None,  # type: ignore[dict-item] - torch has none
}
SHELLS = tuple(PLAIN)
INITS = ("usual", "large", "tiny", "dead")
TOLD = ("validation", "training", "nothing")
AGAIN = 10**6  # added to the seed of the batches of a second plain run


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins.

    Attributes:
        seed: Of everything that is drawn.
        shell: The optimizer.
        table: ``digits`` or ``diabetes``.
        lr: Learning rate.
        options: Further ones.
        batch: Examples in a step.
        scale: Of the loss.
        inputs: Scale of the inputs.
        init: Of the weights.
        steps: Of the run.
        known: Whether the length is given.
        told: Which losses are: ``validation``, ``training`` or ``nothing``.
        split: Seed of the split into training, validation and test examples.
        again: Whether plain training is run a second time, on other batches.
        driver: ``optimizer``, or ``tuner`` for ``st.Tuner``, which always knows the length.
    """

    seed: int
    shell: str
    table: str
    lr: float
    options: dict[str, float]
    batch: int
    scale: float
    inputs: float
    init: str
    steps: int
    known: bool
    told: str
    split: int = 0
    again: bool = False
    driver: str = "optimizer"


@dataclass(frozen=True)
class End:
    """Test losses at the end, without the scale.

    Attributes:
        start: Where it began.
        initial: Before training.
        plain: Of torch's optimizer; NaN where there is none.
        ours: At the averaged weights.
        finite: Whether all weights and hyperparameters are finite.
        live: Share of hidden units that some test example switches on, plain and ours.
        again: Of torch's optimizer on other batches; NaN where it was not asked for.
    """

    start: Start
    initial: float
    plain: float
    ours: float
    finite: bool
    live: tuple[float, float]
    again: float = math.nan


def hostile(count: int, seed: int = 0) -> Iterator[Start]:
    """Starts from everywhere."""
    draw = random.Random(seed)
    for number in range(count):
        shell = SHELLS[number % len(SHELLS)]
        options = {"weight_decay": draw.choice((0.0, 0.0, 1e-4, 1e-2, 1.0))}
        if shell in ("SGD", "RMSprop"):
            options["momentum"] = draw.choice((0.0, 0.9, 0.99))
        yield Start(
            seed=number, shell=shell, table=draw.choice(("digits", "diabetes")),
            lr=10 ** draw.uniform(-8, 4), options=options, batch=draw.choice((1, 4, 32, 256)),
            scale=draw.choice((1.0, 1.0, 1e-4, 1e4)), inputs=draw.choice((1.0, 1.0, 30.0, 1e-2)),
            init=draw.choice((*["usual"] * 3, "large", "tiny", "dead")),
            steps=draw.choice((120, 200, 300)), known=draw.random() < 0.5, told=draw.choice(TOLD),
            again=True,
        )  # fmt: skip


def ordinary(count: int, shell: str = "SGD", driver: str = "optimizer") -> Iterator[Start]:
    """Starts that people use, with which plain training does well.

    Each has a split of its own: the loss over 360 test examples depends on a few of them.
    """
    draw = random.Random(1)
    for number in range(count):
        yield Start(
            seed=number, shell=shell, table="digits",
            lr=draw.choice((0.02, 0.05, 0.1) if shell == "SGD" else (5e-4, 1e-3, 3e-3)),
            options={"momentum": 0.9} if shell == "SGD" else {}, batch=32, scale=1.0, inputs=1.0,
            init="usual", steps=1000, known=number % 2 == 0, told="validation",
            split=number, again=True, driver=driver,
        )  # fmt: skip


def data(start: Start) -> tuple[Data, Data, Data, Callable[..., Tensor]]:
    """Training, validation and test examples, and the loss."""
    made = load_digits() if start.table == "digits" else load_diabetes()
    x, y = torch.tensor(made.data, dtype=torch.float32), torch.tensor(made.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(start.split))
    x, y = x[order], y[order]
    loss: Callable[..., Tensor] = F.cross_entropy
    if start.table == "digits":
        x = x / 16
    else:
        y = ((y - y.mean()) / y.std()).float().unsqueeze(1)
        x, loss = (x - x.mean(0)) / x.std(0), F.mse_loss
    x = x * start.inputs
    a, b = int(0.6 * len(x)), int(0.8 * len(x))
    return (x[:a], y[:a]), (x[a:b], y[a:b]), (x[b:], y[b:]), loss


def network(start: Start, inputs: int, outputs: int) -> nn.Sequential:
    """A net with two hidden layers."""
    torch.manual_seed(start.seed)
    net = nn.Sequential(
        nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs)
    )
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.mul_({"large": 10.0, "tiny": 1e-3}.get(start.init, 1.0))
        if start.init == "dead":
            net[0].bias.fill_(-3.0 * start.inputs)
    return net


def live(net: nn.Sequential, x: Tensor) -> float:
    """Share of hidden units that some example switches on."""
    found = []
    with torch.no_grad():
        for layer in net:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append((x > 0).any(0))
    return float(torch.cat(found).float().mean())


def quiet() -> None:
    """One thread, and no warnings, in a process of its own."""
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def run(start: Start) -> End:
    """All runs from a start."""
    train, val, test, loss_fn = data(start)
    outputs = 10 if start.table == "digits" else 1
    ends, lives, finite, initial = [], [], True, math.nan
    runs = [(False, start.seed), (True, start.seed), *[(False, start.seed + AGAIN)] * start.again]
    for ours, seed in runs:
        net = network(start, train[0].shape[1], outputs)
        if not ours:
            with torch.no_grad():
                initial = float(loss_fn(net(test[0]), test[1]))
            if start.shell == "Lion":
                ends.append(math.nan)
                lives.append(math.nan)
                continue
        shown: Any = torch.no_grad()
        if ours and start.driver == "tuner":
            found = _tune(start, net, train, val, loss_fn, seed)
        else:
            found = _optimizer(start, net, ours=ours)
            _train(start, net, found, train, val, loss_fn, seed, ours=ours)
            shown = found.averaged() if ours else shown
        with shown, torch.no_grad():
            ends.append(float(loss_fn(net(test[0]), test[1])))
            lives.append(live(net, test[0]))
            if ours:
                numbers = [float(v) for v in found.hparams.values()]
                weights = [p.detach() for p in net.parameters()]
                finite = all(map(math.isfinite, numbers)) and all(
                    bool(torch.isfinite(w).all()) for w in weights
                )
    again = ends[2] if start.again else math.nan
    return End(start, initial, ends[0], ends[1], finite, (lives[0], lives[1]), again)


def _optimizer(start: Start, net: nn.Module, *, ours: bool) -> Any:
    options: dict[str, Any] = {"lr": start.lr, **start.options}
    tuning = {"total_steps": start.steps} if start.known else {}
    if not ours:
        return PLAIN[start.shell](net.parameters(), **options)
    if start.shell == "NAdam":
        return st.SelfTuning(torch.optim.NAdam(net.parameters(), **options), **tuning)
    return getattr(st, start.shell)(net, **options, **tuning)


def _draw(some: Data, size: int, draw: torch.Generator) -> Data:
    """A batch of examples, drawn with replacement."""
    index = torch.randint(len(some[0]), (size,), generator=draw)
    return some[0][index], some[1][index]


def _tune(
    start: Start,
    net: nn.Module,
    train: Data,
    val: Data,
    loss_fn: Callable[..., Tensor],
    seed: int,
) -> Any:
    """The result of training by ``st.Tuner``, not compiled."""
    draw = torch.Generator().manual_seed(seed)
    tuner = st.Tuner(
        net, lambda *pair: start.scale * loss_fn(*pair), rule=getattr(st.rules, start.shell)(),
        hparams={"lr": start.lr, **start.options}, compile=False,
    )  # fmt: skip
    batches = (
        [_draw(some, size, draw) for _ in range(start.steps)]
        for some, size in ((train, start.batch), (val, 64))
    )
    return tuner.fit(*batches, steps=start.steps, evaluate_every=start.steps, progress=False)


def _train(
    start: Start,
    net: nn.Module,
    optimizer: Any,
    train: Data,
    val: Data,
    loss_fn: Callable[..., Tensor],
    seed: int,
    *,
    ours: bool,
) -> None:
    draw = torch.Generator().manual_seed(seed)

    for _ in range(start.steps):
        x, y = _draw(train, start.batch, draw)
        xv, yv = _draw(val, 64, draw)
        optimizer.zero_grad()
        loss = start.scale * loss_fn(net(x), y)
        loss.backward()
        optimizer.step()
        if ours and start.told == "validation":
            optimizer.hyper_step(lambda xv=xv, yv=yv: start.scale * loss_fn(net(xv), yv))
        elif ours and start.told == "training":
            optimizer.report(loss)
