"""Draws the pictures of docs/how-to-choose.md and docs/when-it-fails.md into docs/img.

    python -m benchmarks.estimators.plots [--only bias horizon chaos overfit]

Takes about three minutes in all; needs matplotlib and scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn import functional as F

import selftune as st
from benchmarks.cost.nets import mlp
from benchmarks.estimators.bias import bias as cosines
from benchmarks.workloads import digits

FOLDER = Path(__file__).parents[2] / "docs" / "img"
F64 = torch.float64


def save(name: str) -> None:
    """Write the current figure."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    plt.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(FOLDER / f"{name}.png", dpi=110)
    plt.close()
    print(f"docs/img/{name}.png", flush=True)


def bias() -> None:
    """Cosine of each estimator's hypergradient with the exact one along a run."""
    plt.figure(figsize=(6.4, 3.6))
    plt.gca().set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for name, line in cosines().items():
        plt.plot(range(10, 201, 10), line, label=name, lw=1.3)
    plt.axhline(0, color="grey", lw=0.6)
    plt.xlabel("weight steps")
    plt.ylabel("cosine with the exact hypergradient")
    save("bias")


def quadratic(noise: float = 1.0, size: int = 50) -> tuple[st.Problem, Tensor, list[Tensor]]:
    """Descent on Σ aᵢ wᵢ² / 2, curvatures 0.01…1, with noise in the gradients."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-2, 0, size, dtype=F64)
    problem = st.Problem(
        update=st.Update(st.rules.SGD()),
        inner_loss=lambda w, h, batch: (curvature * w**2).sum() / 2 + w @ batch,
        outer_loss=lambda w, batch: (curvature * w**2).sum() / 2,
    )
    draws = noise * torch.randn(200, size, generator=generator, dtype=F64) * curvature.sqrt()
    return problem, 3 * torch.ones(size, dtype=F64), list(draws)


def horizon() -> None:
    """The slope in log lr that each horizon sees at the end of 200 steps, for many rates."""
    problem, start, noise = quadratic()
    rates = torch.logspace(-2, 0, 25, dtype=F64)
    plt.figure(figsize=(6.4, 3.6))
    for steps in (1, 5, 20, 200):
        slopes = []
        for rate in rates:
            hparams = {"lr": rate}
            found = st.hypergradient(problem, st.Unrolled(steps), start, hparams, noise, None)
            slopes.append(float(found.grads["lr"] * rate))
        scale = max(abs(s) for s in slopes)
        plt.plot(rates, [s / scale for s in slopes], label=f"last {steps} steps", lw=1.3)
    losses = [
        float(problem.outer_loss(problem.run(start, {"lr": r}, noise).params, None)) for r in rates
    ]
    best = rates[min(range(len(rates)), key=losses.__getitem__)]
    plt.axvline(float(best), color="black", ls=":", label="best rate for 200 steps")
    plt.axhline(0, color="grey", lw=0.6)
    plt.xscale("log")
    plt.xlabel("learning rate")
    plt.ylabel("hypergradient in log lr, scaled\n(below 0: raise it)")
    save("horizon")


def chaos() -> None:
    """The validation loss after 100 steps as a function of the learning rate, and its slope."""
    (x, y), (vx, vy) = (digits().splits[s] for s in ("train", "val"))
    generator = torch.Generator().manual_seed(0)
    batches = [(x[p].double(), y[p]) for p in torch.randint(len(x), (100, 64), generator=generator)]
    torch.manual_seed(0)
    problem, weights = st.as_problem(
        mlp(64, 32).double(), F.cross_entropy, st.Update(st.rules.SGD()), options={"momentum": 0.9}
    )
    rates = torch.logspace(-2, 0.3, 60, dtype=F64)
    losses, slopes = [], []
    for rate in rates:
        args = (weights, {"lr": rate}, batches, (vx.double(), vy))
        found = st.hypergradient(problem, st.Unrolled(), *args)
        end = problem.run(weights, {"lr": rate}, batches).params
        losses.append(float(problem.outer_loss(end, (vx.double(), vy))))
        slopes.append(abs(float(found.grads["lr"] * rate)))
    plt.figure(figsize=(6.4, 3.6))
    plt.loglog(rates, losses, label="validation loss after 100 steps", lw=1.3)
    plt.loglog(rates, slopes, label="|exact hypergradient| in log lr", lw=1.0)
    plt.xlabel("learning rate")
    save("chaos")


def overfit() -> None:
    """A weight decay for each weight, tuned on 30 and on 400 validation examples."""
    splits = {n: (x.double(), y) for n, (x, y) in digits().splits.items()}
    (x, y), (tx, ty) = splits["train"], splits["test"]
    plt.figure(figsize=(6.4, 3.6))
    for count, colour in ((30, "C1"), (400, "C0")):
        vx, vy = (t[:count] for t in splits["val"])
        torch.manual_seed(0)
        problem, weights = st.as_problem(
            mlp(64, 32).double(), F.cross_entropy, st.Update(st.rules.SGD()),
            options={"lr": 0.1, "momentum": 0.9},
        )  # fmt: skip
        raw = torch.full_like(weights, -7.0)
        implicit, point = st.Implicit(st.CG(10, damping=0.01)), problem.start(weights, {})
        lines: dict[str, list[float]] = {"validation": [], "test": []}
        for step in range(600):
            hparams = {"weight_decay": raw.exp()}
            pick = torch.randint(len(x), (200,))
            point = problem.known(point._replace(batch=(x[pick], y[pick])), hparams)
            memory = implicit.init(problem, point, hparams)
            memory = implicit.observe(problem, memory, point, hparams)
            point = problem.step(point, hparams)
            if step % 5 == 4:
                grads = torch.func.grad(problem.outer_loss)(point.params, (vx, vy))
                found = implicit.estimate(problem, memory, point, hparams, grads)
                raw = (raw - 0.3 * found.grads["weight_decay"].sign()).clamp(-12, 0)
                lines["validation"].append(float(problem.outer_loss(point.params, (vx, vy))))
                lines["test"].append(float(problem.outer_loss(point.params, (tx, ty))))
        for name, line in lines.items():
            style = "-" if name == "test" else "--"
            label = f"{name} loss, {count} validation examples"
            plt.plot(range(5, 601, 5), line, style, color=colour, label=label, lw=1.3)
    plt.yscale("log")
    plt.xlabel("weight steps")
    save("overfit")


PICTURES = {"bias": bias, "horizon": horizon, "chaos": chaos, "overfit": overfit}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    mpl.use("agg")
    torch.set_num_threads(1)
    for name in parser.parse_args().only:
        PICTURES[name]()
