"""A hypernetwork whose inputs are the hyperparameters, learned from what perturbed steps do."""

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

from selftune._arguments import Number, Whole, check
from selftune._gradient import pulling
from selftune.bijections import AbstractBijection, Log
from selftune.estimators._base import AbstractEstimator, Estimate
from selftune.estimators._structured import Structured, unknown
from selftune.problem import Hparams, Point, Problem

CURVATURES = ("exact", "gauss-newton")
LEAST = 0.1
"""Share of a perturbation that a bound must leave of it."""
FARTHEST = 4.0
"""How many times longer than the weights a response may be: beyond, it has blown up."""
MOST = 1000
"""Entries of hyperparameters: U has as many columns."""


class Response(NamedTuple):
    """What is known of how the weights respond.

    Attributes:
        tensors: Of each parameter tensor, in units of raw hyperparameters.
        steps: Observed so far, shape (1,).
    """

    tensors: list[Structured]
    steps: Tensor


@dataclass(frozen=True)
class BestResponse(AbstractEstimator):
    """The weights as a function of the hyperparameters, ``w(z + δ) = w + J δ``, learned.

    At each observed step one perturbed step is taken beside the real one, from ``w + J δ`` at
    ``z + δ``, on the same batch and with the same draws, and J moves towards where it led::

        J₊ δ  ←  U(w + J δ, ∇L(w + J δ; z + δ), z + δ) − U(w, ∇L(w; z), z)

    That is the recursion of :class:`Forward` along one random direction, so that one gradient a
    step serves all hyperparameters together: those of the objective, which at equilibrium gives
    the best response ``−H⁻¹ ∂²L/∂w∂z``, and those of the update, whose response is one of finite
    horizon. J is structured (a matrix ``diag(U δ) V`` for each weight matrix, free for vectors),
    which takes the memory of the weights once more, whatever the number of hyperparameters.

    Perturbations are finite, so that what has no derivative (a dropped unit, a hole that is cut)
    is learned too. Draws are the same where they come from :mod:`selftune.nn`.

    Args:
        curvature: ``"exact"``, the gradient at the perturbed weights; or ``"gauss-newton"``, that
            of the linearised network as in Δ-STN, which is never indefinite and costs a forward
            pass more.
        scale: σ, how far hyperparameters are perturbed in raw (log or odds) space.
        update: In training runs, whether hyperparameters of the update are inputs of the
            hypernetwork too; otherwise :class:`Trace` follows them.
        every: Steps from one that is observed to the next.
        discount: What J keeps of itself in a step. At 1 it is the response of the whole run, and
            in noisy runs mostly noise: differences of gradients add up over steps.

    Raises:
        ValueError: An unknown curvature, or numbers outside their range.

    Source: MacKay et al. 2019 (STN) and Bae & Grosse 2020 (Δ-STN) for the structure and the
    centred, linearised form.
    """

    curvature: str = "exact"
    scale: float = 0.5
    update: bool = False
    every: int = 1
    discount: float = 0.99

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.curvature not in CURVATURES:
            raise ValueError(f"curvature={self.curvature!r} must be one of {CURVATURES}")
        kinds = {
            "scale": Number(above=0, most=2), "every": Whole(least=1),
            "discount": Number(above=0, most=1),
        }  # fmt: skip
        check(kinds, vars(self))

    @property
    def answers_for_update(self) -> bool:
        """Whether the update's hyperparameters are inputs of the hypernetwork too."""
        return self.update

    @property
    def needs_outputs(self) -> bool:
        """The Gauss-Newton matrix does."""
        return self.curvature == "gauss-newton"

    def init(self, problem: Problem, start: Point, hparams: Hparams) -> Response:
        """No response yet."""
        count = sum(h.numel() for h in hparams.values())
        if count > MOST:
            raise ValueError(
                f"BestResponse keeps {count} columns for hparams of as many entries, more than "
                f"{MOST}: use Implicit, whose memory does not grow with them"
            )
        views = problem.views(start.params)
        step = torch.zeros(1, dtype=torch.int64, device=start.params.device)
        return Response([unknown(v, count) for v in views], step)

    def observe(
        self, problem: Problem, memory: Response, point: Point, hparams: Hparams
    ) -> Response:
        """Learn from one perturbed step."""
        if self.every > 1 and int(point.clock.step) % self.every:
            return memory
        point = problem.known(point, hparams)
        # In three graphs: what torch cannot compile of the model leaves the rest compiled.
        begin = problem.graph("perturb", partial(self._begun, problem))
        gradient = problem.graph("gradient", partial(self._gradient, problem))
        learn = problem.graph("learn", partial(self._learned, problem))
        near, move, shift = begin(memory, point, hparams)
        grads = gradient(point, shift, near)
        found: Response = learn(memory, point, hparams, (near, move, shift), grads)
        return found

    def _begun(
        self, problem: Problem, memory: Response, point: Point, hparams: Hparams
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Where the perturbed step starts."""
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
        """The response after what the perturbed step did."""
        near, move, shift = start
        push, jump = self._change(problem, point, (shift, grads), hparams, near)
        jump = self.discount * jump - (1 - self.discount) * shift
        fine = torch.isfinite(push + jump).all()
        push, jump = (torch.where(fine, c, 0.0) for c in (push, jump))
        # A period of the signs must be short against how fast J can swing.
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
        """Hyperparameters near the present ones, and how far that is in raw space."""
        near, moves, first = {}, [], 1
        for name, h in hparams.items():
            low, high, scale = _range(problem, name)
            raw = scale.inverse(h)
            move = self.scale * signs(step, first, h.numel()).to(h.dtype).reshape(h.shape)
            first += h.numel()
            there = scale.forward(raw + move).clamp(low, high)
            moved = scale.inverse(there) - raw
            # Of a move that a bound cuts off there is little but rounding errors to learn from.
            far = moved.abs() > LEAST * self.scale  # false for NaN
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
        """What the perturbed step moves its weights more than the step: in time, and at once.

        The rule's state is that of the step. What gradients differ by goes on to act through it.
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
        lasting = (1 - beta ** (point.clock.age + 1)) / (1 - beta)  # 1 + β + … + β^age
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
        found = {}
        for (name, h), part in zip(hparams.items(), split, strict=True):
            found[name] = part.reshape(h.shape) / _range(problem, name)[2].slope(h)
        return Estimate(found)

    def shift(self, problem: Problem, memory: Response, params: Tensor, move: Tensor) -> Tensor:
        """J δ, shape (N,), for a move δ of all entries in raw space."""
        parts = zip(memory.tensors, problem.views(params), strict=True)
        return torch.cat([t.along(move, v.shape).reshape(-1) for t, v in parts])


def signs(step: Tensor, first: int, count: int) -> Tensor:
    """Rows of the Walsh matrix at a step, ±1: over a period any two of them are uncorrelated.

    What is learned of one hyperparameter then hides nothing of another for longer than a period.

    Args:
        step: Shape (1,), int64.
        first: The first row; row 0 is always 1.
        count: How many.
    """
    bits = step & torch.arange(first, first + count, device=step.device)
    for fold in (32, 16, 8, 4, 2, 1):
        bits = bits ^ (bits >> fold)
    return 1 - 2 * (bits & 1)


def linearised_gradient(problem: Problem, point: Point, shift: Tensor, near: Hparams) -> Tensor:
    """``∂f/∂wᵀ ∇criterion(f(w; h) + ∂f/∂w · shift)``, of the network linearised at the weights.

    Args:
        problem: With its loss in two parts.
        point: The weights w, and the batch.
        shift: Of the weights.
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
    """``∂f/∂w · shift``; a difference where a layer has no forward derivative (LSTM on a CPU)."""
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
    """β, what the rule keeps of a gradient from one step to the next."""
    values = {**problem.values(hparams), **(point.options or {})}
    momenta = (n for n, h in problem.update.hparams.items() if h.role == "momentum")
    return values.get(next(momenta, ""), 0.0)
