"""Rivals at fixed hyperparameters under a linear warm-up and a cosine to 0."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

import selftune as st
from benchmarks.proof.contenders import WARM_UP, Stepping, cosine
from benchmarks.proof.training import Contender, Make
from benchmarks.workloads import Workload

MUON_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LION_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""A tenth of AdamW's, with ten times its weight decay, as Lion's paper advises."""
LION_DECAY = 0.1


class Nadam(NamedTuple):
    """A configuration of NadamW."""

    lr: float
    beta1: float
    weight_decay: float


CALIBRATED = Nadam(lr=1e-2, beta1=0.8, weight_decay=0.3)
"""The one configuration for all workloads, chosen by ``benchmarks.quality.nadamw``."""


def nadamw(config: Nadam = CALIBRATED) -> Make:
    """NadamW with a warm-up over 5 % of the run and a cosine to 0.

    ``torch.optim.NAdam`` with decoupled weight decay; its momentum rises over the run
    (``momentum_decay`` at its default), unlike that of AlgoPerf's own NadamW.

    Source: Dozat 2016; Dahl et al. 2023 (AlgoPerf), whose self-tuning baseline has one
    configuration for all workloads.
    """

    def make(workload: Workload, model: nn.Module, seed: int) -> Contender:
        optimizer = torch.optim.NAdam(
            model.parameters(), lr=config.lr, betas=(config.beta1, 0.999),
            weight_decay=config.weight_decay, decoupled_weight_decay=True,
        )  # fmt: skip
        return Stepping(workload, model, optimizer, factor=cosine(workload.steps, WARM_UP))

    return make


def ademamix(workload: Workload, model: nn.Module, seed: int) -> Contender:
    """AdEMAMix as its authors configure it, with a warm-up over 5 % of the run and a cosine.

    lr 1e-3, β = (0.9, 0.999, 0.9999), α = 8 and weight decay 0.1; α and β₃ rise over the whole run.

    Source: Pagliardini, Ablin & Grangier 2024, arXiv 2409.03137.
    """
    from pytorch_optimizer import AdEMAMix

    optimizer = AdEMAMix(
        model.parameters(), lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=8.0,
        t_alpha_beta3=workload.steps, weight_decay=0.1, weight_decouple=True,
    )  # fmt: skip
    return Stepping(workload, model, optimizer, factor=cosine(workload.steps, WARM_UP))


def muon(rate: float) -> Make:
    """Muon for the hidden matrices and AdamW for the rest, at one rate, with a cosine.

    The matrices are those of :func:`selftune.muon_groups` that have exactly two dimensions:
    ``torch.optim.Muon`` takes no others, so the weights of convolutions belong to AdamW.

    Args:
        rate: Learning rate of both; Muon's updates are scaled to the size of AdamW's
            (``adjust_lr_fn="match_rms_adamw"``).

    Source: Jordan et al. 2024; Liu et al. 2025 for the scale.
    """

    def make(workload: Workload, model: nn.Module, seed: int) -> Contender:
        hidden, _ = st.muon_groups(model)
        matrices = [p for p in hidden["params"] if p.ndim == 2]
        own = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in own]
        return Stepping(
            workload,
            model,
            torch.optim.Muon(matrices, lr=rate, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate),
            factor=cosine(workload.steps),
        )

    return make


def lion(rate: float) -> Make:
    """Lion with a cosine, β = (0.9, 0.99).

    Source: Chen et al. 2023, arXiv 2302.06675.
    """

    def make(workload: Workload, model: nn.Module, seed: int) -> Contender:
        from pytorch_optimizer import Lion

        optimizer = Lion(model.parameters(), lr=rate, weight_decay=LION_DECAY)
        return Stepping(workload, model, optimizer, factor=cosine(workload.steps))

    return make


ANNEALED: dict[str, Make] = {
    "nadamw": nadamw(),
    "ademamix": ademamix,
    **{f"muon {rate:g}": muon(rate) for rate in MUON_RATES},
    **{f"lion {rate:g}": lion(rate) for rate in LION_RATES},
}
"""By the name of their records; of Muon and Lion the best of five rates is compared."""
