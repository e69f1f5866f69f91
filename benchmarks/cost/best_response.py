"""What best-response hypernetworks cost, and where the runs that they tune end.

    python -m benchmarks.cost.best_response [--part cost|memory] [--only MLP]

Cost: a weight step of a tuned run, one hyperparameter step with its validation pass every five
weight steps included, against the plain eager loop with ``nn.Dropout`` at fixed rates. Loops of
one's own (:mod:`selftune.hypernet`) are eager, and so is what they are held against;
``BestResponse`` is ``Tuner.fit`` as users call it, eager and compiled. All are interleaved in one
run. Typical output is kept in ``docs/benchmarks-estimators.md``.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from benchmarks.cost.nets import Batch, Net
from benchmarks.estimators.tensor_memory import Scale
from benchmarks.fused import TimedLoader, spread

EVERY = 5
Made = Callable[[Callable[[float, str], nn.Module]], nn.Module]


def mlp(drop: Callable[[float, str], nn.Module]) -> nn.Module:
    """784-1200-1200-10 with three rates."""
    return nn.Sequential(
        drop(0.2, "input"), nn.Linear(784, 1200), nn.ReLU(),
        drop(0.5, "first"), nn.Linear(1200, 1200), nn.ReLU(),
        drop(0.5, "second"), nn.Linear(1200, 10),
    )  # fmt: skip


class Words(nn.Module):
    """A language model, LSTM 2 × 200 over 65 characters, with two rates."""

    def __init__(self, drop: Callable[[float, str], nn.Module]) -> None:
        super().__init__()
        self.words, self.first = nn.Embedding(65, 200), drop(0.2, "input")
        self.lstm, self.second = nn.LSTM(200, 200, 2, batch_first=True), drop(0.2, "output")
        self.head = nn.Linear(200, 65)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, 65, time)."""
        seen = self.lstm(self.first(self.words(x)))[0]
        return self.head(self.second(seen)).transpose(1, 2)


def plain_drop(p: float, name: str) -> nn.Module:
    """Dropout of torch."""
    return nn.Dropout(p)


def nets() -> dict[str, tuple[Made, list[Batch], int]]:
    """How each net is made, its batches, and steps in a block."""
    generator = torch.Generator().manual_seed(0)
    images = [
        (torch.randn(128, 784, generator=generator), torch.randint(10, (128,), generator=generator))
        for _ in range(10)
    ]
    words = [torch.randint(65, (32, 36), generator=generator) for _ in range(10)]
    return {
        "MLP 784-1200-1200-10, batch 128": (mlp, images, 10),
        "LSTM 2 × 200, 32 × 35 characters": (Words, [(w[:, :-1], w[:, 1:]) for w in words], 10),
    }


# loops


def plain_loop(make: Made) -> Callable[[Batch], None]:
    """The ordinary loop."""
    torch.manual_seed(0)
    model = make(plain_drop)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def own_loop(make: Made, mode: str, perturb: str) -> Callable[[Batch], None]:
    """A converted model in a loop of one's own, a hyperparameter step at every fifth step."""
    torch.manual_seed(0)
    net = st.hypernet.convert(make(st.nn.Dropout), perturb=perturb)
    optimizer = torch.optim.SGD(net.weights(), lr=0.01, momentum=0.9)
    hyper = torch.optim.Adam(net.hyper_parameters(), lr=0.01)
    taken = 0

    def step(batch: Batch) -> None:
        nonlocal taken
        x, y = batch
        if mode == "stn":
            F.cross_entropy(net(x), y).backward()
        else:
            st.hypernet.delta_backward(net, lambda out: F.cross_entropy(out, y), x)
        optimizer.step()
        optimizer.zero_grad()  # not needed in hyperparameter steps, and as large as the weights
        taken += 1
        if taken % EVERY == 0:
            with net.tuning():
                value = F.cross_entropy(net(x), y) - 1e-3 * net.entropy()
                grads = torch.autograd.grad(value, net.hyper_parameters())
            for param, grad in zip(net.hyper_parameters(), grads, strict=True):
                param.grad = grad
            hyper.step()

    return step


def tuned(make: Made, batches: list[Batch], loader: Any, steps: int, **options: Any) -> None:
    """``Tuner.fit``, the rates alone tuned."""
    torch.manual_seed(0)
    model = make(st.nn.Dropout)
    names = list(st.nn.tunables(model))
    tuner = st.Tuner(
        model, F.cross_entropy, rule=st.rules.SGD(), hparams=dict(lr=0.01, momentum=0.9),
        tune=names, probe=False, every=EVERY, schedule="constant", **options,
    )  # fmt: skip
    tuner.fit(loader, batches, steps=steps, evaluate_every=steps, progress=False)


