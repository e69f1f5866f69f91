"""Base classes of layers and losses with a tuned strength, and their random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selftune._arguments import MODULE, TEXT, check, checked
from selftune.bijections import Log, Logit
from selftune.hparams import Hparam

STRENGTH = "strength"
MASK = 0xFFFFFFFF
SPREAD, MIX = -1640531527, 0x45D9F3B
"""2³² over the golden ratio, and a multiplier of the hash."""
APART = 2**24
"""Distance between the random-number counters of two processes."""


def fraction(name: str, start: float = 0.05) -> Hparam:
    """The hyperparameter of a rate, or of a strength below 1; ``start`` replaces a tuned 0."""
    return Hparam(name=name, bijection=Logit(), lower=1e-3, upper=0.95, from_zero=start)


def amount(name: str) -> Hparam:
    """The hyperparameter of a strength in units of the input."""
    return Hparam(name=name, bijection=Log(), lower=1e-3, upper=10.0, from_zero=0.05)


class Tunable(nn.Module):
    """A module with one tuned strength, stored in a buffer.

    In evaluation mode the strength has no effect.

    Args:
        value: The initial strength.
        hparam: Name, scale and bounds. Modules with the same name share one strength.

    Attributes:
        argument: What subclasses call the initial strength, in messages.
        strength: Shape (1,), or (batch,) with one strength for each example.

    Raises:
        ValueError: The value is outside the bounds; 0 is always allowed.
    """

    argument: ClassVar[str] = "value"
    strength: Tensor

    def __init__(self, value: float, hparam: Hparam) -> None:
        super().__init__()
        check({"name": TEXT}, {"name": hparam.name})
        hparam.check(f"{type(self).__name__}(name={hparam.name!r}): {self.argument}", value)
        self.hparam = hparam
        self.register_buffer(STRENGTH, torch.full((1,), float(value)))

    def level(self, like: Tensor) -> Tensor:
        """The strength, shaped to be multiplied with a batch.

        Raises:
            TypeError: The batch is not of a floating-point type.
        """
        self.check_floating(like)
        level = self.strength.to(like.dtype)
        return level.view(-1, *[1] * (like.ndim - 1)) if like.ndim else level.mean()

    def check_floating(self, input: Tensor) -> None:
        """Refuse integers, in which most strengths would be rounded to 0."""
        if not (input.is_floating_point() or input.is_complex()):
            raise TypeError(
                f"{type(self).__name__}(name={self.hparam.name!r}) got an input of {input.dtype}: "
                "convert it to a floating-point type, as input.float()"
            )

    def extra_repr(self) -> str:
        """Strength and name."""
        shown = f"{float(self.strength):.3g}" if self.strength.numel() == 1 else "one per example"
        return f"{shown}, name={self.hparam.name!r}"


class Stochastic(Tunable):
    """A tunable module with random numbers from its own counter.

    A pass with the same counter draws the same numbers at any strength, so the effect of another
    strength is not hidden by other random numbers. Each pass in training mode increments the
    counter. Processes of ``torch.distributed`` draw different numbers from the same counter.

    Attributes:
        key: The counter, shape (1,), int64.
    """

    key: Tensor

    def __init__(self, value: float, hparam: Hparam) -> None:
        super().__init__(value, hparam)
        self.register_buffer("key", torch.randint(MASK, (1,)))

    def forward(self, input: Tensor) -> Tensor:
        """The input, with random changes while training."""
        if not self.training:
            return input
        changed = self.change(input)
        self.key.add_(1)
        return changed

    def change(self, input: Tensor) -> Tensor:
        """The changed batch."""
        raise NotImplementedError

    def uniform(self, shape: tuple[int, ...], stream: int = 0) -> Tensor:
        """Numbers in [0, 1), the same for the same counter, shape and stream.

        Raises:
            RuntimeError: An activation checkpoint runs the module again in the backward pass.
        """
        # torch restores the state of its own generator for such a pass, but not this counter.
        if backward_runs():
            raise RuntimeError(
                f"{type(self).__name__}(name={self.hparam.name!r}) would draw other numbers in an "
                "activation checkpoint's second pass than in the first: leave it outside the "
                "checkpoint, or use torch's own layer there"
            )
        # DistributedDataParallel makes the counters of all processes equal, as all buffers.
        together = dist.is_available() and dist.is_initialized()
        key = self.key + dist.get_rank() * APART if together else self.key
        return uniform(key, shape, stream)

    def normal(self, shape: tuple[int, ...], stream: int = 0) -> Tensor:
        """Standard normal numbers, by inverse transform sampling."""
        # Exact in float32, so below 1, where the quantile is infinite; u + 2⁻²⁵ rounds to 1.
        inner = (self.uniform(shape, stream) * 2 - 1) + 2**-24
        return math.sqrt(2) * torch.erfinv(inner)


def backward_runs() -> bool:
    """Whether a backward pass is running, as in an activation checkpoint's second pass.

    Not in compiled checkpoints, which repeat the operations on the values that they were given.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def uniform(key: Tensor, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Numbers in [0, 1) with 24 random bits: a hash of a counter and the position.

    Args:
        key: The counter, shape (1,).
        shape: Shape of the result.
        stream: Index of an independent stream of numbers.

    Source: the 32-bit integer hash of Mueller; as a counter-based generator, Salmon et al. 2011.
    """
    offset = _hash((key + stream * 0x3C6EF372) & MASK).to(torch.int32)
    # The position is multiplied in int64: in the C++ that torch generates, an overflow of an int32
    # loop counter is undefined and can end the loop early. The rest is int32, whose products wrap
    # around: half the memory, and fast to compile.
    place = torch.arange(math.prod(shape), device=key.device) * SPREAD & MASK
    bits = place.to(torch.int32) + offset
    for _ in range(2):
        bits = (((bits >> 16) & 0xFFFF) ^ bits) * MIX
    bits = ((bits >> 16) & 0xFFFF) ^ bits
    return (((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2**-24).view(shape)


def _hash(bits: Tensor) -> Tensor:
    """Mixes 32 bits, held in int64 so that no product overflows."""
    for _ in range(2):
        bits = ((bits >> 16) ^ bits) * MIX & MASK
    return (bits >> 16) ^ bits


class Strength(NamedTuple):
    """A strength in a model.

    Attributes:
        hparam: Name, scale and bounds.
        value: The initial value.
        buffers: Names of its buffers in the model.
    """

    hparam: Hparam
    value: float
    buffers: list[str]


@checked(model=MODULE)
def tunables(model: nn.Module) -> dict[str, Strength]:
    """The strengths of a model by name.

    Raises:
        ValueError: Modules with the same name differ in scale, bounds or value.

    Examples:
        >>> import selftune as st
        >>> net = torch.nn.Sequential(st.nn.Dropout(0.2, name="input"), torch.nn.Linear(4, 2))
        >>> {name: found.buffers for name, found in tunables(net).items()}
        {'input': ['0.strength']}
    """
    strengths: dict[str, Strength] = {}
    for path, module in _tunable_modules(model):
        hparam, value = module.hparam, float(module.strength.flatten()[0])
        before = strengths.setdefault(hparam.name, Strength(hparam, value, []))
        if before.hparam != hparam or before.value != value:
            raise ValueError(
                f"{path} and {before.buffers[0]} share the name {hparam.name!r} and so one "
                f"strength, but start with {value:.3g} and {before.value:.3g}, or differ in scale "
                "or bounds: give them the same value, or names of their own"
            )
        before.buffers.append(f"{path}.{STRENGTH}" if path else STRENGTH)
    return strengths


def own_counters(model: nn.Module) -> None:
    """Give copies of a layer their own counters, so that they draw different numbers."""
    seen: set[int] = set()
    for _, module in _tunable_modules(model):
        if isinstance(module, Stochastic):
            while int(module.key) in seen:
                module.key.copy_(_hash((module.key + 1) & MASK))
            seen.add(int(module.key))


def _tunable_modules(model: nn.Module) -> Iterator[tuple[str, Tunable]]:
    for path, module in model.named_modules():
        if isinstance(module, Tunable):
            yield path, module
