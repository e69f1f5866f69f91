"""Penalties on the weights: J(w) = J_base(w) + λ Ω(w), with λ a hyperparameter.

A penalty enters training through its gradient ``λ ∂Ω(w)``; a proximal one through the
proximal map after the step instead, which makes weights exactly zero. All functions take
one tensor in the shape of its parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from selftune._arguments import Number, check
from selftune._flat import Layout
from selftune._identity import describe


@dataclass(frozen=True)
class AbstractPenalty(ABC):
    """λ Ω(w).

    Args:
        strength: Initial λ; 0 is off or, if λ is tuned, a small starting value.

    Raises:
        TypeError: The strength is not a number.
        ValueError: It is negative or not finite.
    """

    strength: float = 0.0

    def __post_init__(self) -> None:
        check({"strength": Number(least=0)}, {"strength": self.strength})

    name: ClassVar[str]
    """The name of its strength among the hyperparameters."""
    elementwise: ClassVar[bool] = True
    """Whether Ω is a sum over single weights, so that tensors can be concatenated."""
    proximal: ClassVar[bool] = False
    """Whether it acts through ``prox`` instead of its gradient, as :class:`ProximalL1` alone."""

    @abstractmethod
    def value(self, params: Tensor) -> Tensor:
        """Ω(w), a scalar."""

    @abstractmethod
    def gradient(self, params: Tensor) -> Tensor:
        """A (sub)gradient of Ω, in the shape of ``params``."""


def described(penalties: Iterable[AbstractPenalty]) -> str:
    """Penalties without their strengths, which may be tuned.

    Examples:
        >>> described([L1(0.1), Gates(0.2)]), described([])
        ('L1(), Gates()', 'none')
    """
    texts = []
    for penalty in penalties:
        own = {name: value for name, value in vars(penalty).items() if name != "strength"}
        named = ", ".join(f"{name}={describe(value)}" for name, value in own.items())
        texts.append(f"{type(penalty).__name__}({named})")
    return ", ".join(texts) or "none"


GROUP = ("params", "param_names", "maximize", "initial_lr", "peak_lr", "applied_lr", "selftune")
"""Keys of a parameter group that are no hyperparameters."""


def check_names(penalties: Sequence[AbstractPenalty], taken: Container[str], rule: str) -> None:
    """Raise an error for penalties that a rule cannot have together.

    Args:
        penalties: The penalties.
        taken: Names of other hyperparameters.
        rule: Name of the rule.
    """
    names = [p.name for p in penalties]
    if len(set(names)) < len(names):
        raise ValueError(f"penalty={names}: two penalties share a name; pass each once")
    for penalty in penalties:
        if penalty.name in taken or penalty.name in GROUP:
            raise ValueError(
                f"penalty={penalty!r} has the name {penalty.name!r} of a hyperparameter or option "
                f"of {rule}: give it another name"
            )
        if penalty.proximal and not isinstance(penalty, ProximalL1):
            raise ValueError(
                f"penalty={penalty!r}: proximal=True is for ProximalL1 and its subclasses, whose "
                "sensitivities are known; leave it False to add the gradient to the loss"
            )


@dataclass(frozen=True)
class L1(AbstractPenalty):
    """Ω(w) = Σ|w|, through its subgradient sign(w).

    Examples:
        >>> L1().gradient(torch.tensor([-2.0, 0.0, 3.0]))
        tensor([-1.,  0.,  1.])
    """

    name = "l1"

    def value(self, params: Tensor) -> Tensor:
        """Σ|w|."""
        return params.abs().sum()

    def gradient(self, params: Tensor) -> Tensor:
        """sign(w), 0 at 0."""
        return params.sign()


@dataclass(frozen=True)
class ProximalL1(AbstractPenalty):
    """Ω(w) = Σ|w|, through soft-thresholding by η_t λ after each step (ISTA).

    Source: Daubechies, Defrise & De Mol 2004; Beck & Teboulle 2009, eq. 1.4.
    """

    name = "l1"
    proximal = True
    value, gradient = L1.value, L1.gradient

    @staticmethod
    def prox(params: Tensor, threshold: Tensor | float) -> Tensor:
        """sign(w) · max(|w| − threshold, 0)."""
        return params.sign() * torch.relu(params.abs() - threshold)


GATE_AXES = (1, 1, 1, 1, 1)
"""Trailing dimensions of a gate. No parameter of torch has six dimensions, so a penalty, which gets
only a tensor, recognises gates by shape, even if sharded or mapped over a population."""


def is_gate(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape gates units or layers (:mod:`selftune.structure`).

    Examples:
        >>> is_gate((64, 1, 1, 1, 1, 1)), is_gate((64, 32, 3, 3))
        (True, False)
    """
    return tuple(shape[1:]) == GATE_AXES


