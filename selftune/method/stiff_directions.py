"""Deflation of the outer gradient along stiff directions, for hypergradients of penalties.

Without curvature, the sensitivity of the weights to a penalty Ω grows with time, ``J = −τ ∂Ω``,
where τ is η summed over the steps of the run. With curvature, ``J = −(1/τ + H)⁻¹ ∂Ω``: along a
direction of curvature h, J stops growing at τ ≈ 1/h. The outer
gradient is largest along exactly these stiff directions, where a penalty has no effect in the long
run.

Stiff directions are estimated without an extra pass: over a move Δw the training gradient
changes by ``Δg = H Δw``, mostly along stiff directions. With the last Δg as rows of Y, the outer
gradient is deflated to ``g − Yᵀ (Y Yᵀ + D/τ)⁻¹ Y g``, where D is diagonal with entries
``Δg · Δw``. This is the inverse above for ``H = Yᵀ D⁻¹ Y``: it removes components along stiff
directions and keeps those along flat ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selftune._gradient import plainly
from selftune.method.displacement import Reduce
from selftune.method.settings import StiffSettings


class Secants(NamedTuple):
    """The last changes of the training gradient over one part of the weights.

    Attributes:
        changes: Y, shape (pairs, *weights); unused rows are 0.
        last_grads: The gradient at the last tracked step; NaN before the first.
        last_params: The weights there.
    """

    changes: Tensor
    last_grads: Tensor
    last_params: Tensor

    @classmethod
    def begin(cls, params: Tensor, pairs: int, storage: torch.dtype | None = None) -> Secants:
        """The state without pairs; ``storage`` is the dtype of pairs."""
        zeros = params.new_zeros(pairs, *params.shape, dtype=storage or params.dtype)
        return cls(zeros, torch.full_like(params, math.nan), params.clone())

    def forget(self) -> None:
        """Reset in place."""
        self.changes.zero_()
        self.last_grads.fill_(math.nan)


class Stiffness(NamedTuple):
    """State common to all parts of the weights, float64.

    Attributes:
        rises: D, shape (pairs,).
        push: ‖λ ∂Ω‖² of the tuned penalties' gradients, shape (1,).
        time: τ, shape (1,).
        tracked: Tracked steps, shape (1,), int64.
    """

    rises: Tensor
    push: Tensor
    time: Tensor
    tracked: Tensor

    @classmethod
    def begin(cls, pairs: int, device: torch.device) -> Stiffness:
        """The initial state."""
        zeros = torch.zeros(pairs, dtype=torch.float64, device=device)
        one = torch.zeros(1, dtype=torch.float64, device=device)
        return cls(zeros, one, one.clone(), torch.zeros_like(one, dtype=torch.int64))

    def observe(
        self,
        secants: Sequence[Secants],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        pushes: Sequence[Tensor],
        reduce: Reduce,
        taken: Tensor | None = None,
    ) -> Stiffness:
        """Store the change of the gradient if the curvature along the move is positive.

        Along directions of negative curvature sensitivities do not stop growing.

        Args:
            secants: Secants of every part, updated in place.
            params: Weights before the step.
            grads: Gradients of the penalised training loss there.
            masks: Which weights take part; None: all.
            pushes: Gradients of the tuned penalties there.
            reduce: Sums products over processes that hold parts of the weights.
            taken: Whether the step is taken; None: yes.
        """
        slot = self.tracked % len(self.rises)
        changes, products = [], []
        for s, p, g, mask in zip(secants, params, grads, masks, strict=True):
            change, move = g - s.last_grads, p - s.last_params
            if mask is not None:
                change = torch.where(mask, change, 0.0)
            changes.append(change)
            products.append((change * move).sum())
            for kept, now in ((s.last_grads, g), (s.last_params, p)):
                kept.copy_(now if mask is None else torch.where(mask, now, kept))
        squares = torch.stack([push.square().sum() for push in pushes]).sum()
        rise, push = reduce(torch.stack([torch.stack(products).sum(), squares])).double().unbind()
        risen = rise > 0  # false for NaN, at the first step
        rise = torch.where(risen, rise, 0.0).to(self.rises)
        here = torch.arange(len(self.rises), device=slot.device) == slot
        push = push.view(1).to(self.push)
        if taken is not None:
            here, push = here & taken.to(here.device), torch.where(taken, push, self.push)
        for s, change in zip(secants, changes, strict=True):
            kept = torch.where(risen, change, 0.0)
            if taken is None and plainly() and slot.device.type == "cpu":  # one row, not all
                s.changes[int(slot)].copy_(kept)
            else:
                row = here.view(-1, *[1] * change.ndim)
                s.changes.copy_(torch.where(row, kept.to(s.changes.dtype), s.changes))
        return self._replace(
            rises=torch.where(here, rise, self.rises),
            push=push,
            tracked=self.tracked + (1 if taken is None else taken.to(self.tracked)),
        )

    def deflated(
        self,
        grads: Sequence[Tensor],
        secants: Sequence[Secants],
        summed: Sequence[Tensor],
        memories: float | Tensor,
        dependent: float,
        reduce: Reduce,
    ) -> tuple[list[Tensor], Stiffness]:
        """The deflated outer gradient, and the state with τ updated.

        Args:
            grads: The outer gradient, part by part.
            secants: Secants of every part.
            summed: J of the penalties' strengths in log space, summed over penalties.
            memories: Steps since the last call, divided by the memory 1/(1 − γ) of J. τ grows
                by ‖J‖ / ‖push‖ in one memory, so here by ``memories`` times this.
            dependent: As in :class:`StiffSettings`.
            reduce: Sums products over processes that hold parts of the weights.
        """
        square = reduce(torch.stack([a.square().sum() for a in summed]).sum()).view(1)
        recent = (square.to(self.push) / self.push).sqrt().nan_to_num(nan=0.0, posinf=0.0)
        time = self.time + memories * recent
        pull = self.rises / torch.maximum(time, recent)
        left = deflate(grads, [s.changes for s in secants], pull, dependent, reduce)
        return left, self._replace(time=time)

    def rewound(self) -> Stiffness:
        """The state after a rewind; secants of each part are reset separately."""
        return self._replace(
            time=torch.zeros_like(self.time), tracked=torch.zeros_like(self.tracked)
        )


def deflate(
    grads: Sequence[Tensor],
    changes: Sequence[Tensor],
    pull: Tensor,
    dependent: float = StiffSettings.dependent,
    reduce: Reduce = lambda products: products,
) -> list[Tensor]:
    """``g − Yᵀ (Y Yᵀ + P)⁺ Y g``.

    Args:
        grads: g, part by part.
        changes: Y, part by part, shape (pairs, *weights); rows of zeros have no effect.
        pull: The diagonal of P = D/τ, shape (pairs,).
        dependent: As in :class:`StiffSettings`.
        reduce: Sums products over processes that hold parts of the weights.

    Examples:
        >>> import torch
        >>> grads, change = torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 2.0]])
        >>> deflate([grads], [change], torch.tensor([0.0]))
        [tensor([3., 0.])]
        >>> deflate([grads], [change], torch.tensor([4.0]))  # where τ h = ‖Δg‖²/P = 1
        [tensor([3., 2.])]

    Source: the Sherman–Morrison–Woodbury formula; Gur-Ari, Roberts, Dyer 2018 (gradients lie in
    the few sharpest directions); use for hypergradients of penalties: this library.
    """
    rows = [y.reshape(len(y), -1).to(g.dtype) for y, g in zip(changes, grads, strict=True)]
    gram = torch.stack([y @ y.T for y in rows]).sum(0)
    along = torch.stack([y @ g.flatten() for y, g in zip(rows, grads, strict=True)]).sum(0)
    both = reduce(torch.cat([gram, along.unsqueeze(1)], dim=1)).to(pull.device, torch.float64)
    gram, along = both[:, :-1], both[:, -1]
    matrix = gram + pull.double().nan_to_num(nan=0.0).diag()
    sizes = matrix.diagonal()
    unit = torch.where(sizes > 0, sizes.rsqrt(), 0.0)  # changes may differ greatly in length
    shares = unit * _solve(matrix * unit.outer(unit), unit * along, dependent)
    return [g - (shares.to(y) @ y).view_as(g) for y, g in zip(rows, grads, strict=True)]


def _solve(matrix: Tensor, right: Tensor, dependent: float) -> Tensor:
    """Gauss-Jordan elimination of a few rows, skipping dependent ones.

    torch's solvers synchronise with the host on a GPU, which a CUDA graph cannot record. No
    pivoting is needed, because the matrix is positive semi-definite.
    """
    system = torch.cat([matrix, right.unsqueeze(1)], dim=1)
    unit = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    safe = []
    for k in range(len(matrix)):
        pivot = system[k, k]
        safe.append(pivot > dependent)
        row = torch.where(safe[k], system[k] / pivot, 0.0)
        # Row k becomes system[k]/pivot, the others lose their part in column k.
        system = system - (system[:, k] - unit[k]).outer(row)
    return torch.where(torch.stack(safe), system[:, -1], 0.0)
