"""Rules as ordinary torch optimizers with fixed hyperparameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from selftune.rules._base import AbstractRule


class Untuned(torch.optim.Optimizer):
    """A rule as an ordinary torch optimizer, for rules that ``torch.optim`` does not have.

    ``w₊ = w − η (d + λ w)``; if the rule's weight decay is not decoupled, λ w is added to the
    gradient instead.

    Args:
        params: Parameters, or parameter groups.
        rule: The rule that computes the direction d.
        **settings: ``lr``, ``weight_decay``, ``maximize`` and the settings of the rule.
    """

    def __init__(self, params: Any, rule: AbstractRule, **settings: Any) -> None:
        self._rule = rule
        usual = {**_settings(rule, rule.defaults), "maximize": False}
        super().__init__(params, {**usual, **settings})

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, with the rule."""
        return {**super().__getstate__(), "_rule": self._rule}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step and return the loss of the closure, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rule = self._rule
        for group in self.param_groups:
            given = {**group, **{h.name: h.read(group) for h in rule.hparams}}
            for param in (p for p in group["params"] if p.grad is not None):
                entry = self.state[param]
                if not entry:
                    entry.update(rule.init(param, given), step=0)
                values = rule.at(given, entry["step"])
                rate, decay = values["lr"], values["weight_decay"]
                grads = -param.grad if group["maximize"] else param.grad
                grads = grads if rule.decoupled else grads + decay * param
                state = {n: t for n, t in entry.items() if n != "step"}
                direction, after = rule.direction(grads, state, values, entry["step"])
                entry.update({n: after[n] for n in state}, step=entry["step"] + 1)
                if rule.decoupled:
                    direction = direction + decay * param
                param.sub_(rate * direction)
        return loss


@dataclass(frozen=True)
class PlainOptimizer:
    """A torch optimizer class with its settings, ready to be created for any parameters.

    Args:
        rule: The rule.
        settings: Arguments of the optimizer other than the parameters. The learning rate is the
            peak value, before any schedule.

    Examples:
        >>> import torch, selftune as st
        >>> plain = st.rules.PlainOptimizer.of(st.rules.AdamW(), {"lr": 0.01, "beta1": 0.8})
        >>> plain
        torch.optim.AdamW(lr=0.01, betas=(0.8, 0.999), eps=1e-08, weight_decay=0.01)
        >>> type(plain.make(torch.nn.Linear(2, 1).parameters()))
        <class 'torch.optim.adamw.AdamW'>
    """

    rule: AbstractRule
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, rule: AbstractRule, values: Mapping[str, Any]) -> PlainOptimizer:
        """Create from a rule and its values by name; missing values take the rule's defaults."""
        return cls(rule, _settings(rule, {**rule.defaults, **values}))

    @property
    def name(self) -> str:
        """The name of the rule."""
        return type(self.rule).__name__

    def make(self, params: Any) -> torch.optim.Optimizer:
        """Create the optimizer for parameters or parameter groups."""
        params = self.rule.grouped(params, self.settings["lr"])
        if self.rule.twin is not None:
            return self.rule.twin(params, **self.settings)
        return Untuned(params, self.rule, **self.settings)

    def __repr__(self) -> str:
        shown = [f"{n}={_shown(v)}" for n, v in self.settings.items() if v is not False]
        if self.rule.twin is not None:
            return f"torch.optim.{self.rule.twin.__name__}({', '.join(shown)})"
        return f"selftune.rules.Untuned(params, {', '.join([f'{self.name}()', *shown])})"


def _settings(rule: AbstractRule, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an optimizer, in which momenta may share a tuple."""
    settings: dict[str, Any] = {"lr": values["lr"]}
    for hparam in rule.hparams:
        if hparam.index is None:
            settings[hparam.option or hparam.name] = values[hparam.name]
        else:
            settings[hparam.option] = (*settings.get(hparam.option, ()), values[hparam.name])
    own = {h.name for h in rule.hparams}
    rest = {n: values[n] for n in rule.defaults if n not in (*own, "lr", "weight_decay")}
    if values.get("maximize"):  # an option of the group, not of the rule
        rest["maximize"] = True
    return {**settings, **rest, "weight_decay": values["weight_decay"]}


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
