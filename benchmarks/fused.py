"""The fused self-tuned step against plain loops: time, memory, and a population.

Ours is ``Tuner.fit`` as users call it, four hyperparameters tuned, from one batch that it takes
from its loader to the next: weight steps, validation passes and hyperparameter steps, reading
back, guard and log included. The loader itself times it: between blocks of steps it lets the
baselines take theirs (:mod:`benchmarks.cost.plain`), so that all are interleaved in one run.

    python -m benchmarks.fused [--part time|compile|memory|population] [--rule SGD|AdamW]
        [--only MLP]

Typical output is kept in ``docs/benchmarks-cost.md``.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import selftune as st
from benchmarks.cost import plain
from benchmarks.cost.nets import NETS, Batch, Net

FOUR = {
    "SGD": ("lr", "decay", "momentum", "weight_decay"),
    "AdamW": ("lr", "decay", "beta1", "weight_decay"),
}


class TimedLoader:
    """Batches for ``fit``, timed in blocks between which something else may run.

    Args:
        net: Where the batches come from.
        rounds: Blocks.
        between: Called after each block.
    """

    def __init__(self, net: Net, rounds: int, between: Callable[[], Any] = lambda: None) -> None:
        self.net, self.between = net, between
        self.warm = 40
        self.steps = self.warm + rounds * net.block
        self.taken: list[float] = []
        self.warmed = 0.0  # seconds, of which graphs take all but a few

    def __iter__(self) -> Iterator[Batch]:
        batches, start = self.net.batches, time.perf_counter()
        for step in range(self.warm):
            yield batches[step % len(batches)]
        self.warmed = time.perf_counter() - start
        while True:
            self.between()
            start = time.perf_counter()
            for step in range(self.net.block):
                yield batches[step % len(batches)]
            synchronize(batches)
            self.taken.append(1e3 * (time.perf_counter() - start) / self.net.block)


def synchronize(batches: list[Batch]) -> None:
    """Wait for the GPU, if there is one in play."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fit(
    net: Net, rule: str, loader: Any, steps: int, device: str, tune: tuple[str, ...],
    evaluate_every: int | None = None, log_dir: Path | None = None, **options: Any,
) -> None:  # fmt: skip
    """A self-tuned run."""
    torch.manual_seed(0)
    tuner = st.Tuner(
        net.make(), net.loss, rule=getattr(st.rules, rule)(), tune=tune, device=device,
        hparams=plain.OPTIONS[rule] | {"decay": 1e-5},
        **{"compile": True, "schedule": "constant", "probe": False} | options,
    )  # fmt: skip
    tuner.fit(
        loader, net.batches, steps=steps, evaluate_every=evaluate_every or steps,
        log_dir=log_dir, progress=False,
    )  # fmt: skip


def spread(ratios: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}…{high:.2f})"


def beside(
    net: Net, rule: str, rounds: int, device: str, ours: Callable[[TimedLoader], None]
) -> tuple[dict[str, list[float]], str, list[float]]:
    """Milliseconds a step of all baselines and of ours, block by block, and the best compiled."""
    torch.compiler.reset()  # torch compiles a function of the baselines' only so many times
    baselines = plain.steps(net, rule, device)
    batches = [tuple(t.to(device) for t in batch) for batch in net.batches]
    times: dict[str, list[float]] = {n: [] for n in baselines}
    for step in baselines.values():
        for batch in batches:
            step(batch)

    def between() -> None:
        for label, step in baselines.items():
            synchronize(batches)
            start = time.perf_counter()
            for i in range(net.block):
                step(batches[i % len(batches)])
            synchronize(batches)
            times[label].append(1e3 * (time.perf_counter() - start) / net.block)

    loader = TimedLoader(net, rounds, between)
    ours(loader)
    middle = {n: statistics.median(t) for n, t in times.items()}
    best = min((n for n in middle if n != "eager"), key=middle.__getitem__)
    return times, best, loader.taken


def time_steps(name: str, rule: str, every: int, rounds: int, device: str) -> None:
    """One row of the table of times."""
    net = NETS[name]()

    def run(loader: TimedLoader) -> None:
        fit(net, rule, loader, loader.steps, device, FOUR[rule], every=every)

    times, best, ours = beside(net, rule, rounds, device, run)
    middle = {n: statistics.median(t) for n, t in times.items()}
    against = [
        spread([a / b for a, b in zip(ours, times[n], strict=False)]) for n in ("eager", best)
    ]
    print(
        f"| {name} | {rule} | {every} | {middle['eager']:.2f} | {middle[best]:.2f} ({best}) "
        f"| {statistics.median(ours):.2f} | {against[0]} | {against[1]} |",
        flush=True,
    )


