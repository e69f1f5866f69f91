"""Self-tuning for other optimizers, by wrapping them."""

from __future__ import annotations

import inspect

import torch
from typing_extensions import Unpack

from selftune._arguments import check
from selftune.optim._base import SelfTuningOptimizer
from selftune.optim._options import ARGUMENTS, Tuning
from selftune.optim._stepper import InnerStepper, Opaque
from selftune.update import Update


class SelfTuning(SelfTuningOptimizer):
    """Wraps any torch optimizer and tunes its learning rate and weight decay.

    The inner optimizer takes its own steps. The direction is computed from the weights before and
    after each step, ``d + λ w = (w − w₊)/η``. This assumes that the step is proportional to the
    learning rate and that weight decay is decoupled. If the optimizer adds weight decay to the
    gradient, the hypergradient has the right sign but not the right size; hyperparameter steps do
    not depend on the size.

    Args:
        inner: A new optimizer. Do not call its ``step`` yourself.
        **tuning: :class:`TuningOptions`: ``tune``, ``total_steps``, ``log_dir``, ….

    Raises:
        TypeError: ``inner`` is not a torch optimizer, is self-tuned already, or needs a closure or
            second derivatives.
        ValueError: A parameter group of ``inner`` has no ``lr``, or ``per="tensor"``.

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Linear(4, 1)
        >>> opt = st.SelfTuning(torch.optim.NAdam(net.parameters(), lr=0.01))
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     net(torch.ones(8, 4)).square().mean().backward()
        ...     opt.step()
    """

    def __init__(self, inner: torch.optim.Optimizer, **tuning: Unpack[Tuning]) -> None:
        if not isinstance(inner, torch.optim.Optimizer) or isinstance(inner, SelfTuningOptimizer):
            raise TypeError(
                f"inner={type(inner).__name__} must be a plain torch optimizer, for example "
                "torch.optim.NAdam(model.parameters())"
            )
        closure = inspect.signature(type(inner).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"inner={type(inner).__name__} evaluates the loss several times per step, so its "
                "steps have no single direction; use an optimizer whose step() needs no closure"
            )
        if getattr(inner, "is_second_order", False):
            raise TypeError(
                f"inner={type(inner).__name__} needs second derivatives, but gradients "
                "have no graph here; use a first-order optimizer"
            )
        others = [v for v in vars(inner).values() if isinstance(v, torch.optim.Optimizer)]
        if others or isinstance(inspect.getattr_static(inner, "param_groups"), property):
            raise TypeError(
                f"inner={type(inner).__name__} wraps another optimizer, which tuned rates would "
                "not reach: wrap a self-tuned one instead, such as "
                f"{type(inner).__name__}(st.AdamW(model))"
            )
        check(ARGUMENTS, tuning)
        per = tuning.get("per", "run")
        if "tensor" in ([per] if isinstance(per, str) else per.values()):
            raise ValueError(
                f"per={per!r}: a wrapped optimizer has one lr per parameter group; use per='group'"
            )
        for group in inner.param_groups:
            if group.get("lr") is None:
                raise ValueError(
                    f"inner={type(inner).__name__} has a parameter group without lr: pass a number "
                    "as its lr; nothing can be tuned otherwise"
                )
            group.setdefault("weight_decay", 0.0)
        decays = any(float(group["weight_decay"]) for group in inner.param_groups)
        if tuning.get("tune") is None and not decays:
            tuning["tune"] = ("lr",)
        update = Update(Opaque())
        options = {"weight_decay": 0.0, "decay": 0.0, **inner.defaults}
        super().__init__(inner.param_groups, options, update, InnerStepper(inner, update), **tuning)
        inner.param_groups = self.param_groups
