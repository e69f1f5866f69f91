"""Drop-in replacements for torch's optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from selftune import rules
from selftune._arguments import COUNT, FLAG, PAIR, SCALAR, Kind, Number, check
from selftune.optim._base import Params, SelfTuningOptimizer
from selftune.optim._building import ARGUMENTS as TUNING
from selftune.optim._stepper import Stepper
from selftune.penalties import L1, Penalties, as_list
from selftune.rules import AbstractRule
from selftune.rules.adam import fitting_beta2
from selftune.update import Update

BETAS: tuple[float, float] = (0.9, 0.999)
"""torch's default, compared by identity to detect whether the user passed ``betas``."""


ARGUMENTS: dict[str, Kind] = {
    "lr": SCALAR,
    "momentum": Number(least=0),
    "betas": PAIR,
    "dampening": Number(),
    "alpha": Number(least=0, below=1),
    "eps": Number(least=0),
    "weight_decay": SCALAR,
    "decay": SCALAR,
    "l1": Number(least=0),
    "nesterov": FLAG,
    "amsgrad": FLAG,
    "centered": FLAG,
    "maximize": FLAG,
    "mix_until": COUNT,
}
"""Valid values of options; ranges of tunable options are checked with their groups."""


class RuleOptimizer(SelfTuningOptimizer):
    """A self-tuned optimizer with an update rule of the library."""

    arguments: ClassVar[Mapping[str, Kind]] = ARGUMENTS

    def __init__(
        self,
        params: Params,
        rule: AbstractRule,
        penalty: Penalties,
        extras: dict[str, Any],
        **options: Any,
    ) -> None:
        check({**self.arguments, **TUNING}, {**options, **extras})
        for name in ("foreach", "fused"):  # torch's kernel options have no effect here
            extras.pop(name, None)
        for name in ("capturable", "differentiable"):
            if extras.pop(name, False):
                raise ValueError(f"{name}=True is not supported: leave it out")
        if isinstance(params, Iterator):
            params = list(params)  # read here and by torch
        groups = params if isinstance(params, Sequence) else ()
        in_groups = any(isinstance(g, Mapping) and g.get("l1") for g in groups)
        l1, tune = options.pop("l1"), extras.get("tune")
        if options.get("betas") is BETAS and (tune is None or "lr" in tune):
            options["betas"] = BETAS[0], fitting_beta2(extras.get("total_steps"))
        listed = as_list(penalty)
        needed = in_groups or "l1" in (tune or ())
        if l1 or (needed and all(p.name != "l1" for p in listed)):
            listed.append(L1(l1))
        options |= {p.name: p.strength for p in listed}
        update = Update(rule, tuple(listed))
        super().__init__(params, options, update, Stepper(update), **extras)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in :class:`SelfTuningOptimizer`; also checks its options."""
        if isinstance(param_group, Mapping):
            check(self.arguments, param_group)
            if param_group.get("l1") and "l1" not in self._update.hparams:
                raise ValueError(
                    f"l1={param_group['l1']} in a parameter group that is added later: the "
                    "optimizer has no L1 penalty. Give it one with l1=, or in an earlier group"
                )
        super().add_param_group(param_group)


class SGD(RuleOptimizer):
    """``torch.optim.SGD`` with hyperparameters tuned by gradient.

    Tuned by default: lr, momentum, weight decay, penalties; decay if ``total_steps`` is unknown.

    Args:
        params: A module, parameters, named parameters or parameter groups.
        lr: Learning rate at the start.
        momentum: Momentum μ.
        dampening: Dampening τ.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: Use Nesterov's momentum.
        decay: α of the learning rate's decay 1/(1 + αt).
        l1: Strength of an L1 penalty.
        penalty: Further penalties (:mod:`selftune.penalties`).
        maximize: Ascend instead of descend.
        **tuning: :class:`TuningOptions`: ``tune``, ``total_steps``, ``log_dir``, ….

    Raises:
        ValueError: An option is outside its range, or parameters are unsuitable.

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Linear(4, 1)
        >>> opt = st.SGD(net.parameters(), lr=1e-3)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     net(torch.ones(8, 4)).square().mean().backward()
        ...     opt.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decay: float = 0.0,
        l1: float = 0.0,
        penalty: Penalties = None,
        maximize: bool = False,
        **tuning: Any,
    ) -> None:
        super().__init__(
            params, rules.SGD(), penalty, tuning, lr=lr, momentum=momentum, dampening=dampening,
            weight_decay=weight_decay, nesterov=nesterov, decay=decay, l1=l1, maximize=maximize,
        )  # fmt: skip


