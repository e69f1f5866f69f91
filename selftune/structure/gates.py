"""Gates: one factor per unit or layer, which a penalty can drive to exactly 0."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selftune._arguments import COUNT, FLAG, MODULE, SHARE, Whole, checked
from selftune.penalties import GATE_AXES


class AbstractGated(nn.Module, ABC):
    """A module with gates.

    Attributes:
        gates: The factors g, initially 1. :class:`selftune.penalties.Gates` recognises them by
            their shape, (units, 1, 1, 1, 1, 1).
        mask: 0 for units closed permanently by :class:`Goal`, 1 otherwise; shape (units,).
        batch_dim: The batch dimension of the input.
    """

    gates: nn.Parameter
    mask: Tensor

    @checked(units=COUNT, batch_dim=Whole())
    def __init__(self, units: int, batch_dim: int = 0) -> None:
        super().__init__()
        self.batch_dim = batch_dim
        self.gates = nn.Parameter(torch.ones(units, *GATE_AXES))
        self.register_buffer("mask", torch.ones(units))

    def factors(self) -> Tensor:
        """Gate times mask of each unit, shape (units,)."""
        return self.gates.flatten() * self.mask

    def closed(self, threshold: float = 0.0) -> Tensor:
        """Which gates are closed (|g| ≤ threshold, or masked), a bool tensor of shape (units,)."""
        return self.factors().detach().abs() <= threshold

    @abstractmethod
    def passed(self, input: Tensor, output: Any) -> Tensor | None:
        """The part of the output scaled by the gates; None if gates also act elsewhere."""

    @abstractmethod
    def per_unit(self, values: Tensor) -> Tensor:
        """Sum over all positions of each unit, shape (examples, units)."""


class Gate(AbstractGated):
    """``y = g · x`` with one factor per hidden unit or channel.

    Place it after the activation of the unit, or after the layer or norm that produces it. Gates
    can be trained by any optimizer; :class:`selftune.penalties.Gates` closes some of them, and
    :func:`prune` removes closed units.

    Args:
        units: Number of units.
        dim: Dimension of the units in the input: 1 for channels and for a batch of vectors, −1
            for inputs of shape (batch, …, units), such as sequences.
        batch_dim: The batch dimension, over which saliencies are averaged: 1 if the sequence
            dimension comes first.

    Raises:
        ValueError: The input has a different number of units.

    Examples:
        >>> gate = Gate(3)
        >>> with torch.no_grad():
        ...     gate.gates[1] = 0.0
        >>> gate(torch.ones(1, 3)).tolist()
        [[1.0, 0.0, 1.0]]
    """

    @checked(dim=Whole())
    def __init__(self, units: int, dim: int = 1, batch_dim: int = 0) -> None:
        super().__init__(units, batch_dim)
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Each unit times its gate."""
        if isinstance(input, (tuple, list)):
            raise TypeError(
                f"Gate({len(self.gates)}) got a {type(input).__name__}: pass it one tensor of a "
                "layer's outputs; with_gates adds gates inside nn.LSTM and nn.GRU"
            )
        if not -input.ndim <= self.dim < input.ndim or input.shape[self.dim] != len(self.gates):
            raise ValueError(
                f"Gate({len(self.gates)}, dim={self.dim}) got an input of shape "
                f"{tuple(input.shape)}: its dimension {self.dim} must be the number of units"
            )
        shape = [1] * input.ndim
        shape[self.dim] = len(self.gates)
        factors = self.factors().view(shape)
        # The input's type is that which autocast has chosen.
        return input * (factors.to(input.dtype) if input.is_floating_point() else factors)

    def passed(self, input: Tensor, output: Tensor) -> Tensor:
        """The whole output."""
        return output

    def per_unit(self, values: Tensor) -> Tensor:
        """Sums over all dimensions but the examples' and the units'."""
        units, batch = self.dim % values.ndim, self.batch_dim % values.ndim
        if units == batch:  # without examples
            return values.movedim(units, 0).reshape(values.shape[units], -1).sum(1)[None]
        values = values.movedim((batch, units), (0, 1))
        return values.flatten(2).sum(2) if values.ndim > 2 else values

    def extra_repr(self) -> str:
        """Units, dimension."""
        return f"{len(self.gates)}, dim={self.dim}"


