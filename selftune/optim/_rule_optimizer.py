"""Base class of optimizers with an update rule of the library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

from selftune._arguments import COUNT, FLAG, PAIR, SCALAR, Kind, Number, check
from selftune.optim._base import Params, SelfTuningOptimizer
from selftune.optim._options import ARGUMENTS as TUNING
from selftune.optim._options import RuleTuning, Tuning
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
KERNELS = RuleTuning.__annotations__.keys() - Tuning.__annotations__.keys()
"""torch's options of kernels."""


class RuleOptimizer(SelfTuningOptimizer):
    """A self-tuned optimizer with an update rule of the library."""

    arguments: ClassVar[Mapping[str, Kind]] = ARGUMENTS

    def __init__(
        self,
        params: Params,
        rule: AbstractRule,
        penalty: Penalties,
        extras: RuleTuning,
        **options: Any,
    ) -> None:
        check({**self.arguments, **TUNING}, {**options, **extras})
        for name in ("capturable", "differentiable"):
            if extras.get(name):
                raise ValueError(f"{name}=True is not supported: leave it out")
        # torch's kernel options have no effect here
        tuning = cast("Tuning", {n: v for n, v in extras.items() if n not in KERNELS})
        if isinstance(params, Iterator):
            params = list(params)  # read here and by torch
        groups = params if isinstance(params, Sequence) else ()
        in_groups = any(isinstance(g, Mapping) and g.get("l1") for g in groups)
        l1, tune = options.pop("l1"), tuning.get("tune")
        if options.get("betas") is BETAS and (tune is None or "lr" in tune):
            options["betas"] = BETAS[0], fitting_beta2(tuning.get("total_steps"))
        listed = as_list(penalty)
        needed = in_groups or "l1" in (tune or ())
        if l1 or (needed and all(p.name != "l1" for p in listed)):
            listed.append(L1(l1))
        options |= {p.name: p.strength for p in listed}
        update = Update(rule, tuple(listed))
        super().__init__(params, options, update, Stepper(update), **tuning)

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
