"""Drop-in replacements for torch's optimizers."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from selftune import rules
from selftune.optim._base import Params
from selftune.optim._options import RuleTuning
from selftune.optim._rule_optimizer import BETAS, RuleOptimizer
from selftune.penalties import Penalties


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
        **tuning: Unpack[RuleTuning],
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
        betas: β₁ and β₂. If not given (or None), and if ``total_steps`` is known and ``lr`` is
            tuned, 1/(1 − β₂) is a twentieth of the run, clamped to 100…1000 steps.
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
        betas: tuple[float, float] | None = BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decay: float = 0.0,
        l1: float = 0.0,
        penalty: Penalties = None,
        maximize: bool = False,
        **tuning: Unpack[RuleTuning],
    ) -> None:
        super().__init__(
            params, rules.Adam(), penalty, tuning, lr=lr,
            betas=BETAS if betas is None else betas, eps=eps, weight_decay=weight_decay,
            amsgrad=amsgrad, decay=decay, l1=l1, maximize=maximize,
        )  # fmt: skip


class AdamW(RuleOptimizer):
    """``torch.optim.AdamW`` with hyperparameters tuned by gradient.

    Tuned by default: lr, β₁, weight decay, penalties; decay if ``total_steps`` is unknown.

    Args:
        params: A module, parameters, named parameters or parameter groups.
        lr: Learning rate at the start.
        betas: β₁ and β₂. If not given (or None), and if ``total_steps`` is known and ``lr`` is
            tuned, 1/(1 − β₂) is a twentieth of the run, clamped to 100…1000 steps.
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
        betas: tuple[float, float] | None = BETAS,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        decay: float = 0.0,
        l1: float = 0.0,
        penalty: Penalties = None,
        maximize: bool = False,
        **tuning: Unpack[RuleTuning],
    ) -> None:
        super().__init__(
            params, rules.AdamW(), penalty, tuning, lr=lr,
            betas=BETAS if betas is None else betas, eps=eps, weight_decay=weight_decay,
            amsgrad=amsgrad, decay=decay, l1=l1, maximize=maximize,
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
        **tuning: Unpack[RuleTuning],
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
        **tuning: Unpack[RuleTuning],
    ) -> None:
        super().__init__(
            params, rules.Lion(), penalty, tuning, lr=lr, betas=betas, weight_decay=weight_decay,
            decay=decay, l1=l1, maximize=maximize,
        )  # fmt: skip