@dataclass(frozen=True)
class Gates(AbstractPenalty):
    """Ω = Σ|g| over the gates of :mod:`selftune.structure` alone, through its subgradient sign(g).

    A gate scales the output of a unit or layer, so this is a group penalty: a gate goes to 0 if
    opening it lowers the loss at a rate below λ. Other parameters are not penalised. The
    penalty uses the subgradient, not soft-thresholding: before a normalisation layer, or if
    weights grow to compensate, the loss does not depend on the scale of the gates.
    Soft-thresholding would then close all of them, whereas their gradients grow as they shrink.
    Source: on the scales of BatchNorm, Liu et al. 2017 (network slimming), eq. 1.

    Examples:
        >>> gate, weight = torch.tensor([0.5, -0.1]).view(2, 1, 1, 1, 1, 1), torch.ones(3)
        >>> Gates().gradient(gate).flatten(), Gates().gradient(weight)
        (tensor([ 1., -1.]), tensor([0., 0., 0.]))
    """

    name = "gates"
    elementwise = False

    def value(self, params: Tensor) -> Tensor:
        """Σ|g|."""
        return params.abs().sum() if is_gate(params.shape) else params.sum() * 0

    def gradient(self, params: Tensor) -> Tensor:
        """sign(g), 0 at 0 and for other parameters."""
        return params.sign() if is_gate(params.shape) else torch.zeros_like(params)


@dataclass(frozen=True)
class L2(AbstractPenalty):
    """Ω(w) = ½ Σw², whose gradient is w: torch's ``weight_decay`` when it is not decoupled."""

    name = "l2"

    def value(self, params: Tensor) -> Tensor:
        """½ Σw²."""
        return params.square().sum() / 2

    def gradient(self, params: Tensor) -> Tensor:
        """The weights themselves."""
        return params


@dataclass(frozen=True)
class Elastic(AbstractPenalty):
    """Ω(w) = Σ|w| + ½ Σw²: L1 and L2 under one shared λ (Zou & Hastie 2005)."""

    name = "elastic"

    def value(self, params: Tensor) -> Tensor:
        """Σ|w| + ½ Σw²."""
        return params.abs().sum() + params.square().sum() / 2

    def gradient(self, params: Tensor) -> Tensor:
        """sign(w) + w."""
        return params.sign() + params


@dataclass(frozen=True)
class Group(AbstractPenalty):
    """Ω(w) = Σ_r √d_r ‖w_r‖₂ over the rows r of each tensor: removes whole units.

    Rows run along the first dimension (output units, filters, embeddings), with d_r weights each.
    Tensors of fewer than two dimensions count as rows of one weight.
    Source: Yuan & Lin 2006, eq. 2.2.
    """

    name = "group"
    elementwise = False

    def value(self, params: Tensor) -> Tensor:
        """The weighted sum of row norms."""
        rows = _rows(params)
        return rows.norm(dim=1).sum() * rows.shape[1] ** 0.5

    def gradient(self, params: Tensor) -> Tensor:
        """√d_r w_r / ‖w_r‖, 0 for a row of zeros."""
        rows = _rows(params)
        norm = rows.norm(dim=1, keepdim=True)
        safe = torch.where(norm > 0, norm, torch.ones_like(norm))
        return (rows.shape[1] ** 0.5 * rows / safe).view_as(params)


@dataclass(frozen=True)
class Joined(AbstractPenalty):
    """A penalty on a flat vector of many tensors, applied to each tensor.

    Args:
        strength: λ.
        penalty: The penalty of one tensor.
        layout: Positions of the tensors.
    """

    penalty: AbstractPenalty = L2()
    layout: Layout | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the penalty it applies."""
        return self.penalty.name

    def value(self, params: Tensor) -> Tensor:
        """The sum of Ω over the tensors."""
        return torch.stack([self.penalty.value(p) for p in self._tensors(params)]).sum()

    def gradient(self, params: Tensor) -> Tensor:
        """The concatenated gradients of all tensors."""
        parts = [self.penalty.gradient(p) for p in self._tensors(params)]
        return torch.cat([p.reshape(-1) for p in parts])

    def _tensors(self, params: Tensor) -> list[Tensor]:
        return [params] if self.layout is None else self.layout.views(params)


def _rows(params: Tensor) -> Tensor:
    return params.flatten(1) if params.dim() > 1 else params.reshape(-1, 1)


Penalties = AbstractPenalty | Sequence[AbstractPenalty] | None


def as_list(penalty: Penalties) -> list[AbstractPenalty]:
    """The value of ``penalty=`` (none, one or several) as a list.

    Raises:
        TypeError: It is something else.

    Examples:
        >>> as_list(L1(0.1)), as_list(None)
        ([L1(strength=0.1)], [])
    """
    if penalty is None:
        return []
    given: Any = penalty
    single = isinstance(given, AbstractPenalty) or not isinstance(given, Iterable)
    listed = [given] if single else list(given)
    if not all(isinstance(one, AbstractPenalty) for one in listed):
        raise TypeError(
            f"penalty={penalty!r} must be a penalty or a sequence of them, such as "
            "selftune.penalties.L1(1e-4)"
        )
    return listed
