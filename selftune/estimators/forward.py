"""Forward mode with curvature: sensitivities of all weights, propagated through each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from selftune._arguments import COUNT, NONE, SHARE, OneOf, Whole, check
from selftune.estimators._base import AbstractEstimator, Estimate
from selftune.estimators._directions import Bend, Tangent, basis, entries, pushed, still
from selftune.problem import Hparams, Point, Problem
from selftune.update import Update

CURVATURES = ("exact", "gauss-newton", "diagonal", "none")
RECENT = 0.9
"""Memory of the diagonal's running mean: about ten steps."""


class ForwardMemory(NamedTuple):
    """Tangents, and the Hessian's running diagonal if it replaces the Hessian.

    Attributes:
        tangent: Tangents of weights and state along each direction.
        diagonal: Shape (N,), or None.
    """

    tangent: Tangent
    diagonal: Tensor | None


@dataclass(frozen=True)
class Forward(AbstractEstimator):
    """``J₊ = γ (∂U/∂(w,s)) J + ∂U/∂h`` with the Hessian: exact for γ = 1 and exact curvature.

    It needs one Hessian-vector product for each entry of the hyperparameters at each step, and
    memory for as many copies of weights and state. With ``projections`` p it uses p random
    directions ν ∈ {−1, 1}^d instead, for any number of entries d: ``(1/p) Σ (∇L_val · Jν) ν`` is
    unbiased, with a total variance of (d − 1) ‖dL_val/dh‖² / p.

    Args:
        discount: γ; below 1 it damps a recursion that would otherwise diverge.
        curvature: ``"exact"``; ``"gauss-newton"`` (semi-definite, needs ``Problem.split``);
            ``"diagonal"`` (a running mean of ξ ∘ Hξ, one product for each step); ``"none"``.
        projections: Number of random directions, or None for all.
        seed: Seed of the directions.

    Raises:
        ValueError: The discount is outside 0…1, the curvature is unknown, or ``projections`` is
            below 1.

    Source: Franceschi et al. 2017, section 3.2 (RTHO); the projections: Silver et al. 2022;
    the diagonal: Bekas et al. 2007.
    """

    discount: float = 1.0
    curvature: str = "exact"
    projections: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        kinds = {
            "discount": SHARE, "curvature": OneOf(CURVATURES), "projections": COUNT | NONE,
            "seed": Whole(),
        }  # fmt: skip
        check(kinds, vars(self))

    def check(self, update: Update, names: Sequence[str], *, endless: bool = False) -> None:
        """Raise an error for the Gauss-Newton matrix in training runs."""
        if endless and self.curvature == "gauss-newton":
            raise ValueError(
                "Forward(curvature='gauss-newton') is not supported in training runs: "
                "use 'exact' with a discount, or 'diagonal'"
            )

    def init(self, problem: Problem, start: Point, hparams: Hparams) -> ForwardMemory:
        """Zero tangents."""
        moving = basis(hparams) if self.projections is None else self._signs(hparams)
        diagonal = torch.zeros_like(start.params) if self.curvature == "diagonal" else None
        return ForwardMemory(still(start, moving), diagonal)

    def _signs(self, hparams: Hparams) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        assert self.projections is not None

        def signs(h: Tensor) -> Tensor:
            shape = (self.projections, *h.shape)
            return (2 * torch.randint(2, shape, generator=generator, device="cpu") - 1).to(h)

        return {n: signs(h) for n, h in hparams.items()}

    def observe(
        self, problem: Problem, memory: ForwardMemory, point: Point, hparams: Hparams
    ) -> ForwardMemory:
        """Propagate through the step, including curvature."""
        problem.products.prepare(point.params, hparams, point.batch)
        observe = problem.graph("observe", partial(self._observe, problem))
        after: ForwardMemory = observe(memory, point, hparams)
        return after

    def _observe(
        self, problem: Problem, memory: ForwardMemory, point: Point, hparams: Hparams
    ) -> ForwardMemory:
        diagonal = memory.diagonal
        if diagonal is not None:
            diagonal = self._diagonal(problem, diagonal, point, hparams)
        bend = self._bend(problem, point, hparams, diagonal)
        tangent = pushed(problem, memory.tangent, point, hparams, bend, self.discount)
        return ForwardMemory(tangent, diagonal)

    def _bend(
        self, problem: Problem, point: Point, hparams: Hparams, diagonal: Tensor | None
    ) -> Bend:
        if self.curvature == "exact":
            return problem.products.push(point.params, hparams, point.batch)
        mixed = problem.mixed(point, hparams)
        if self.curvature == "none":
            return lambda v, moving: mixed(moving)
        if diagonal is not None:
            return lambda v, moving: diagonal * v + mixed(moving)
        product = problem.gauss_newton(point, hparams)
        return lambda v, moving: product(v) + mixed(moving)

    @staticmethod
    def _diagonal(problem: Problem, mean: Tensor, point: Point, hparams: Hparams) -> Tensor:
        signs = torch.randint_like(mean, 2) * 2 - 1
        zero = {n: torch.zeros_like(h) for n, h in hparams.items()}
        product = problem.products.push(point.params, hparams, point.batch)(signs, zero)
        weight = max(1 - RECENT, 1 / (1 + point.clock.step))
        return torch.lerp(mean, signs * product, weight)

    def estimate(
        self,
        problem: Problem,
        memory: ForwardMemory,
        end: Point,
        hparams: Hparams,
        outer_grads: Tensor,
    ) -> Estimate:
        """``J ∇L_val``."""
        along = memory.tangent.params @ outer_grads
        if self.projections is None:
            return Estimate(entries(along, hparams))
        moving = memory.tangent.moving
        grads = {n: torch.tensordot(along, signs, 1) / len(along) for n, signs in moving.items()}
        d = sum(h.numel() for h in hparams.values())
        return Estimate(grads, (d - 1) * along.square().mean() / len(along))