class Adam(RuleOptimizer):
    """``torch.optim.Adam`` with hyperparameters tuned by gradient.

    Tuned by default: lr, β₁, weight decay, penalties; decay if ``total_steps`` is unknown.

    Args:
        params: A module, parameters, named parameters or parameter groups.
        lr: Learning rate at the start.
        betas: β₁ and β₂. If not given, and if ``total_steps`` is known and ``lr`` is tuned, β₂ is
            set so that 1/(1 − β₂) is a twentieth of the run, clamped to 100…1000 steps.
        eps: ε, added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        amsgrad: Use the largest second moment so far.
        decay: α of the learning rate's decay 1/(1 + αt).
        l1: Strength of an L1 penalty.
        penalty: Further penalties (:mod:`selftune.penalties`).
        maximize: Ascend instead of descend.
        **tuning: :class:`TuningOptions`: ``tune``, ``total_steps``, ``log_dir``, ….

    Raises:
        ValueError: An option is outside its range, or parameters are unsuitable.

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Linear(4, 1)
        >>> opt = st.Adam(net.parameters(), lr=1e-3)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     net(torch.ones(8, 4)).square().mean().backward()
        ...     opt.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decay: float = 0.0,
        l1: float = 0.0,
        penalty: Penalties = None,
        maximize: bool = False,
        **tuning: Any,
    ) -> None:
        super().__init__(
            params, rules.Adam(), penalty, tuning, lr=lr, betas=betas, eps=eps,
            weight_decay=weight_decay, amsgrad=amsgrad, decay=decay, l1=l1, maximize=maximize,
        )  # fmt: skip


class AdamW(RuleOptimizer):
    """``torch.optim.AdamW`` with hyperparameters tuned by gradient.

    Tuned by default: lr, β₁, weight decay, penalties; decay if ``total_steps`` is unknown.

    Args:
        params: A module, parameters, named parameters or parameter groups.
        lr: Learning rate at the start.
        betas: β₁ and β₂. If not given, and if ``total_steps`` is known and ``lr`` is tuned, β₂ is
            set so that 1/(1 − β₂) is a twentieth of the run, clamped to 100…1000 steps.
        eps: ε, added to the denominator.
        weight_decay: Decoupled weight decay.
        amsgrad: Use the largest second moment so far.
        decay: α of the learning rate's decay 1/(1 + αt).
        l1: Strength of an L1 penalty.
        penalty: Further penalties (:mod:`selftune.penalties`).
        maximize: Ascend instead of descend.
        **tuning: :class:`TuningOptions`: ``tune``, ``total_steps``, ``log_dir``, ….

    Raises:
        ValueError: An option is outside its range, or parameters are unsuitable.

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Linear(4, 1)
        >>> opt = st.AdamW(net.parameters(), lr=1e-3)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     net(torch.ones(8, 4)).square().mean().backward()
        ...     opt.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        decay: float = 0.0,
        l1: float = 0.0,
        penalty: Penalties = None,
        maximize: bool = False,
        **tuning: Any,
    ) -> None:
        super().__init__(
            params, rules.AdamW(), penalty, tuning, lr=lr, betas=betas, eps=eps,
            weight_decay=weight_decay, amsgrad=amsgrad, decay=decay, l1=l1, maximize=maximize,
        )  # fmt: skip


class RMSprop(RuleOptimizer):
    """``torch.optim.RMSprop`` with hyperparameters tuned by gradient.

    Tuned by default: lr, momentum, weight decay, penalties; decay if ``total_steps`` is unknown.

    Args:
        params: A module, parameters, named parameters or parameter groups.
        lr: Learning rate at the start.
        alpha: Smoothing constant of the mean square.
        eps: ε, added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        momentum: Momentum μ.
        centered: Subtract the squared mean gradient.
        decay: α of the learning rate's decay 1/(1 + αt).
        l1: Strength of an L1 penalty.
        penalty: Further penalties (:mod:`selftune.penalties`).
        maximize: Ascend instead of descend.
        **tuning: :class:`TuningOptions`: ``tune``, ``total_steps``, ``log_dir``, ….

    Raises:
        ValueError: An option is outside its range, or parameters are unsuitable.

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Linear(4, 1)
        >>> opt = st.RMSprop(net.parameters(), lr=1e-2)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     net(torch.ones(8, 4)).square().mean().backward()
        ...     opt.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        decay: float = 0.0,
        l1: float = 0.0,
        penalty: Penalties = None,
        maximize: bool = False,
        **tuning: Any,
    ) -> None:
        super().__init__(
            params, rules.RMSprop(), penalty, tuning, lr=lr, alpha=alpha, eps=eps, decay=decay,
            weight_decay=weight_decay, momentum=momentum, centered=centered, l1=l1,
            maximize=maximize,
        )  # fmt: skip


class Lion(RuleOptimizer):
    """The Lion optimizer with hyperparameters tuned by gradient.

    Tuned by default: lr, weight decay and ``ProximalL1``; decay too if ``total_steps`` is unknown.
    Other penalties act through the sign of the gradient, and keep their values. PyTorch does not
    provide Lion; the signature is that of its authors (Chen et al. 2023).

    Args:
        params: A module, parameters, named parameters or parameter groups.
        lr: Learning rate at the start.
        betas: β₁ and β₂.
        weight_decay: Decoupled weight decay.
        decay: α of the learning rate's decay 1/(1 + αt).
        l1: Strength of an L1 penalty.
        penalty: Further penalties (:mod:`selftune.penalties`).
        maximize: Ascend instead of descend.
        **tuning: :class:`TuningOptions`: ``tune``, ``total_steps``, ``log_dir``, ….

    Raises:
        ValueError: An option is outside its range, or parameters are unsuitable.

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Linear(4, 1)
        >>> opt = st.Lion(net.parameters(), lr=1e-4)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     net(torch.ones(8, 4)).square().mean().backward()
        ...     opt.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        decay: float = 0.0,
        l1: float = 0.0,
        penalty: Penalties = None,
        maximize: bool = False,
        **tuning: Any,
    ) -> None:
        super().__init__(
            params, rules.Lion(), penalty, tuning, lr=lr, betas=betas, weight_decay=weight_decay,
            decay=decay, l1=l1, maximize=maximize,
        )  # fmt: skip
