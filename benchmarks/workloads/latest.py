"""Latest workloads, of other kinds again; added after the further list had been used."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.workloads._base import Workload
from benchmarks.workloads.classification import label_smoothing, mixture_of_experts, rare_class
from benchmarks.workloads.densities import diffusion, flow
from benchmarks.workloads.dynamics import pendulum
from benchmarks.workloads.regressions import ill_conditioned, poisson
from benchmarks.workloads.representation import contrastive, vector_quantized
from benchmarks.workloads.sequences import elman, modular_addition

LATEST: dict[str, Callable[[], Workload]] = {
    "mixture-of-experts": mixture_of_experts,
    "vector-quantized": vector_quantized,
    "pendulum": pendulum,
    "poisson": poisson,
    "contrastive": contrastive,
    "flow": flow,
    "diffusion": diffusion,
    "ill-conditioned": ill_conditioned,
    "rare-class": rare_class,
    "modular-addition": modular_addition,
    "elman": elman,
    "label-smoothing": label_smoothing,
}
"""The latest workloads, by name."""
