"""What each hypergradient estimator costs, beside plain training and beside other libraries.

Ours is ``Tuner.fit`` as users call it: SGD with momentum, learning rate and weight decay tuned,
a hyperparameter step every 20 weight steps with its validation pass, compiled. Between blocks of
its steps the plain loops (:mod:`benchmarks.cost.plain`) and the other libraries
(:mod:`benchmarks.estimators.peers`) take theirs, so that all are interleaved in one run.

    python -m benchmarks.estimators.compare [--part time|peers|equal|many|bias] [--only Forward]

``many`` holds a weight decay for each of a million weights. ``bias`` needs scikit-learn, and
``peers`` and ``equal`` the libraries themselves. Typical output is kept in
``docs/benchmarks-estimators.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

import selftune as st
from benchmarks.cost import plain
from benchmarks.cost.nets import NETS, Batch, Net, mlp
from benchmarks.estimators.bias import bias
from benchmarks.estimators.peers import CYCLE, DECAY, LR, MOMENTUM, PEERS, SCALE, TERMS
from benchmarks.estimators.tensor_memory import Scale
from benchmarks.fused import TimedLoader, beside, spread
from selftune.estimators import AbstractEstimator

NET = "MLP 784-256-256-10, batch 128"
GOALS = {"OneStep": 1.1, "Trace": 1.3, "Implicit": 2.2, "Unrolled": 3.2, "Forward": 6.0}
MODULES = {
    "higher": "higher", "torchopt": "torchopt", "betty-ml": "betty",
    "gradient-descent-the-ultimate-optimizer": "gradient_descent_the_ultimate_optimizer",
}  # fmt: skip


def estimators() -> dict[str, AbstractEstimator]:
    """What is timed."""
    return {
        "OneStep": st.OneStep(stride=CYCLE),
        "Trace": st.Trace(stride=CYCLE),
        "Implicit": st.Implicit(st.Neumann(terms=TERMS), through="update"),
        "Unrolled": st.Unrolled(horizon=CYCLE),
        "Implicit through the loss": st.Implicit(st.Neumann(terms=TERMS, scale=SCALE)),
        "Implicit through the loss, a term a graph": st.Implicit(
            st.Neumann(terms=TERMS, scale=SCALE), together=1
        ),
        "Unrolled, checkpoint 2": st.Unrolled(horizon=CYCLE, checkpoint=2),
        "Forward": st.Forward(discount=0.95),
    }


def fit(net: Net, name: str, loader: Any, steps: int, device: str, **options: Any) -> None:
    """A self-tuned run by an estimator."""
    torch.manual_seed(0)
    tune = ("weight_decay",) if "through the loss" in name else ("lr", "weight_decay")
    tuner = st.Tuner(
        net.make(), net.loss, rule=st.rules.SGD(), tune=tune, probe=False,
        hparams=plain.OPTIONS["SGD"], estimator=estimators()[name], every=CYCLE, device=device,
        **{"compile": True, "schedule": "constant"} | options,
    )  # fmt: skip
    tuner.fit(loader, net.batches, steps=steps, evaluate_every=steps, progress=False)


def wholes(net: Net) -> Net:
    """The same net with blocks of whole cycles."""
    return Net(make=net.make, loss=net.loss, batches=net.batches, block=2 * CYCLE)


def time_steps(name: str, rounds: int, device: str) -> None:
    """One row of the table of times."""
    net = wholes(NETS[NET]())
    times, best, ours = beside(
        net, "SGD", rounds, device, lambda loader: fit(net, name, loader, loader.steps, device)
    )
    ratio = spread([a / b for a, b in zip(ours, times[best], strict=False)])
    print(
        f"| {name} | {statistics.median(times[best]):.2f} ({best}) "
        f"| {statistics.median(ours):.2f} | {ratio} | {GOALS[name]} |",
        flush=True,
    )


# other libraries


def there() -> list[str]:
    """Names of the libraries that are installed; says which are not."""
    missing = [n for n, module in MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"not installed, and left out: {', '.join(missing)}")
    return [n for n in PEERS if n not in missing]


def compare(peer: str, ours: str, rounds: int) -> None:
    """One row of the table of other libraries: time of a step and memory of a cycle."""
    torch.compiler.reset()
    net = wholes(NETS[NET]())
    batches = [net.batches[i % len(net.batches)] for i in range(CYCLE)]
    scale = Scale()
    theirs = PEERS[peer](net)
    theirs.cycle(batches, net.batches[0])
    scale.mark()
    theirs.cycle(batches, net.batches[0])
    weight = scale.read()
    times: list[float] = []

    def between() -> None:
        start = time.perf_counter()
        for _ in range(net.block // CYCLE):
            theirs.cycle(batches, net.batches[0])
        times.append(1e3 * (time.perf_counter() - start) / net.block)

    loader = TimedLoader(net, rounds, between)
    fit(net, ours, loader, loader.steps, "cpu")

    scale = Scale()

    def weighed() -> Iterator[Batch]:
        for step in range(3 * CYCLE):
            if step == 2 * CYCLE:
                scale.mark()
            yield net.batches[step % len(net.batches)]

    fit(net, ours, weighed(), 3 * CYCLE, "cpu")
    ratios = spread([a / b for a, b in zip(times, loader.taken, strict=False)])
    print(
        f"| {peer} | {ours} | {statistics.median(times):.2f} "
        f"| {statistics.median(loader.taken):.2f} | {ratios} "
        f"| {weight / 1e6:.1f} MB | {scale.read() / 1e6:.1f} MB |",
        flush=True,
    )


def agree(peer: str) -> None:
    """One row of the table of agreement, in float64 from the same weights on the same batches."""
    net = NETS[NET]()
    doubled = [(x.double(), y) for x, y in net.batches]
    theirs = PEERS[peer](net, torch.float64)
    batches, outer = [doubled[i % len(doubled)] for i in range(CYCLE)], doubled[0]
    torch.manual_seed(0)
    options: dict[str, Any] = {"momentum": MOMENTUM}
    implicit = st.Implicit(st.Neumann(terms=TERMS, scale=SCALE))
    ours = {"Unrolled": st.Unrolled(CYCLE), "OneStep": st.OneStep()}
    ours["Implicit through the loss"] = implicit
    hparams = {"lr": LR, "weight_decay": DECAY}
    if peer == "betty-ml":
        options |= {"lr": hparams.pop("lr")}
    if peer.startswith("gradient"):
        del hparams["weight_decay"]
    problem, weights = st.as_problem(
        net.make().double(), net.loss, st.Update(st.rules.SGD()), options=options
    )
    known = {n: torch.tensor(v, dtype=torch.float64) for n, v in hparams.items()}
    found = st.hypergradient(problem, ours[theirs.like], weights, known, batches, outer).grads
    truth = theirs.cycle(batches, outer)
    for n, value in found.items():
        error = abs(float(value) - float(truth[n])) / abs(float(truth[n]))
        print(f"| {peer} | {theirs.like} | {n} | {float(truth[n]):.10g} | {error:.1e} |")


# a million hyperparameters


def many() -> None:
    """Memory of a step with a weight decay for each weight, against a plain step's."""
    torch.manual_seed(0)
    make = lambda: mlp(784, 700)  # noqa: E731
    batches = [(torch.randn(128, 784), torch.randint(10, (128,))) for _ in range(2)]

    def plain_step() -> Callable[[], None]:
        model = make()
        opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)

        def step() -> None:
            opt.zero_grad()
            F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
            opt.step()

        return step

    def tuned_step() -> Callable[[], None]:
        options = {"lr": LR, "momentum": MOMENTUM}
        problem, weights = st.as_problem(
            make(), F.cross_entropy, st.Update(st.rules.SGD()), options=options
        )
        problem = problem.compiled()
        hparams = {"weight_decay": torch.full_like(weights, DECAY)}
        implicit = st.Implicit(st.Neumann(terms=TERMS), together=1)
        held = [problem.start(weights, hparams)]
        del weights

        def step() -> None:
            point = problem.known(held[0]._replace(batch=batches[0]), hparams)
            held[0] = problem.step(point, hparams)
            memory = implicit.observe(
                problem, implicit.init(problem, point, hparams), point, hparams
            )
            del point
            grads = torch.func.grad(problem.outer_loss)(held[0].params, batches[1])
            found = implicit.estimate(problem, memory, held[0], hparams, grads).grads
            hparams["weight_decay"].sub_(1e-6 * found["weight_decay"].sign()).clamp_(min=0)

        return step

    sizes = []
    for start in (plain_step, tuned_step):
        scale = Scale()
        step = start()
        step()
        scale.mark()
        step()
        sizes.append(scale.read())
        del step
    count = sum(p.numel() for p in make().parameters())
    print(f"| {count:,} | {sizes[0] / 1e6:.1f} MB | {sizes[1] / 1e6:.1f} MB "
          f"| {sizes[1] / sizes[0]:.2f} |")  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("time", "peers", "equal", "many", "bias"))
    parser.add_argument("--only", default="", help="part of an estimator's or a library's name")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    if args.part in (None, "time"):
        print("| estimator | best compiled, ms a step | ours, ms | ÷ best compiled (quartiles) "
              "| goal |\n|---|---|---|---|---|")  # fmt: skip
        for name in GOALS:
            if args.only in name:
                time_steps(name, args.rounds, args.device)
    if args.part in (None, "peers"):
        names = there()
        print("\n| library | our estimator | theirs, ms a step | ours, ms "
              "| theirs ÷ ours (quartiles) | memory, theirs | ours |")  # fmt: skip
        print("|---" * 7 + "|")
        for name in names:
            if args.only in name:
                for ours in (n for n in estimators() if n.startswith(PEERS[name].like)):
                    compare(name, ours, args.rounds)
    if args.part in (None, "equal"):
        names = there()
        print(
            "\n| library | our estimator | of | theirs | relative difference |\n" + "|---" * 5 + "|"
        )
        for name in names:
            if args.only in name:
                agree(name)
    if args.part in (None, "many"):
        print("\n| hyperparameters | plain step | with Implicit | ratio |\n|---|---|---|---|")
        many()
    if args.part in (None, "bias"):
        print(
            "\n| estimator | after 10 | 50 | 100 | 200 steps | lowest |\n|---|---|---|---|---|---|"
        )
        for name, line in bias().items():
            shown = [line[0], line[4], line[9], line[19], min(line)]
            print(f"| {name} | " + " | ".join(f"{c:.3f}" for c in shown) + " |", flush=True)


if __name__ == "__main__":
    main()
