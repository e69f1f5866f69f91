"""What an outer gradient says beside the directions in which training has settled already.

A response without curvature lets weights answer to a penalty Ω as long as they are pushed,
``J = −τ ∂Ω``, where τ is the time, in units of the learning rate. In truth the training loss pulls
them back, ``J = −(1/τ + H)⁻¹ ∂Ω``: along a direction of curvature h the answer ends after 1/h. An
outer gradient is longest along just these, and what it says there, of which nothing comes, drowns
what a penalty does in the long run. So τ is that of the whole run up to now, η summed over steps.

Where they lie the run shows for nothing: over moves Δw training gradients change by
``Δg = H Δw``, most along sharp directions. With the last of these changes as rows of Y, the outer
gradient is taken as ``g − Yᵀ (Y Yᵀ + D/τ)⁻¹ Y g``, D the diagonal of ``Δg · Δw``. That is the
inverse above for ``H = Yᵀ D⁻¹ Y``: along sharp directions nothing is left, along flat ones all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune.update import Transition

KEPT = 4
"""How many changes of the training gradient are kept; 0: outer gradients stay as they are."""
MANY = 50
"""Weights there must be for each: of fewer, a few noisy changes would leave nothing."""
ALIKE = 1e-5
"""Below which share of the largest eigenvalue changes count as combinations of the others."""

Total = Callable[[Tensor], Tensor]


class Changes(NamedTuple):
    """The last changes of a part's training gradient, and what the next is taken from.

    Attributes:
        kept: Y, shape (kept, weights); zeros where there is none.
        last_grads: The gradient when the last was noted; not a number before.
        last: The weights there.
    """

    kept: Tensor
    last_grads: Tensor
    last: Tensor

    @classmethod
    def none(cls, params: Tensor) -> Changes:
        """Nothing noted yet."""
        zeros = params.new_zeros(KEPT, len(params))
        return cls(zeros, torch.full_like(params, math.nan), params.clone())

    def note(self, params: Tensor, grads: Tensor, mask: Tensor | None, slot: int) -> Tensor:
        """Keep the change to a gradient, in place of one of before.

        Args:
            params: The weights.
            grads: The gradient there.
            mask: Which weights have one; the others take no part. None: all.
            slot: Which change makes room.

        Returns:
            By how much the slope has risen along the way, Δg · Δw; not a number at first.
        """
        change = torch.sub(grads, self.last_grads, out=self.kept[slot])
        if mask is None:
            rise = -(change @ self.last.sub_(params))
            self.last_grads.copy_(grads)
            self.last.copy_(params)
            return rise
        change.masked_fill_(~mask, 0.0)
        rise = change @ (params - self.last)
        self.last_grads.copy_(torch.where(mask, grads, self.last_grads))
        self.last.copy_(torch.where(mask, params, self.last))
        return rise

    def forget(self) -> None:
        """Start afresh."""
        self.kept.zero_()
        self.last_grads.fill_(math.nan)


class Settled:
    """Where training has settled: what is common to all parts of the weights.

    Attributes:
        slots: How many changes are kept.
        rises: D, shape (kept,), float64.
        push: ‖λ ∂Ω‖², of the tuned penalties' gradients, shape (), float64.
        time: τ, shape (), float64.
    """

    def __init__(self) -> None:
        self.slots = 0
        self.rises = torch.zeros(KEPT, dtype=torch.float64)
        self.push, self.time = (torch.zeros((), dtype=torch.float64) for _ in range(2))

    def lay_out(self, weights: int) -> None:
        """For so many weights in all."""
        self.slots = min(KEPT, weights // MANY)

    def note(
        self,
        changes: Sequence[Changes],
        steps: Sequence[Transition],
        masks: Sequence[Tensor | None],
        names: Sequence[str],
        count: int,
        total: Total,
    ) -> None:
        """Take in how the gradient has changed, if the slope has risen along the way.

        On a ridge, where it falls, no response settles.

        Args:
            changes: Of every part.
            steps: Taken next, with gradients that hold the penalties'.
            masks: Which weights have gradients; None: all.
            names: Of the tuned strengths of penalties.
            count: Of what was noted so far.
            total: Sums products over processes that hold parts of the weights.
        """
        slot = count % self.slots
        triples = zip(changes, steps, masks, strict=True)
        rises = [c.note(s.params, s.grads, mask, slot) for c, s, mask in triples]
        pushes = [
            s.update.penalised(s.params, torch.zeros_like(s.params), s.values, names).square().sum()
            for s in steps
        ]
        both = torch.stack([torch.stack(rises).sum(), torch.stack(pushes).sum()])
        rise, self.push = total(both).double().unbind()
        risen = rise > 0
        self.rises = self.rises.to(rise.device)
        self.rises[slot] = torch.where(risen, rise, 0.0)
        for change in changes:
            change.kept[slot].masked_fill_(~risen, 0.0)

    def beside(
        self,
        outer: Sequence[Tensor],
        changes: Sequence[Changes],
        responses: Sequence[Tensor],
        memories: float,
        total: Total,
    ) -> list[Tensor]:
        """What is left of an outer gradient, part by part.

        Args:
            outer: Its parts, of shape (weights,).
            changes: Of every part.
            responses: J of the penalties' strengths on a log scale, shape (penalties, weights).
            memories: Steps since this was last asked, in units of what J remembers. J is τ of its
                memory times what pushes; τ of the run grows by so many of these.
            total: Sums products over processes that hold parts of the weights.
        """
        squares = [response.sum(0).square().sum() for response in responses]
        square = total(torch.stack(squares).sum()).double()
        recent = (square / self.push.to(square.device)).sqrt().nan_to_num(nan=0.0, posinf=0.0)
        self.time = self.time.to(square.device) + memories * recent
        pull = self.rises.to(square.device) / torch.maximum(self.time, recent)
        return beside(outer, [c.kept for c in changes], pull, total)

    def forget(self) -> None:
        """Start afresh; each part's changes forget for themselves."""
        self.time = torch.zeros_like(self.time)

    def state_dict(self) -> dict[str, Any]:
        """What to save beside the parts' changes."""
        return {n: getattr(self, n).clone() for n in ("rises", "push", "time")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name, value in state.items():
            setattr(self, name, value.clone())


def beside(
    outer: Sequence[Tensor],
    changes: Sequence[Tensor],
    pull: Tensor,
    total: Total = lambda products: products,
) -> list[Tensor]:
    """``g − Yᵀ (Y Yᵀ + P)⁺ Y g``.

    Args:
        outer: g, in parts of shape (weights,).
        changes: Y, in parts of shape (kept, weights); rows of zeros take nothing off.
        pull: The diagonal of P = D/τ, shape (kept,).
        total: Sums products over processes that hold parts of the weights.

    Returns:
        The parts of what is left.

    Examples:
        >>> import torch
        >>> grads, change = torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 2.0]])
        >>> beside([grads], [change], torch.tensor([0.0]))
        [tensor([3., 0.])]
        >>> beside([grads], [change], torch.tensor([4.0]))  # where τ h = ‖Δg‖²/P = 1
        [tensor([3., 2.])]

    Source: the inverse by Sherman, Morrison and Woodbury; Gur-Ari, Roberts, Dyer 2018 (gradients
    lie in the few sharpest directions); for hypergradients of penalties, this library.
    """
    gram = total(torch.stack([y @ y.T for y in changes]).sum(0)).double()
    along = total(torch.stack([y @ g for y, g in zip(changes, outer, strict=True)]).sum(0)).double()
    matrix = gram + pull.nan_to_num(nan=0.0).to(gram).diag()
    sizes = matrix.diagonal()
    unit = torch.where(sizes > 0, sizes.rsqrt(), 0.0)  # changes may differ much in length
    inverse = torch.linalg.pinv(matrix * unit.outer(unit), hermitian=True, rtol=ALIKE)
    shares = unit * (inverse @ (unit * along))
    return [
        torch.addmv(g, y.T, shares.to(g.dtype), alpha=-1)
        for y, g in zip(changes, outer, strict=True)
    ]
