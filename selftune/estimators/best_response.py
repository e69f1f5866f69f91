"""A hypernetwork with the hyperparameters as inputs, learned from perturbed steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from selftune._arguments import COUNT, FLAG, NONE, Number, OneOf, check
from selftune._gradient import pulling
from selftune.bijections import AbstractBijection, Log
from selftune.estimators._base import AbstractEstimator, Estimate
from selftune.estimators._structured import Structured, unknown
from selftune.problem import Hparams, Point, Problem
from selftune.rules._base import hoist

CURVATURES = ("exact", "gauss-newton")
LEAST = 0.1
"""Perturbations that a bound cuts to less than this fraction are set to 0."""
FARTHEST = 4.0
"""Largest length of J relative to the weights; above it, J has diverged."""
EVERY = 2
"""Steps between two perturbed steps, by default."""
MOST = 1000
"""Largest number of entries of hyperparameters, the columns of U."""


class Response(NamedTuple):
    """The learned sensitivity of the weights.

    Attributes:
        tensors: Sensitivity of each parameter tensor, in units of raw hyperparameters.
        steps: Number of observed steps, shape (1,).
    """

    tensors: list[Structured]
    steps: Tensor


@dataclass(frozen=True)
class BestResponse(AbstractEstimator):
    """A learned model of the weights as a function of hyperparameters, ``w(z + δ) = w + J δ``.

    Each observed step (one of two) is accompanied by a perturbed step from ``w + J δ`` at
    ``z + δ``, on the same batch and with the same random numbers, and J is fitted to the
    difference::

        J₊ δ  ←  U(w + J δ, ∇L(w + J δ; z + δ), z + δ) − U(w, ∇L(w; z), z)

    This is the recursion of :class:`Forward` along one direction per step, so one additional
    gradient for each observed step serves all hyperparameters: those of the objective, for which J
    converges to the best response ``−H⁻¹ ∂²L/∂w∂z``, and those of the update, for which J is a
    finite-horizon sensitivity. J is structured (``diag(U δ) V`` for a weight matrix, unconstrained
    for vectors). With few hyperparameters it takes about as much memory as the weights.

    Perturbations are finite, so operations without a derivative (dropping a unit, cutting a hole)
    are supported. Random numbers are the same in both steps if they come from :mod:`selftune.nn`.

    Args:
        curvature: ``"exact"`` for the gradient at the perturbed weights, or ``"gauss-newton"`` for
            that of the linearised network as in Δ-STN, which is positive semi-definite and costs
            one more forward pass.
        scale: σ, size of the perturbations in raw (log or log-odds) space.
        update: In :class:`~selftune.Tuner`, whether hyperparameters of the update are inputs of
            the hypernetwork too; otherwise :class:`Trace` estimates them. In optimizers they are.
        every: Steps between two perturbed steps; by default 2, or 1 with ``update=True``.
        discount: Factor of J in each step. With 1, J is the sensitivity over the whole run, but
            mostly noise in noisy runs, because differences of gradients accumulate.

    Raises:
        ValueError: The curvature is unknown, or a number is outside its range.

    Source: MacKay et al. 2019 (STN) and Bae & Grosse 2020 (Δ-STN) for the structure and the
    centred, linearised form.
    """

    curvature: str = "exact"
    scale: float = 0.5
    update: bool = False
    every: int | None = None
    discount: float = 0.99

    def __post_init__(self) -> None:
        kinds = {
            "curvature": OneOf(CURVATURES), "update": FLAG, "scale": Number(above=0, most=2),
            "every": COUNT | NONE, "discount": Number(above=0, most=1),
        }  # fmt: skip
        check(kinds, vars(self))

    def sees(self, step: int, *, last: bool) -> bool:
        """Whether it perturbs a step."""
        every = EVERY if self.every is None and not self.update else self.every or 1
        return step % every == 0

    @property
    def answers_for_update(self) -> bool:
        """Whether the update's hyperparameters are inputs of the hypernetwork too."""
        return self.update

    @property
    def needs_outputs(self) -> bool:
        """True for the Gauss-Newton matrix."""
        return self.curvature == "gauss-newton"

    def init(self, problem: Problem, start: Point, hparams: Hparams) -> Response:
        """Zero sensitivities."""
        count = sum(h.numel() for h in hparams.values())
        if count > MOST:
            raise ValueError(
                f"BestResponse needs {count} columns, one per entry of hparams, above the limit of "
                f"{MOST}: use Implicit, whose memory does not grow with them"
            )
        views = problem.views(start.params)
        step = torch.zeros(1, dtype=torch.int64, device=start.params.device)
        return Response([unknown(v, count) for v in views], step)

    def observe(
        self, problem: Problem, memory: Response, point: Point, hparams: Hparams
    ) -> Response:
        """Learn from one perturbed step."""
        point = problem.known(point, hparams)
        # Three graphs: if torch cannot compile the model, the others stay compiled.
        begin = problem.graph("perturb", partial(self._begun, problem))
        gradient = problem.graph("gradient", partial(self._gradient, problem))
        learn = problem.graph("learn", partial(self._learned, problem))
        near, move, shift = begin(memory, point, hparams)
        grads = gradient(point, shift, near)
        response: Response = learn(memory, point, hparams, (near, move, shift), grads)
        return response

    def _begun(
        self, problem: Problem, memory: Response, point: Point, hparams: Hparams
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The start of the perturbed step."""
        near, move = self._perturbed(problem, hparams, memory.steps)
        return near, move, self.shift(problem, memory, point.params, move)

    def _learned(
        self,
        problem: Problem,
        memory: Response,
        point: Point,
        hparams: Hparams,
        start: tuple[dict[str, Tensor], Tensor, Tensor],
        grads: Tensor,
    ) -> Response:
        """The sensitivity after the perturbed step."""
        near, move, shift = start
        push, jump = self._change(problem, point, (shift, grads), hparams, near)
        jump = self.discount * jump - (1 - self.discount) * shift
        fine = torch.isfinite(push + jump).all()
        push, jump = (torch.where(fine, c, 0.0) for c in (push, jump))
        # The period of the signs must be short compared with the memory of J.
        least = 1 - 1 / (8 * len(move)) if len(move) > 2 else 0.0
        beta = _memory(problem, point, hparams)
        kept = beta.clamp_min(least) if isinstance(beta, Tensor) else max(beta, least)
        learning = zip(memory.tensors, problem.views(push), problem.views(jump), strict=True)
        tensors = [t.learned(p, j, move, kept) for t, p, j in learning]
        size = torch.stack([t.square() for t in tensors]).sum(0).sqrt()
        most = FARTHEST * point.params.norm() / size.clamp_min(torch.finfo(size.dtype).tiny)
        return Response([t.scaled(most.clamp_max(1)) for t in tensors], memory.steps + 1)

    def _perturbed(
        self, problem: Problem, hparams: Hparams, step: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Perturbed hyperparameters, and their distance in raw space."""
        near, moves, first = {}, [], 1
        for name, h in hparams.items():
            low, high, scale = _range(problem, name)
            raw = scale.inverse(h)
            move = self.scale * signs(step, first, h.numel()).to(h.dtype).reshape(h.shape)
            first += h.numel()
            there = scale.forward(raw + move).clamp(low, high)
            moved = scale.inverse(there) - raw
            # A move cut short by a bound consists mostly of rounding errors; from 0, raw −∞, to a
            # lower bound it is infinite.
            far = moved.isfinite() & (moved.abs() > LEAST * self.scale)
            near[name] = torch.where(far, there, h)
            moves.append(torch.where(far, moved, 0.0).reshape(-1))
        return near, torch.cat(moves)

    def _gradient(self, problem: Problem, point: Point, shift: Tensor, near: Hparams) -> Tensor:
        """The gradient at the perturbed weights and hyperparameters."""
        if self.curvature == "exact":
            return problem.products.gradient(point.params + shift, near, point.batch)
        return linearised_gradient(problem, point, shift, near)

    @staticmethod
    def _change(
        problem: Problem,
        point: Point,
        perturbed: tuple[Tensor, Tensor],
        hparams: Hparams,
        near: Hparams,
    ) -> tuple[Tensor, Tensor]:
        """Gradual and immediate difference between perturbed and actual step.

        Both use the rule's state before the step, through which differences of gradients persist.
        """
        (shift, grads), own = perturbed, problem.gradient(point, hparams)
        beside = point._replace(params=point.params + shift)
        penalties = [
            problem.penalties(p.params, h, point.options)
            for p, h in ((point, hparams), (beside, near))
        ]
        more = penalties[1] - penalties[0]
        step = problem.moved(point, own, hparams)[0]
        as_if = problem.moved(point, grads + more, hparams)[0]
        there = problem.moved(beside, own - more, near)[0]
        beta = _memory(problem, point, hparams)
        (lasting,) = hoist((1 - beta ** (point.clock.age + 1)) / (1 - beta))  # 1 + β + … + β^age
        return lasting * (as_if - step), there - step - shift

    def estimate(
        self,
        problem: Problem,
        memory: Response,
        end: Point,
        hparams: Hparams,
        outer_grads: Tensor,
    ) -> Estimate:
        """``Jᵀ ∇L_val``."""
        parts = zip(memory.tensors, problem.views(outer_grads), strict=True)
        raw = torch.stack([t.pull(g) for t, g in parts]).sum(0)
        split = raw.split([h.numel() for h in hparams.values()])
        grads = {}
        for (name, h), part in zip(hparams.items(), split, strict=True):
            grads[name] = part.reshape(h.shape) / _range(problem, name)[2].slope(h)
        return Estimate(grads)

    def shift(self, problem: Problem, memory: Response, params: Tensor, move: Tensor) -> Tensor:
        """J δ, shape (N,), for a move δ of all entries in raw space."""
        parts = zip(memory.tensors, problem.views(params), strict=True)
        return torch.cat([t.along(move, v.shape).reshape(-1) for t, v in parts])


def signs(step: Tensor, first: int, count: int) -> Tensor:
    """Rows of the Walsh matrix at a step, ±1: over a period any two of them are uncorrelated.

    The effects of two hyperparameters are then separated within a period.

    Args:
        step: Shape (1,), int64.
        first: The first row; row 0 is always 1.
        count: Number of rows.
    """
    bits = step & torch.arange(first, first + count, device=step.device)
    for fold in (32, 16, 8, 4, 2, 1):
        bits = bits ^ (bits >> fold)
    return 1 - 2 * (bits & 1)


def linearised_gradient(problem: Problem, point: Point, shift: Tensor, near: Hparams) -> Tensor:
    """``∂f/∂wᵀ ∇criterion(f(w; h) + ∂f/∂w · shift)``, of the network linearised at the weights.

    Args:
        problem: A problem with its loss in two parts.
        point: The weights w, and the batch.
        shift: Displacement of the weights.
        near: The hyperparameters h.

    Source: Bae & Grosse 2020, equation 13.
    """
    if problem.split is None:
        raise ValueError("curvature='gauss-newton' needs Problem(split=(outputs, criterion))")
    outputs, criterion = problem.split
    predict = lambda w: outputs(w, near, point.batch)  # noqa: E731
    out, pull = pulling(predict, point.params)
    there = tree_map(torch.add, out, _along(predict, out, point.params, shift))
    slope = grad(lambda o: criterion(o, near, point.batch))(there)
    return pull(slope)


def _along(predict: Any, out: Any, params: Tensor, shift: Tensor) -> Any:
    """``∂f/∂w · shift``; a finite difference if a layer has no forward mode (LSTM on a CPU)."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return jvp(predict, (params,), (shift,))[1]
    except NotImplementedError:
        step = torch.finfo(params.dtype).eps ** 0.5
        return tree_map(lambda a, b: (a - b) / step, predict(params + step * shift), out)


def _range(problem: Problem, name: str) -> tuple[float, float, AbstractBijection]:
    """Lowest and highest value of a hyperparameter, and its scale."""
    known = problem.scale(name)
    if known is None:
        return 0.0, math.inf, Log()
    return known.lower, known.upper, known.bijection


def _memory(problem: Problem, point: Point, hparams: Hparams) -> Any:
    """β, the rule's momentum of gradients."""
    values = {**problem.values(hparams), **(point.options or {})}
    momenta = (n for n, h in problem.update.hparams.items() if h.role == "momentum")
    return values.get(next(momenta, ""), 0.0)
