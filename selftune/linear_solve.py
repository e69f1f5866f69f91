"""Matrix-free linear systems ``A v = b``, where A is usually a Hessian.

A solver computes a fixed number of products and returns its best iterate with the residual, as
tensors. Iterative solvers never synchronise with the device, so they can be compiled and mapped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune._arguments import COUNT, NONE, Kind, Number, Whole, check

Product = Callable[[Tensor], Tensor]
TOLERANCE: dict[str, Kind] = {"tolerance": Number(least=0)}
"""Valid values of an argument that all solvers have."""


class Solution(NamedTuple):
    """The result of a solver.

    Attributes:
        value: v, shape (N,).
        residual: ‖b − A v‖ / ‖b‖, shape (); with damping, of the damped system.
        iterations: Number of products, excluding that of an initial iterate.
        converged: Whether the residual is within the solver's tolerance, shape ().
        diverged: Whether iterates became worse than v = 0, or A is indefinite although the solver
            needs it positive definite, shape (). ``value`` is never worse than v = 0.
    """

    value: Tensor
    residual: Tensor
    iterations: int
    converged: Tensor
    diverged: Tensor


class AbstractSolver(ABC):
    """Solves ``A v = b`` by products with A.

    Attributes:
        tolerance: The relative residual that counts as converged.
    """

    tolerance: float

    @abstractmethod
    def solve(self, product: Product, rhs: Tensor, start: Tensor | None = None) -> Solution:
        """Solve.

        Args:
            product: v ↦ A v.
            rhs: b, shape (N,).
            start: Initial iterate, which costs one more product; zero if None.
        """

    def _begin(self, product: Product, rhs: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """First iterate, and its residual."""
        if start is None:
            return torch.zeros_like(rhs), rhs
        residual = rhs - product(start)
        head = getattr(self, "head", None)
        better = residual[:head].norm() < rhs.norm()  # a stale start is dropped
        return torch.where(better, start, 0.0), torch.where(better, residual, rhs)

    def _solution(
        self, best: Tensor, residual: Tensor, rhs: Tensor, taken: int, diverged: Tensor
    ) -> Solution:
        tiny = torch.finfo(rhs.dtype).tiny
        share = residual / rhs.norm().clamp_min(tiny)
        converged = share <= self.tolerance  # rounding may look like negative curvature afterwards
        return Solution(best, share, taken, converged, diverged & ~converged)


class AbstractIteration(AbstractSolver):
    """A solver of identical rounds, each a pure function of the state."""

    @property
    @abstractmethod
    def rounds(self) -> int:
        """Number of rounds."""

    @abstractmethod
    def begin(self, product: Product, rhs: Tensor, start: Tensor | None) -> Any:
        """The initial state."""

    @abstractmethod
    def step(self, product: Product, carry: Any) -> Any:
        """One round, with one product."""

    @abstractmethod
    def end(self, carry: Any, rhs: Tensor) -> Solution:
        """The solution of the final state."""

    def solve(self, product: Product, rhs: Tensor, start: Tensor | None = None) -> Solution:
        """Run all rounds."""
        carry = self.begin(product, rhs, start)
        for _ in range(self.rounds):
            carry = self.step(product, carry)
        return self.end(carry, rhs)


class Series(NamedTuple):
    """The state of a Neumann series, which is stopped if it diverges."""

    value: Tensor
    residual: Tensor
    size: Tensor  # of the residual
    largest: Tensor  # ‖A r‖/‖r‖ seen
    bound: Tensor  # largest residual norm before divergence is assumed
    running: Tensor


@dataclass(frozen=True)
class Neumann(AbstractIteration):
    """The Neumann series ``v = η Σ_k (I − η A)ᵏ b``, truncated.

    It converges if all eigenvalues of η A lie between 0 and 2. The next term, divided by η, is
    the residual, so a divergent series is detected and stopped, and its best multiple is returned.

    Args:
        terms: Number of terms.
        scale: η; None for the inverse of the largest ‖A r‖/‖r‖ seen so far.
        tolerance: The relative residual that counts as converged.
        head: Number of leading entries used for the residual; the rest may have other units.

    Source: Lorraine, Vicol & Duvenaud 2020, section 4.
    """

    terms: int = 10
    scale: float | None = None
    tolerance: float = 1e-3
    head: int | None = None

    def __post_init__(self) -> None:
        kinds = {"terms": COUNT, "scale": NONE | Number(above=0), "head": NONE | COUNT}
        check({**kinds, **TOLERANCE}, vars(self))

    @property
    def rounds(self) -> int:
        """One round for each term."""
        return self.terms

    def begin(self, product: Product, rhs: Tensor, start: Tensor | None) -> Series:
        """An empty sum, or the state of ``start``."""
        value, residual = (t.clone() for t in self._begin(product, rhs, start))
        size = residual[: self.head].norm()
        zero, yes = torch.zeros_like(size), torch.ones_like(size, dtype=torch.bool)
        return Series(value, residual, size, zero, 2 * rhs.norm(), yes)

    def step(self, product: Product, carry: Series) -> Series:
        """Add a term."""
        value, residual, size, largest, bound, running = carry
        moved = product(residual)
        if self.scale is None:
            tiny = torch.finfo(residual.dtype).tiny
            largest = torch.maximum(largest, moved.norm() / size.clamp_min(tiny))
            scale = torch.where(largest > 0, 1 / largest.clamp_min(tiny), 0.0)  # no curvature yet
        else:
            scale = torch.full_like(size, self.scale)
        running = running & (size <= bound)
        scale = torch.where(running, scale, 0.0)
        # In place: the vectors may be all that fits beside the model.
        value = value.addcmul_(residual, scale)
        residual = residual.addcmul_(moved, scale, value=-1)
        return Series(value, residual, residual[: self.head].norm(), largest, bound, running)

    def end(self, carry: Series, rhs: Tensor) -> Solution:
        """The sum, or its best multiple if it is worse than 0."""
        value, rhs = carry.value, rhs[: self.head]
        reached = torch.sub(rhs, carry.residual[: self.head])
        factor = (rhs @ reached) / (reached @ reached).clamp_min(torch.finfo(rhs.dtype).tiny)
        factor = torch.where(carry.size <= rhs.norm(), 1.0, factor)
        residual = torch.addcmul(rhs, reached, factor, value=-1).norm()
        value = value.mul_(factor)
        flat = carry.largest == 0 if self.scale is None else torch.zeros_like(carry.running)
        diverged = flat | ~(carry.size <= carry.bound)
        return self._solution(value, residual, rhs, self.terms, diverged)


class Descent(NamedTuple):
    """The state of conjugate gradients."""

    value: Tensor
    residual: Tensor
    direction: Tensor
    square: Tensor  # of the residual
    best: Tensor
    smallest: Tensor  # residual norm, of the best
    running: Tensor
    diverged: Tensor


@dataclass(frozen=True)
class CG(AbstractIteration):
    """Conjugate gradients on ``(A + δ I) v = b``, with A + δ I symmetric positive definite.

    Along a direction of negative curvature the previous iterate is kept and the solution is marked
    ``diverged``: raise the damping δ.

    Args:
        iterations: Number of iterations.
        damping: δ.
        tolerance: The relative residual that counts as converged.

    Source: Hestenes & Stiefel 1952; for hypergradients Pedregosa 2016.
    """

    iterations: int = 10
    damping: float = 0.0
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        check({"iterations": COUNT, "damping": Number(least=0), **TOLERANCE}, vars(self))

    @property
    def rounds(self) -> int:
        """One round for each direction."""
        return self.iterations

    def damped(self, product: Product) -> Product:
        """``v ↦ (A + δ I) v``."""
        return lambda v: product(v) + self.damping * v

    def begin(self, product: Product, rhs: Tensor, start: Tensor | None) -> Descent:
        """The first direction is the residual."""
        value, residual = self._begin(self.damped(product), rhs, start)
        square = residual @ residual
        yes = torch.ones_like(square, dtype=torch.bool)
        return Descent(value, residual, residual, square, value, square.sqrt(), yes, ~yes)

    def step(self, product: Product, carry: Descent) -> Descent:
        """A step along the next conjugate direction."""
        value, residual, direction, square, best, smallest, running, diverged = carry
        tiny = torch.finfo(residual.dtype).tiny
        moved = self.damped(product)(direction)
        curvature = direction @ moved
        running = running & (square > tiny)  # solved exactly: nothing is left to do
        diverged = diverged | (running & ~(curvature > 0))
        running = running & ~diverged
        step = torch.where(running, square / torch.where(running, curvature, 1.0), 0.0)
        value, residual = value + step * direction, residual - step * moved
        after = residual @ residual
        better = running & (after.sqrt() < smallest)
        best = torch.where(better, value, best)
        smallest = torch.where(better, after.sqrt(), smallest)
        direction = residual + after / square.clamp_min(tiny) * direction
        return Descent(value, residual, direction, after, best, smallest, running, diverged)

    def end(self, carry: Descent, rhs: Tensor) -> Solution:
        """The best iterate."""
        return self._solution(carry.best, carry.smallest, rhs, self.iterations, carry.diverged)


@dataclass(frozen=True)
class Nystrom(AbstractSolver):
    """``(A + δ I)⁻¹ b`` with A replaced by its Nyström approximation from some of its columns.

    ``A ≈ C W⁺ Cᵀ``, where C contains the columns of A at r random indices, and W the rows of C at
    these indices. By Woodbury's identity, ``v = b/δ − C (δ W + Cᵀ C)⁺ Cᵀ b / δ``. It needs r
    products and one more for the residual of the damped system, but no scale.

    Args:
        rank: r.
        damping: δ > 0.
        seed: Seed of the random columns.
        tolerance: The relative residual that counts as converged.

    Raises:
        ValueError: The damping is not above 0.

    Source: Hataya & Yamada 2023, eq. 6.
    """

    rank: int = 10
    damping: float = 0.01
    seed: int = 0
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        kinds = {"rank": COUNT, "damping": Number(above=0), "seed": Whole(), **TOLERANCE}
        check(kinds, vars(self))

    def solve(self, product: Product, rhs: Tensor, start: Tensor | None = None) -> Solution:
        """Compute the columns and solve; ``start`` is not used."""
        rank = min(self.rank, rhs.numel())
        generator = torch.Generator().manual_seed(self.seed)
        places = torch.randperm(rhs.numel(), generator=generator, device="cpu")[:rank]
        places = places.to(rhs.device)
        one = torch.zeros_like(rhs)
        columns = torch.stack([product(one.index_fill(0, p, 1.0)) for p in places], dim=1)
        core = columns[places]
        gram = self.damping * (core + core.T) / 2 + columns.T @ columns
        gram = gram.nan_to_num()  # pinv raises an error; the columns carry NaN into the solution
        inner = torch.linalg.pinv(gram, hermitian=True) @ (columns.T @ rhs)
        value = (rhs - columns @ inner) / self.damping
        moved = product(value) + self.damping * value
        # The best multiple: 1 if the rank suffices; otherwise the neglected part is too large.
        factor = (rhs @ moved) / (moved @ moved).clamp_min(torch.finfo(rhs.dtype).tiny)
        residual = (rhs - factor * moved).norm()
        return self._solution(factor * value, residual, rhs, rank + 1, ~(factor > 0))
