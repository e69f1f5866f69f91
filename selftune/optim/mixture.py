"""An optimizer that selects one of several update rules during the run."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from selftune import rules as rule_module
from selftune._trees import copy_into
from selftune.method import choice
from selftune.optim._base import Params
from selftune.optim._options import RuleTuning
from selftune.optim._rule_optimizer import RuleOptimizer
from selftune.optim._saving import from_bytes, match
from selftune.penalties import Penalties
from selftune.rules import AbstractRule, PlainOptimizer

log = logging.getLogger("selftune")

KEPT = ("step", "average", "good", "candidate")
"""Keys of a parameter's state that are kept in addition to those of the chosen rule."""


class Mixture(RuleOptimizer):
    """Mixes several update rules, tunes their weights on validation data, and selects one of them.

    ``w₊ = w − η (Σ pᵢ sᵢ dᵢ + λ w)``, with the weights p and scales s of
    :class:`~selftune.rules.Mixture`. After a quarter of the run, or after 300 steps if
    ``total_steps`` is not given, the rule with the largest weight is chosen and is available as
    ``rule``. From then on steps are those of the chosen rule's own optimizer, at the same cost.

    Tuned by default: lr, weight decay and the mixture weights before the choice; lr, weight decay
    and the momentum of the chosen rule after it; decay too if ``total_steps`` is unknown.

    Args:
        params: A module, parameters, named parameters or parameter groups.
        rules: The members, or a :class:`~selftune.rules.Mixture` of them.
        lr: Initial learning rate, on the scale of the first member that is not SGD; by default
            that member's default.
        weight_decay: Initial decoupled weight decay; by default that of the same member.
        decay: α of the learning rate's decay 1/(1 + αt).
        l1: Strength of an L1 penalty.
        penalty: Further penalties (:mod:`selftune.penalties`).
        maximize: Ascend instead of descend.
        **tuning: :class:`TuningOptions`: ``tune``, ``total_steps``, ``log_dir``, ….

    Raises:
        TypeError: A member is not a rule of this library.
        ValueError: There are no members, a member is duplicated, an option is outside its range, or
            parameters are unsuitable.

    Source: Ozkara et al. 2024 (MADA).

    Examples:
        >>> import torch, selftune as st
        >>> net = torch.nn.Linear(4, 1)
        >>> opt = st.Mixture(net, [st.rules.SGD(), st.rules.AdamW()], total_steps=8, probe=False)
        >>> for _ in range(8):
        ...     opt.zero_grad()
        ...     net(torch.ones(8, 4)).square().mean().backward()
        ...     opt.step()
        >>> opt.rule.name
        'AdamW'
    """

    def __init__(
        self,
        params: Params,
        rules: Sequence[AbstractRule] | rule_module.Mixture,
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        *,
        decay: float = 0.0,
        l1: float = 0.0,
        penalty: Penalties = None,
        maximize: bool = False,
        **tuning: Unpack[RuleTuning],
    ) -> None:
        given = rules if isinstance(rules, rule_module.Mixture) else rule_module.Mixture(rules)
        rule = given.fresh()
        options = {**rule.defaults, "decay": decay, "l1": l1, "maximize": maximize}
        tune, fitting = tuning.get("tune"), rule.fitting(tuning.get("total_steps"))
        fits = fitting if tune is None or "lr" in tune else {"mix_until"} & fitting.keys()
        options |= {n: fitting[n] for n in fits}
        options |= {} if lr is None else {"lr": lr}
        options |= {} if weight_decay is None else {"weight_decay": weight_decay}
        self._mixture = rule
        super().__init__(params, rule, penalty, tuning, **options)
        engine, hyper = self._engine, self._engine.method.settings.hyper
        self._later = engine.every, engine.shifts.hyper.size
        self._often = self._later
        if tuning.get("every") is None:
            self._often = hyper.often, hyper.size(hyper.often, tuning.get("total_steps"))
        self._pace()

    @property
    def rule(self) -> PlainOptimizer | None:
        """The chosen rule with its current settings as a torch optimizer; None before the choice.

        If parameter groups differ, the settings are those of the first group; the learning rate is
        the peak value.
        """
        first = {n: v[0] if isinstance(v, list) else v for n, v in self.hparams.items()}
        return self._mixture.plain({**self.param_groups[0], **first})

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as in :class:`SelfTuningOptimizer`, including the chosen rule, if any.

        Raises:
            ValueError: It is from another run, for example with another ``mix_until`` than that
                given to this mixture.
        """
        groups = state_dict.get("param_groups") or [{}]
        packed = groups[0].get("selftune")
        run = {} if packed is None else from_bytes(packed)
        given = "mix_until" not in self._mixture.fitting(None)  # else it may follow the length
        if given and run.get("rule") == self._kind and "mix_until" in groups[0]:
            match("mix_until", groups[0]["mix_until"], self.param_groups[0]["mix_until"])
        if run.get("rule") != self._kind or run.get("chosen") == self._mixture.chosen:
            return super().load_state_dict(state_dict)
        if self._assembly.empty:
            self._trained_before(state_dict)
        own, chosen = self.state_dict(), self._mixture.chosen
        own["state"] = {index: dict(entry) for index, entry in own["state"].items()}
        try:
            self._become(run.get("chosen"), {}, {})
            super().load_state_dict(state_dict)
        except Exception:  # undo the change of rule, which the checks need
            self._become(chosen, {}, {})
            super().load_state_dict(own)
            raise

    # internals

    def _pace(self) -> None:
        """Set the interval of hyperparameter steps, which is short until the choice is made."""
        engine = self._engine
        undecided = self._mixture.chosen is None
        engine.every, engine.shifts.hyper.size = self._often if undecided else self._later

    def _packed(self) -> dict[str, Any]:
        return {**super()._packed(), "chosen": self._mixture.chosen}

    def _stepped(self) -> None:
        engine, rule = self._engine, choice.undecided(self._update)
        if rule is None or engine.controller.sweeping:
            return
        if engine.clock.steps < float(self.param_groups[0]["mix_until"]):
            return
        blocks, values = engine.blocks, self._groups.values(self.param_groups)
        moments = engine.store.moments([None] * len(blocks), values, [1.0] * len(blocks))
        grads = [b.gradient()[0] for b in blocks]
        squared = choice.squares(
            [self._update.joined(b.layout) for b in blocks],
            [b.part._replace(params=b.weights()) for b in blocks],
            [-g if v["maximize"] else g for g, v in zip(grads, values, strict=True)],
            moments, engine.method.total,
        )  # fmt: skip
        present = {n: _mean(v) for n, v in self.hparams.items()}
        decided = choice.decide(rule, present, squared)
        if decided is None:  # a gradient that is not finite: the next step chooses
            return
        name, moves = decided
        moves |= engine.controller.calmed(present, rule.own(name))
        before = [b.part for b in blocks]
        kept = {p: {k: e[k] for k in KEPT if k in e} for p, e in self.state.items()}
        self._become(name, moves, kept)
        for old, block in zip(before, engine.blocks, strict=True):
            copy_into(block.part, choice.taken_over(rule, old, block.part))
        sentence = choice.announcement(rule, present, self.rule, engine.clock.steps)
        log.info("%s, %s", engine.controller.label, sentence)
        engine.monitor.text("rule", sentence, engine.clock.steps)

    def _become(
        self,
        name: str | None,
        moves: Mapping[str, float],
        states: Mapping[Tensor, dict[str, Tensor]],
    ) -> None:
        """Continue with one member, or with the mixture; sensitivities are reset."""
        engine, state = self._engine, self.state
        self._mixture.choose(name)
        self._pace()
        engine.method.sensitivities.assign()
        engine.shifts.begin_again(self._mixture, moves)
        for key in moves.keys() - engine.shifts.rows.keys():
            change = math.exp(moves[key])
            for group in self.param_groups:
                if key == "lr" and "initial_lr" in group:  # a torch scheduler writes it
                    self._groups.scale = change
                else:
                    group[key] *= change
        engine.forget()
        for param, entry in state.items():
            entry.clear()
            entry.update(states.get(param, {}))
        self._assembly.make(self.param_groups, state)
        self._publish()


def _mean(value: Any) -> float:
    """The mean over groups or tensors, if they differ."""
    return statistics.fmean(value) if isinstance(value, list) else float(value)