def time_compiling(name: str, rule: str, rounds: int, device: str) -> None:
    """One row of the table of compiling: the plain step's graph, and our three, nothing cached."""
    net, plainly, ours = NETS[name](), [], []
    for _ in range(rounds):
        with fresh_cache():
            torch.compiler.reset()
            torch.compile(torch.sin)(torch.ones(9))  # what the compiler prepares once a process
            step = plain.steps(net, rule, device)["whole step compiled, launched from C++"]
            start = time.perf_counter()
            step(tuple(t.to(device) for t in net.batches[0]))
            plainly.append(time.perf_counter() - start)
        with fresh_cache():
            torch.compiler.reset()
            loader = TimedLoader(net, 1)
            fit(net, rule, loader, loader.steps, device, FOUR[rule])
            ours.append(loader.warmed)
    ratio = statistics.median(a / b for a, b in zip(ours, plainly, strict=True))
    print(
        f"| {name} | {rule} | {statistics.median(plainly):.0f} | {statistics.median(ours):.0f} "
        f"({min(ours):.0f}…{max(ours):.0f}) | {ratio:.1f} |",
        flush=True,
    )


def alive() -> dict[int, int]:
    """Bytes of all tensors that exist, by storage."""
    # By type: asking any object for its class would wake deprecated ones.
    found = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
    storages = [t.untyped_storage() for t in found]
    return {s.data_ptr(): s.nbytes() for s in storages}


def weigh(rule: str, tune: tuple[str, ...], device: str) -> None:
    """One row of the table of memory: what lives between two steps, after sweep and evaluation."""
    net = NETS["MLP 784-256-256-10, batch 128"]()
    base, sizes = plain.memory(net, rule), []
    with TemporaryDirectory() as folder:
        for log_dir in (Path(folder), None):
            sizes.append(held(net, rule, device, tune, log_dir))
    cells = [f"{size / 1e6:.2f} MB | {size / base:.2f}" for size in sizes]
    print(f"| {rule} | {', '.join(tune)} | {base / 1e6:.2f} MB | {' | '.join(cells)} |", flush=True)


def held(net: Net, rule: str, device: str, tune: tuple[str, ...], log_dir: Path | None) -> int:
    """Bytes between two late steps of a run."""
    sizes: list[int] = []

    def batches() -> Iterator[Batch]:
        for step in range(41):
            if step == 40:
                gc.collect()
                sizes.append(sum(v for k, v in alive().items() if k not in before))
            yield net.batches[0]

    gc.collect()
    before = alive()
    fit(net, rule, batches(), 41, device, tune, 10, log_dir, compile=False, probe=True)
    return sizes[0]


def populate(rule: str, members: int, rounds: int, device: str) -> None:
    """Time of a population's step against a single run's, in alternating runs."""
    net = NETS["MLP 64-128-128-10, batch 64"]()
    ratios, single, alone = [], [], []
    for _ in range(rounds):
        found = []
        for size in (1, members):
            loader = TimedLoader(net, 5)
            fit(net, rule, loader, loader.steps, device, FOUR[rule], population=size)
            found.append(statistics.median(loader.taken))
        single.append(found[0])
        ratios.append(found[1] / found[0])
        alone.append(1.2 * members * products(net) / found[0])
    print(
        f"| {rule} | {members} | {statistics.median(single):.3f} | {spread(ratios)} "
        f"| {spread(alone)} |",
        flush=True,
    )


def products(net: Net) -> float:
    """Milliseconds that one member's products of matrices take, forwards and backwards."""
    weights = [p.detach().t() for p in net.make().parameters() if p.ndim == 2]
    inputs = [torch.randn(len(net.batches[0][0]), len(w)) for w in weights]
    outputs = [x @ w for x, w in zip(inputs, weights, strict=True)]
    taken = []
    for _ in range(300):
        start = time.perf_counter()
        for x, w, y in zip(inputs, weights, outputs, strict=True):
            torch.mm(x, w)
            torch.mm(x.t(), y)
            torch.mm(y, w.t())
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("time", "compile", "memory", "population"))
    parser.add_argument("--rule", choices=tuple(FOUR))
    parser.add_argument("--only", default="", help="part of a net's name")
    parser.add_argument("--every", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    rules = [args.rule] if args.rule else list(FOUR)
    if args.part in (None, "time"):
        print(
            "| net | rule | every | eager, ms a step | best compiled, ms | ours, ms | ÷ eager "
            "(quartiles) | ÷ best compiled (quartiles) |\n|---|---|---|---|---|---|---|---|"
        )
        for name in NETS:
            for rule in rules if args.only in name else []:
                for every in args.every:
                    time_steps(name, rule, every, args.rounds, args.device)
    if args.part == "compile":  # takes long for large networks
        print("| net | rule | plain step, s | ours, s (range) | ratio |\n|---|---|---|---|---|")
        for name in NETS:
            for rule in rules if args.only in name else []:
                time_compiling(name, rule, min(args.rounds, 3), args.device)
    if args.part in (None, "memory"):
        print(
            "\n| rule | tuned | torch | best weights on disk | ratio | in memory | ratio |\n"
            "|---|---|---|---|---|---|---|"
        )
        for rule in rules:
            for tune in (("lr", "weight_decay"), FOUR[rule]):
                weigh(rule, tune, args.device)
    if args.part in (None, "population"):
        print(
            "\n| rule | members | one run, ms a step | population ÷ one run (quartiles) "
            "| their products alone ÷ one run |\n|---|---|---|---|---|"
        )
        for rule in rules:
            populate(rule, 8, 5, args.device)


if __name__ == "__main__":
    main()
