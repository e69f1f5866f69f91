"""Muon for hidden matrices and AdamW for the rest, in one optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Unpack

from selftune import rules
from selftune._arguments import FLAG, NONE, Kind, Number, OneOf, That, Whole, check
from selftune.optim._base import Params
from selftune.optim._options import RuleTuning
from selftune.optim._rule_optimizer import BETAS, RuleOptimizer
from selftune.penalties import Penalties
from selftune.rules.muon import ADJUSTMENTS, COEFFICIENTS, muon_groups

ARGUMENTS: dict[str, Kind] = {
    "momentum": Number(least=0, below=1),
    "ns_steps": Whole(least=1, most=99),
    "ns_coefficients": That(
        lambda c: isinstance(c, (tuple, list)) and len(c) == 3
        and all(isinstance(x, (int, float)) and math.isfinite(x) for x in c),
        "three finite numbers",
    ),
    "adjust_lr_fn": NONE | OneOf(ADJUSTMENTS),
    "adamw_eps": Number(least=0),
    "use_muon": FLAG,
    "lr_ratio": Number(above=0),
}  # fmt: skip
"""Valid values of options that other optimizers do not have."""


class Muon(RuleOptimizer):
    """Muon for hidden matrices and AdamW for the rest, with hyperparameters tuned by gradient.

    ``w₊ = w − η (d + λ w)``; in the matrices d is the orthogonalised momentum, elsewhere AdamW's
    direction (:class:`selftune.rules.Muon`). Both parts are parameter groups of one optimizer, so
    one factor tunes their learning rates and one their weight decays, while their ratios stay as
    given; ``per="group"`` tunes the ratios as well.

    Tuned by default: lr, weight decay, penalties; decay too if ``total_steps`` is unknown.

    Args:
        params: A module, divided by :func:`selftune.muon_groups`; or parameter groups with
            ``use_muon`` True or False; or matrices. A group without ``use_muon`` uses Muon.
        lr: Initial learning rate.
        weight_decay: Decoupled weight decay.
        momentum: Momentum μ of the matrices, not tuned.
        nesterov: Use Nesterov's momentum.
        ns_coefficients: a, b and c of the orthogonalisation.
        eps: Smallest norm by which the orthogonalisation divides.
        ns_steps: Steps of the orthogonalisation.
        adjust_lr_fn: Scale of the orthogonalised direction: ``"match_rms_adamw"`` for
            ``0.2 √max(rows, columns)``, so that one learning rate suits both parts; or
            ``"original"`` (also None, torch's default) for ``√max(1, rows/columns)``.
        betas: β₁ and β₂ of AdamW; β₂ defaults as in :class:`AdamW`.
        adamw_eps: ε of AdamW.
        lr_ratio: Learning rate of the AdamW part, divided by ``lr``; used if ``params`` is a
            module. Groups pass their own ``lr``.
        decay: α of the learning rate's decay 1/(1 + αt).
        l1: Strength of an L1 penalty.
        penalty: Further penalties (:mod:`selftune.penalties`). Their strengths have no
            hypergradient in the matrices.
        maximize: Ascend instead of descend.
        **tuning: :class:`TuningOptions`: ``tune``, ``total_steps``, ``log_dir``, ….

    Raises:
        ValueError: An option is outside its range, a group for Muon has a parameter of fewer than
            two dimensions, a module has no hidden matrix, or parameters are sharded (FSDP2).

    Source: Jordan et al. 2024; Liu et al. 2025.

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> opt = st.Muon(net, lr=0.01)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     net(torch.ones(8, 4)).square().mean().backward()
        ...     opt.step()
        >>> [(g["use_muon"], len(g["params"])) for g in opt.param_groups]
        [(True, 1), (False, 5)]
    """

    arguments: ClassVar[Mapping[str, Kind]] = {**RuleOptimizer.arguments, **ARGUMENTS}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        *,
        betas: tuple[float, float] | None = BETAS,
        adamw_eps: float = 1e-8,
        lr_ratio: float = 1.0,
        decay: float = 0.0,
        l1: float = 0.0,
        penalty: Penalties = None,
        maximize: bool = False,
        **tuning: Unpack[RuleTuning],
    ) -> None:
        own = dict(
            ns_coefficients=ns_coefficients, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
            adamw_eps=adamw_eps, use_muon=True,
        )  # fmt: skip
        check(self.arguments, {**own, "momentum": momentum, "lr_ratio": lr_ratio})
        if isinstance(params, nn.Module):
            tuning, params = {"model": params, **tuning}, muon_groups(params)
            if lr_ratio != 1:
                params[1]["lr"] = lr_ratio * lr
        super().__init__(
            params, rules.Muon(), penalty, tuning, lr=lr, weight_decay=weight_decay, eps=eps,
            momentum=momentum, nesterov=nesterov, betas=BETAS if betas is None else betas,
            decay=decay, l1=l1, maximize=maximize, **own,
        )  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in :class:`RuleOptimizer`; also checks shapes.

        Raises:
            ValueError: A parameter of a group with ``use_muon=True`` has fewer than two dimensions.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        vectors = [p for p in group["params"] if p.ndim < 2] if group["use_muon"] else []
        if vectors:
            del self.param_groups[-1]
            raise ValueError(
                f"params: a group for Muon has a parameter of shape {tuple(vectors[0].shape)}, but "
                "Muon takes matrices: pass the model, or st.muon_groups(model)"
            )
