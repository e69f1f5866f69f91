"""The cosine of each estimator's hypergradient with the exact one: ``compare --part bias``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import selftune as st
from benchmarks.cost.nets import mlp
from selftune.estimators import AbstractEstimator, Exact


def bias(steps: int = 200, every: int = 10) -> dict[str, list[float]]:
    """Cosine of each estimator's hypergradient with the exact one, along a run on digits."""
    from benchmarks.workloads import digits

    (x, y), (vx, vy) = (digits().splits[s] for s in ("train", "val"))
    x, vx = x.double(), vx.double()
    generator = torch.Generator().manual_seed(0)
    picks = [torch.randint(len(x), (64,), generator=generator) for _ in range(steps)]
    batches = [(x[p], y[p]) for p in picks]
    torch.manual_seed(0)
    problem, weights = st.as_problem(
        mlp(64, 32).double(), F.cross_entropy, st.Update(st.rules.SGD())
    )
    start = {"lr": 0.05, "momentum": 0.8, "decay": 1e-3, "weight_decay": 1e-3}
    hparams = {n: torch.tensor(v, dtype=torch.float64) for n, v in start.items()}
    raw = torch.tensor([0.05, 0.16, 1e-3, 1e-3], dtype=torch.float64)  # dh/dz at the start
    compared: dict[str, AbstractEstimator] = {
        "Forward": st.Forward(), "Forward, γ 0.9": st.Forward(0.9),
        "Forward, diagonal": st.Forward(curvature="diagonal"),
        "Forward, Gauss-Newton": st.Forward(curvature="gauss-newton"),
        "Forward, 1 projection": st.Forward(projections=1),
        "Unrolled, 20 steps": st.Unrolled(20), "Unrolled, 5 steps": st.Unrolled(5),
        "Implicit, update, 10 terms": st.Implicit(st.Neumann(terms=10), through="update"),
        "Trace, γ 0.9": st.Trace(0.9), "Trace, γ 1": st.Trace(1.0), "OneStep": st.OneStep(),
    }  # fmt: skip
    exact = Exact()
    point = problem.start(weights, hparams)
    memories = {n: e.init(problem, point, hparams) for n, e in compared.items()}
    whole = exact.init(problem, point, hparams)
    cosines: dict[str, list[float]] = {n: [] for n in compared}
    for step, batch in enumerate(batches):
        point = problem.known(point._replace(batch=batch), hparams)
        for n, e in compared.items():
            memories[n] = e.observe(problem, memories[n], point, hparams)
        whole = exact.observe(problem, whole, point, hparams)
        point = problem.step(point, hparams)
        if (step + 1) % every == 0:
            grads = torch.func.grad(problem.outer_loss)(point.params, (vx, vy))
            vector = _raw(exact, problem, whole, point, hparams, grads, raw)
            for n, e in compared.items():
                found = _raw(e, problem, memories[n], point, hparams, grads, raw)
                cosines[n].append(float(F.cosine_similarity(found, vector, dim=0)))
    return cosines


def _raw(estimator: AbstractEstimator, problem: st.Problem, memory: Any, point: Any,
         hparams: dict[str, Tensor], grads: Tensor, slopes: Tensor) -> Tensor:  # fmt: skip
    found = estimator.estimate(problem, memory, point, hparams, grads).grads
    return torch.stack([found[n] for n in hparams]) * slopes