class Optional(AbstractGated):
    """``y = x + g · block(x)``, a block that can be removed, with a single gate.

    Further arguments of a call are passed on to the block.

    Args:
        block: A module whose output has the shape of its first input.
        residual: Whether the block is the branch of a residual connection, which is added here.
            If not, ``y = x + g · (block(x) − x)``: the block alone if the gate is 1, the input if
            it is 0.
        batch_dim: The batch dimension, over which saliencies are averaged.

    Raises:
        ValueError: The output of the block has another shape, or the block changes its input in
            place.

    Examples:
        >>> layer = Optional(torch.nn.Linear(2, 2), residual=False)
        >>> with torch.no_grad():
        ...     layer.gates[0] = 0.0
        >>> layer(torch.ones(1, 2)).tolist()
        [[1.0, 1.0]]
    """

    @checked(block=MODULE, residual=FLAG)
    def __init__(self, block: nn.Module, residual: bool = True, batch_dim: int = 0) -> None:
        super().__init__(1, batch_dim)
        self.block, self.residual = block, residual

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add the output of the block, scaled by the gate, to the input."""
        output = apart("Optional: its block", self.block, input, *args, **kwargs)
        if output.shape != input.shape:
            raise ValueError(
                f"Optional: the block turns shape {tuple(input.shape)} into "
                f"{tuple(output.shape)}; only a block that keeps the shape can be removed"
            )
        gate = self.factors().view(())
        return input + gate * (output if self.residual else output - input)

    def passed(self, input: Tensor, output: Tensor) -> Tensor:
        """The contribution of the block."""
        return output - input

    def per_unit(self, values: Tensor) -> Tensor:
        """Sums over all dimensions but the examples'."""
        return values.movedim(self.batch_dim, 0).flatten(1).sum(1, keepdim=True)

    def extra_repr(self) -> str:
        """Whether the block is a residual branch."""
        return f"residual={self.residual}"


def apart(name: str, module: nn.Module, input: Any, *args: Any, **kwargs: Any) -> Any:
    """The output of a module whose input is used elsewhere, too, and must stay as it is.

    Raises:
        TypeError: The output is not a tensor.
        ValueError: The module changes its input in place.
    """
    # Neither compiled code nor inference mode counts changes.
    counted = not torch.compiler.is_compiling() and isinstance(input, Tensor)
    counted = counted and not input.is_inference()
    before = input._version if counted else 0
    output = module(input, *args, **kwargs)
    if isinstance(output, (tuple, list, dict)):
        raise TypeError(
            f"{name} ({type(module).__name__}) returns a {type(output).__name__}: wrap it in a "
            "module that returns one tensor"
        )
    if counted and input._version > before:
        raise ValueError(
            f"{name} changes its input in place, which is used elsewhere, too: pass inplace=False "
            "to its layers"
        )
    return output


@checked(model=MODULE)
def gated(model: nn.Module) -> Iterator[tuple[str, AbstractGated]]:
    """Names and modules with gates; a shared module is listed once."""
    for name, module in model.named_modules():
        if isinstance(module, AbstractGated):
            yield name, module


@checked(model=MODULE)
def parameter_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights, and gates without weight decay.

    Args:
        model: A model with gates.
        options: Options of the group of gates, such as a separate learning rate.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Gate(8), nn.Linear(8, 1))
        >>> [len(group["params"]) for group in parameter_groups(net)]
        [4, 1]
    """
    gates = [module.gates for _, module in gated(model)]
    gate_ids = {id(g) for g in gates}
    weights = [p for p in model.parameters() if id(p) not in gate_ids]
    return [{"params": weights}, {"params": gates, "weight_decay": 0.0, **options}]


@checked(model=MODULE, threshold=SHARE)
def open_gates(model: nn.Module, threshold: float = 0.0) -> dict[str, tuple[int, int]]:
    """Number of open gates and of all gates, by module.

    Args:
        model: A model with gates.
        threshold: A gate is closed if |g| is not above it.

    Examples:
        >>> open_gates(nn.Sequential(nn.Linear(4, 8), Gate(8)))
        {'1': (8, 8)}
    """
    counts: dict[str, tuple[int, int]] = {}
    for name, module in gated(model):
        closed: Sequence[bool] = module.closed(threshold).tolist()
        counts[name] = (len(closed) - sum(closed), len(closed))
    return counts
