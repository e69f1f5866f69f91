"""A structured sensitivity Jacobian: a matrix of the weights' shape, scaled row by row.

For a matrix W of shape (out, …), ``J δ = diag(U δ) V``: V has the shape of W and is shared by all
hyperparameters, U has shape (out, hyperparameters). For a vector ``J δ = C δ`` is unconstrained.
With few hyperparameters, J takes about as much memory as the weights.

Source: MacKay et al. 2019, equation 14; Bae & Grosse 2020, section 3.3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHARPEST = 0.2
"""Largest rotation of a row in a step, relative to its length."""


class Structured(NamedTuple):
    """The sensitivity of one parameter tensor.

    Attributes:
        gains: U, shape (out, hyperparameters); or C, shape (numel, hyperparameters), of a vector.
        rows: V, with rows of length 1, shape (out, rest); or of shape (numel, 0) for a vector.
        speed: Momentum of ``gains``, of the same shape.
    """

    gains: Tensor
    rows: Tensor
    speed: Tensor

    @property
    def free(self) -> bool:
        """Whether each entry has its own sensitivity."""
        return self.rows.shape[1] == 0

    def along(self, move: Tensor, shape: torch.Size) -> Tensor:
        """J δ, in the shape of the parameter."""
        gain = self.gains @ move
        return (gain if self.free else gain[:, None] * self.rows).view(shape)

    def pull(self, grads: Tensor) -> Tensor:
        """Jᵀ g, shape (hyperparameters,), for gradients in the shape of the parameter."""
        return self._lengths(grads) @ self.gains

    def _lengths(self, along: Tensor) -> Tensor:
        """The entries of a vector of weights, or its component along each row of V."""
        return along.reshape(-1) if self.free else (self.rows * along.view_as(self.rows)).sum(1)

    def learned(self, push: Tensor, jump: Tensor, move: Tensor, memory: Any) -> Structured:
        """The sensitivity after a step towards ``J δ + push + jump`` along δ.

        A jump changes the gains at once, a push gradually, as gradients change the weights through
        momentum. With one hyperparameter J is then stable if training is; with several, whose δ
        change signs independently, only at lower curvatures. Components orthogonal to a row of V
        rotate the row, by an amount that does not depend on the scale of J.

        Args:
            push: Gradual change of J δ, in the shape of the parameter.
            jump: Immediate change of J δ, likewise.
            move: δ, with entries ±σ.
            memory: Decay of the speed per step: a number, or a tensor of shape ().
        """
        # A zero move (at a bound) is uninformative.
        unit = move / move.square().mean().clamp_min(torch.finfo(move.dtype).tiny)
        speed = memory * self.speed + (1 - memory) * torch.outer(self._lengths(push), unit)
        gains = self.gains + speed + torch.outer(self._lengths(jump), unit)
        if self.free:
            return Structured(gains, self.rows, speed)
        change = push + jump
        lengths = self._lengths(change)
        across = change.view_as(self.rows) - lengths[:, None] * self.rows
        reach = (gains @ move).unsqueeze(1)
        size = gains.square().sum(1, keepdim=True) * move.square().mean()
        turn = reach * across / size.clamp_min(torch.finfo(size.dtype).tiny)
        length = turn.norm(dim=1, keepdim=True)
        turn = turn * (SHARPEST / length.clamp_min(SHARPEST))
        rows = self.rows + turn
        return Structured(gains, rows / rows.norm(dim=1, keepdim=True), speed)

    def square(self) -> Tensor:
        """‖J_k‖² of each hyperparameter, shape (hyperparameters,)."""
        return self.gains.square().sum(0)

    def scaled(self, factor: Tensor) -> Structured:
        """J times a factor for each hyperparameter."""
        return self._replace(gains=self.gains * factor, speed=self.speed * factor)


def unknown(param: Tensor, hparams: int) -> Structured:
    """Zero sensitivities, along random rows from a fixed seed.

    With fewer than two dimensions the sensitivity of a parameter is unconstrained.
    """
    if param.ndim < 2:
        still = param.new_zeros(param.numel(), hparams)
        return Structured(still, param.new_zeros(param.numel(), 0), still.clone())
    generator = torch.Generator().manual_seed(0)  # leaves the global generator unchanged
    shape = (len(param), math.prod(param.shape[1:]))  # a parameter may have no elements
    rows = torch.randn(shape, generator=generator, device="cpu").to(param)
    still = param.new_zeros(len(param), hparams)
    return Structured(still, rows / rows.norm(dim=1, keepdim=True), still.clone())
