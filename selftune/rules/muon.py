"""Muon: orthogonalised momentum for hidden matrices, AdamW for the rest."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from selftune._arguments import MODULE, NAMES, NONE, checked
from selftune._flat import Layout
from selftune.rules._base import (
    AbstractRule,
    Dots,
    Evaluation,
    ParameterOptions,
    State,
    Values,
    mix,
)
from selftune.rules.adam import Adam, fitting_beta2

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of the quintic, as in ``torch.optim.Muon``."""
ADJUSTMENTS = ("original", "match_rms_adamw")
ADAM = Adam()  # its direction is AdamW's


class Muon(AbstractRule):
    """Muon for hidden matrices, with AdamW for all other parameters.

    For a matrix, ``b₊ = μ b + (1 − μ) g``; ``n = μ b₊ + (1 − μ) g`` with Nesterov's momentum,
    otherwise ``n = b₊``; ``d = s · NS(n)``. NS replaces the singular values of n by values near 1,
    by steps ``X ← a X + (b X Xᵀ + c (X Xᵀ)²) X`` from ``X = n/‖n‖``. The scale s is
    ``0.2 √max(rows, columns)``, which gives d the root mean square of AdamW's directions, so that
    both parts share a learning rate; or ``√max(1, rows/columns)`` (``"original"``). A tensor of
    more dimensions is flattened to a matrix (first, rest). Weight decay is decoupled. As in
    ``torch.optim.Muon``, NS is computed in bfloat16; float64 weights keep their precision.

    The state of a matrix is its momentum, that of other parameters AdamW's two moments.
    ``use_muon`` selects between them: it is an option of parameter groups in
    :class:`selftune.optim.Muon`, and set by :func:`muon_groups` in :class:`selftune.Tuner`.

    Learning rate and weight decay have sensitivities as in any rule. An orthogonalised direction
    does not depend on the length of the gradient, so penalty strengths have no hypergradient
    in the matrices. μ is not tuned; AdamW's β₁ and β₂ may be (``tune=``).

    Args:
        others: Names of modules or parameters that AdamW trains, as in :func:`muon_groups`.
        lr_ratio: Learning rate of the AdamW part, divided by that of the matrices.
        **settings: Values that replace ``defaults``, such as ``momentum=0.9``.

    Raises:
        ValueError: An unknown setting.

    Source: Jordan et al. 2024 (Muon); Liu et al. 2025 (the scale).

    Examples:
        >>> import selftune as st
        >>> rule = st.rules.Muon(momentum=0.9)
        >>> rule.tuned, rule.defaults["momentum"]
        (('lr', 'decay', 'weight_decay'), 0.9)
    """

    hparams = ADAM.hparams
    decoupled = True
    shrinks = True
    elementwise = False
    tuned = ("lr", "decay", "weight_decay")
    defaults: Mapping[str, Any] = MappingProxyType(
        dict(
            lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_coefficients=COEFFICIENTS,
            eps=1e-7, ns_steps=5, adjust_lr_fn="match_rms_adamw", beta1=0.9, beta2=0.999,
            adamw_eps=1e-8, use_muon=True,
        )
    )  # fmt: skip

    def __init__(
        self, others: Sequence[str] | None = None, lr_ratio: float = 1.0, **settings: Any
    ) -> None:
        for name in settings:
            if name not in self.defaults:
                raise ValueError(
                    f"{name}={settings[name]!r} is unknown: use some of {list(self.defaults)}"
                )
        self._others, self._ratio = others, lr_ratio
        self._layout: Layout | None = None
        self.defaults = {**self.defaults, **settings}  # a copy of the rule can be pickled
        self._given = frozenset(settings)

    def joined(self, layout: Layout) -> Muon:
        """The same rule for a flat vector of tensors."""
        other = copy.copy(self)
        other._layout = layout
        return other

    def by_parameter(self, model: nn.Module, params: Sequence[Tensor]) -> list[ParameterOptions]:
        """Muon for the hidden matrices of the model, AdamW at its own rate for the others."""
        hidden = {id(p) for p in muon_groups(model, self._others)[0]["params"]}
        kinds = {
            True: ParameterOptions({"use_muon": True}),
            False: ParameterOptions({"use_muon": False}, self._ratio),
        }
        return [kinds[id(p) in hidden] for p in params]

    def grouped(self, params: Any, lr: float) -> Any:
        """The groups of :func:`muon_groups`, that of AdamW at its own rate."""
        if not isinstance(params, Sequence) or self._ratio == 1:
            return params
        rest = [isinstance(g, Mapping) and g.get("use_muon") is False for g in params]
        return [
            {"lr": lr * self._ratio, **group} if other else group
            for other, group in zip(rest, params, strict=True)
        ]

    def fitting(self, total_steps: int | None) -> Mapping[str, float]:
        """A β₂ of AdamW whose memory is a twentieth of the run."""
        return {} if "beta2" in self._given else {"beta2": fitting_beta2(total_steps)}

    def init(self, params: Tensor, values: Values) -> State:
        """Zero-initialised momentum of matrices, and moments of the others."""
        use = values["use_muon"]
        names = ["momentum_buffer"] if use else []
        names += [] if use is True else ["exp_avg", "exp_avg_sq"]
        return {name: torch.zeros_like(params) for name in names}

    def direction(
        self, grads: Tensor, state: State, values: Values, age: int | Tensor
    ) -> tuple[Tensor, State]:
        """The orthogonalised momentum, or AdamW's direction.

        If ``use_muon`` is a tuple, with a flag for each tensor of the layout, both are computed.
        """
        use = values["use_muon"]
        if use is False:
            return ADAM.direction(grads, state, _adamw(values), age)
        after: State = {}
        parts: list[Tensor | None] = [None]
        if isinstance(use, tuple):
            assert self._layout is not None
            direction, after = ADAM.direction(grads, state, _adamw(values), age)
            views = self._layout.views(direction)
            parts = [None if own else v for own, v in zip(use, views, strict=True)]
        momentum = values["momentum"]
        buffer = after["momentum_buffer"] = mix(state["momentum_buffer"], grads, 1 - momentum)
        mean = mix(grads, buffer, momentum) if values["nesterov"] else buffer
        if self._layout is None:
            _check_matrix(mean)
            return orthogonal(mean, values), after
        views = self._layout.views(mean)
        parts = parts if isinstance(use, tuple) else [None] * len(views)
        directions = [
            orthogonal(v, values) if p is None else p for v, p in zip(views, parts, strict=True)
        ]
        return torch.cat([d.reshape(-1) for d in directions]), after

    def tangent(self, at: Evaluation, dots: Dots) -> tuple[Tensor, State]:
        """AdamW's tangent; 0 for matrices, because NS is not elementwise."""
        use = at.values["use_muon"]
        if use is True:
            return torch.zeros_like(at.grads), {}
        direction_dot, after = ADAM.tangent(at._replace(values=_adamw(at.values)), dots)
        if isinstance(use, tuple) and self._layout is not None:
            direction_dot = direction_dot * self._layout.expand([float(not own) for own in use])
        return direction_dot, after