LOOPS = {
    "stn, one perturbation a batch": ("stn", "batch"),
    "stn, one an example": ("stn", "example"),
    "delta, one perturbation a batch": ("delta", "batch"),
    "delta, one an example": ("delta", "example"),
}
TUNED: dict[str, dict[str, Any]] = {
    "BestResponse, eager": dict(compile=False, estimator=st.BestResponse()),
    "BestResponse, compiled": dict(compile=True, estimator=st.BestResponse()),
    "BestResponse every 1, compiled": dict(compile=True, estimator=st.BestResponse(every=1)),
    "delta (Gauss-Newton), eager": dict(
        compile=False, estimator=st.BestResponse("gauss-newton")
    ),
    "delta (Gauss-Newton), compiled": dict(
        compile=True, estimator=st.BestResponse("gauss-newton")
    ),
    "delta (Gauss-Newton) every 1, compiled": dict(
        compile=True, estimator=st.BestResponse("gauss-newton", every=1)
    ),
}  # fmt: skip


def cost(name: str, rounds: int) -> None:
    """The rows of one net."""
    make, batches, block = nets()[name]
    plain = plain_loop(make)
    loops = {n: own_loop(make, *kind) for n, kind in LOOPS.items() if fits(make, kind[1])}
    times: dict[str, list[float]] = {n: [] for n in ("plain", *loops)}
    for step in (plain, *loops.values()):
        for batch in batches:
            step(batch)

    def block_of(step: Callable[[Batch], None], label: str) -> None:
        start = time.perf_counter()
        for i in range(block):
            step(batches[i % len(batches)])
        times[label].append(1e3 * (time.perf_counter() - start) / block)

    for _ in range(rounds):
        for label, step in {"plain": plain, **loops}.items():
            block_of(step, label)
    for label in loops:
        row(name, label, times["plain"], times[label])
    net = Net(make=lambda: nn.Identity(), loss=F.cross_entropy, batches=batches, block=block)
    for label, options in TUNED.items():
        times["plain"] = []
        loader = TimedLoader(net, rounds, lambda: block_of(plain, "plain"))
        tuned(make, batches, loader, loader.steps, **options)
        row(name, label, times["plain"], loader.taken)


def fits(make: Made, perturb: str) -> bool:
    """Whether a net can be perturbed that way."""
    alone = st.hypernet.convert(make(st.nn.Dropout)).report.per_example
    return alone or perturb == "batch"


def row(net: str, label: str, plain: list[float], ours: list[float]) -> None:
    """One row of the table of costs."""
    ratio = spread([a / b for a, b in zip(ours, plain, strict=False)])
    print(
        f"| {net} | {label} | {statistics.median(plain):.1f} | {statistics.median(ours):.1f} "
        f"| {ratio} |",
        flush=True,
    )


def memory(name: str) -> None:
    """Bytes at the highest level of steps, against the plain loop."""
    make, batches, _ = nets()[name]

    def weighed(make_step: Callable[[], Callable[[Batch], None]]) -> int:
        gc.collect()
        scale = Scale()
        scale.mark()
        step = make_step()
        for batch in batches:
            step(batch)
        return scale.read()

    base = weighed(lambda: plain_loop(make))
    for label, kind in LOOPS.items():
        if fits(make, kind[1]):
            ours = weighed(lambda kind=kind: own_loop(make, *kind))  # type: ignore[misc]
            print(f"| {name} | {label} | {base / 1e6:.1f} MB | {ours / 1e6:.1f} MB "
                  f"| {ours / base:.2f} |", flush=True)  # fmt: skip
    for label, options in TUNED.items():
        gc.collect()
        scale = Scale()
        scale.mark()
        tuned(make, batches, batches, 20, **options)
        ours = scale.read()
        print(f"| {name} | {label} | {base / 1e6:.1f} MB | {ours / 1e6:.1f} MB "
              f"| {ours / base:.2f} |", flush=True)  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("cost", "memory"))
    parser.add_argument("--only", default="", help="part of a net's name")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    names = [n for n in nets() if args.only in n]
    if args.part in (None, "cost"):
        print("| net | method | plain, ms | ours, ms | ratio (quartiles) |\n|---|---|---|---|---|")
        for name in names:
            cost(name, args.rounds)
    if args.part in (None, "memory"):
        print("\n| net | method | plain | ours | ratio |\n|---|---|---|---|---|")
        for name in names:
            memory(name)


if __name__ == "__main__":
    main()
