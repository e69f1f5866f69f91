"""The robustness table of Clarke et al. (ICLR 2022): one self-tuned run from random starts.

    python -m benchmarks.clarke [--data energy|power|concrete|wine_red|yacht|fashion] [--starts 50]

A one-hidden-layer MLP of 50 ReLU units, SGD with momentum. UCI: the paper's split, validation the
tail of its training part (as many as there are test examples), inputs and targets standardised by
the rest, 4,000 full-batch steps, a hyperparameter step every 10. Fashion-MNIST: 10 epochs in
batches of 50, a sixth of the training images to validate. Starts: log10 lr ~ U(−6, −1),
log10 λ ~ U(−7, −2), momentum ~ U(0, 1). As in the paper no schedule anneals the rate. Printed, for
plain training and a self-tuned run from the same starts: test loss (mean square error in units of
the target; cross-entropy), mean / median over the starts, and the share of hidden units that are
live, that is, positive for some test example. Concrete, Wine and Yacht are not in the paper.
Needs ``SELFTUNE_DATA``.

Source: Clarke, Oldewage, Hernández-Lobato 2022, section 4 and table 1.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from benchmarks.workloads import load_fashion_mnist

Batch = tuple[Tensor, Tensor]
EVERY = 10
UCI = ("energy", "power", "concrete", "wine_red", "yacht")


@dataclass(frozen=True)
class Table:
    """A row of the table: data in three parts, and how long a run is."""

    splits: dict[str, Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    outputs: int
    batch: int | None
    steps: int
    unit: float = 1.0  # of a loss, in those of the paper's table

    def batches(self, split: str, seed: int) -> Iterator[Batch]:
        """Endless batches; the whole split where there is no batch size."""
        x, y = self.splits[split]
        generator = torch.Generator().manual_seed(seed)
        while True:
            if self.batch is None:
                yield x, y
                continue
            order = torch.randperm(len(x), generator=generator)
            for index in order.split(self.batch):
                yield x[index], y[index]


def uci(name: str) -> Table:
    """A UCI set with the paper's split."""
    with np.load(Path(os.environ["SELFTUNE_DATA"]) / "uci" / f"{name}.npz") as data:
        x, y = (torch.tensor(data[k], dtype=torch.float32) for k in ("x", "y"))
        train, test = (torch.tensor(data[f"clarke_{k}_idx"]).long() for k in ("train", "test"))
    y = y.reshape(len(y), -1)
    held = len(test)
    parts = {"train": train[:-held], "val": train[-held:], "test": test}
    own = parts["train"]
    x = (x - x[own].mean(0)) / x[own].std(0).clamp_min(1e-6)
    scale = y[own].std(0)
    y = (y - y[own].mean(0)) / scale
    unit = float(scale.square().mean())
    return Table({k: (x[p], y[p]) for k, p in parts.items()}, F.mse_loss, y.shape[1], None, 4000,
                 unit)  # fmt: skip


def fashion() -> Table:
    """Fashion-MNIST: 50,000 images to train, 10,000 to validate and to test."""
    x, y, test_x, test_y = load_fashion_mnist()
    x, test_x = x.flatten(1), test_x.flatten(1)
    splits = {"train": (x[:50_000], y[:50_000]), "val": (x[50_000:], y[50_000:]),
              "test": (test_x, test_y)}  # fmt: skip
    return Table(splits, F.cross_entropy, 10, 50, 10_000)


@dataclass(frozen=True)
class Start:
    """Where a run starts."""

    lr: float
    weight_decay: float
    momentum: float

    @classmethod
    def draw(cls, seed: int) -> Start:
        """A seed's start."""
        u = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return cls(10 ** float(5 * u[0] - 6), 10 ** float(5 * u[1] - 7), float(u[2]))


class End(NamedTuple):
    """The end of a run.

    Attributes:
        loss: Test loss; infinite if it is not finite.
        live: Share of hidden units that are positive for some test example.
    """

    loss: float
    live: float


def run(table: Table, seed: int, tuned: bool) -> End:
    """The end of a run: at the last weights, or, tuned, at their average."""
    torch.manual_seed(seed)
    features = table.splits["train"][0].shape[1]
    net = nn.Sequential(nn.Linear(features, 50), nn.ReLU(), nn.Linear(50, table.outputs))
    start = Start.draw(seed)
    options = dict(lr=start.lr, weight_decay=start.weight_decay, momentum=start.momentum)
    batches = itertools.islice(table.batches("train", seed), table.steps)
    if not tuned:
        plain = torch.optim.SGD(net.parameters(), **options)
        for x, y in batches:
            plain.zero_grad()
            table.loss(net(x), y).backward()
            plain.step()
        return _test(table, net)
    opt = st.SGD(net, total_steps=table.steps, schedule="constant", every=EVERY, **options)
    held = table.batches("val", seed + 1000)
    for x, y in batches:
        opt.zero_grad()
        table.loss(net(x), y).backward()
        opt.step()
        opt.hyper_step(lambda: _validation(table, net, held))
    with opt.averaged():
        return _test(table, net)


def _validation(table: Table, net: nn.Module, held: Iterator[Batch]) -> Tensor:
    x, y = next(held)
    return table.loss(net(x), y)


@torch.no_grad()
def _test(table: Table, net: nn.Sequential) -> End:
    x, y = table.splits["test"]
    value = float(table.loss(net(x), y)) * table.unit
    live = (net[:2](x) > 0).any(0).float().mean()
    return End(value if math.isfinite(value) else math.inf, float(live))


def row(data: str, label: str, ends: Sequence[End], seconds: float) -> str:
    """A row of the table."""
    losses = [e.loss for e in ends]
    finite, live = [x for x in losses if math.isfinite(x)], [e.live for e in ends]
    middle, worst = statistics.median(losses), max(finite)
    return (
        f"| {data} | {label} | {statistics.mean(finite):.4g} | {middle:.4g} "
        f"| worst {worst:.4g}, {worst / middle:.2f} times the median, "
        f"not finite {len(losses) - len(finite)} of {len(losses)} "
        f"| live units {statistics.mean(live):.2f}, fewest {min(live):.2f} "
        f"| {seconds / len(ends):.1f} s a run |"
    )


def main() -> None:
    """Print the rows of a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="energy", choices=(*UCI, "fashion"))
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--each", action="store_true", help="print every start")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    table = fashion() if args.data == "fashion" else uci(args.data)
    found: dict[str, list[End]] = {}
    for label, tuned in (("no tuning", False), ("selftune", True)):
        begun, found[label] = time.perf_counter(), []
        for seed in range(args.starts):
            found[label].append(run(table, seed, tuned))
            if args.each:
                print(label, seed, Start.draw(seed), found[label][-1], flush=True)
        print(row(args.data, label, found[label], time.perf_counter() - begun), flush=True)
    pairs = list(zip(found["selftune"], found["no tuning"], strict=True))
    fewer = [ours for ours, plain in pairs if ours.live < plain.live]
    worse = sum(ours.loss > 1.1 * plain.loss for ours, plain in pairs)
    print(
        f"of {len(pairs)} starts, fewer live units than without tuning: {len(fewer)}; "
        f"test loss higher by more than 10 %: {worse}"
    )


if __name__ == "__main__":
    main()