def _check_matrix(tensor: Tensor) -> None:
    if tensor.ndim < 2 and tensor.numel() > 1:
        raise ValueError(
            f"params: Muon takes matrices, but a parameter has shape {tuple(tensor.shape)}: pass "
            "the groups of st.muon_groups(model)"
        )


def _adamw(values: Values) -> dict[str, Any]:
    return {**values, "eps": values["adamw_eps"], "amsgrad": False}


def orthogonal(update: Tensor, values: Values) -> Tensor:
    """``s · NS(n)`` of one tensor, in its shape and dtype."""
    if not update.numel():
        return update
    matrix = update.reshape(len(update), -1)
    rows, columns = matrix.shape
    (a, b, c), dtype = values["ns_coefficients"], update.dtype
    x = matrix if dtype == torch.float64 else matrix.bfloat16()
    x = x.T if rows > columns else x
    x = x / x.norm().clamp(min=values["eps"])  # the spectral norm is at most 1
    for _ in range(values["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.T if rows > columns else x
    scale = math.sqrt(max(1, rows / columns))
    if values["adjust_lr_fn"] == "match_rms_adamw":
        scale = 0.2 * math.sqrt(max(rows, columns))
    return (x.to(dtype) * scale).reshape(update.shape)


@checked(model=MODULE, others=NAMES | NONE)
def muon_groups(model: nn.Module, others: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The usual two parameter groups: hidden matrices for Muon, and the rest for AdamW.

    A matrix is a parameter of two or more dimensions whose name contains ``weight``
    (``in_proj_weight``, ``weight_hh_l0``), with more than one row and column. The rest are vectors,
    embeddings, other tensors (position tables, class tokens), and the first and the last layer, in
    the order in which modules were registered; an embedding registered first is the first layer.

    Args:
        model: The model.
        others: Names of modules or parameters that belong to the rest, instead of the first and
            the last layer; ``()`` for none.

    Returns:
        Groups for :class:`selftune.optim.Muon` with the options ``use_muon=True`` and ``False``.
        Torch's optimizers take them too: ``torch.optim.Muon(groups[0]["params"])`` (matrices of
        exactly two dimensions) and ``torch.optim.AdamW(groups[1]["params"])``.

    Raises:
        ValueError: There is no such matrix, or a name in ``others`` is unknown.

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> hidden, rest = st.muon_groups(net)
        >>> len(hidden["params"]), len(rest["params"])
        (1, 5)
    """
    tables = {
        id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    }
    layers = [
        p
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        # The weights of layers: "original…" are those of parametrised ones.
        if p.ndim > 1 and ("weight" in name or name.startswith("original") or id(p) in tables)
    ]
    if others is None:
        outside = {id(p) for p in (*layers[:1], *layers[-1:])}
    else:
        outside = {id(p) for name in others for p in _named(model, name)}
    sides = {id(p) for p in layers if 1 < len(p) < p.numel()}
    matrices = sides - tables - outside
    if not matrices:
        raise ValueError(
            f"model={type(model).__name__} has no hidden matrix for Muon: it has "
            f"{len(layers)} layers with weights, of which the first and the last belong to AdamW "
            "by default; pass st.muon_groups(model, others=()) to include them, or use AdamW"
        )
    params = list(model.parameters())
    return [
        {"params": [p for p in params if id(p) in matrices], "use_muon": True},
        {"params": [p for p in params if id(p) not in matrices], "use_muon": False},
    ]


def _named(model: nn.Module, name: str) -> list[Tensor]:
    """The parameters of a module, or one parameter, by name."""
    params: list[Tensor] = [
        p
        for n, p in model.named_parameters(remove_duplicate=False)
        if n == name or n.startswith(f"{name}.")
    ]
    if not params:
        raise ValueError(
            f"others={name!r} is not the name of a module or parameter with weights: use names "
            f"such as {next(n for n, _ in model.named_parameters())!r}"
        )
    return params
