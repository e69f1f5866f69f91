"""How the averaged weights of a run respond to its hyperparameters.

Most responses are rows of the size of the weights, pushed through each observed step by the
estimator. Three have a closed form where curvature is dropped, and are known without one
(:func:`spared`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selftune.averaging import Average
from selftune.estimators import AbstractRows
from selftune.rules._base import AbstractRule, State, geometric
from selftune.update import Clock, Tangents, Transition, Update


class Weight(NamedTuple):
    """One parameter tensor and all that is kept for it.

    Attributes:
        value: The parameter.
        rule: The rule's state.
        average: The running average, where the outer loss is measured.
        tangents: The responses of ``value`` and ``rule``, a row a hyperparameter.
        response: The responses of ``average``, a row a hyperparameter.
        ahead: How far an average that forgets as fast as the responses is ahead of ``average``,
            or nothing.
    """

    value: Tensor
    rule: State
    average: Tensor
    tangents: Tangents
    response: list[Tensor]
    ahead: list[Tensor]


class Moment(NamedTuple):
    """What is the same for all weights at a step.

    Attributes:
        values: Hyperparameters and options, in the dtype the step is computed in.
        slopes: The derivatives of the tuned ones in their raw values.
        clock: When it is.
        kept: What the running averages keep of themselves, if they are taken at this step.
        fine: Whether the loss is finite, so that the step is taken.
    """

    values: dict[str, Any]
    slopes: dict[str, Tensor]
    clock: Clock
    kept: Tensor
    fine: Tensor


def spared(names: Sequence[str], rule: AbstractRule, estimator: AbstractRows) -> set[str]:
    """Hyperparameters whose response has a closed form.

    - What the log of the rate does to weights is what they move, whatever moves them.
    - The rate's decay α acts through the rate alone.
    - What shrinks weights does so in proportion to them.
    """
    if not estimator.closed_forms:
        return set()
    found = {"lr", "decay"} if "lr" in names else set()
    return found | ({"weight_decay"} if rule.shrinks else set())


class Responses:
    """Follows the averages of weights and what they respond.

    Args:
        names: The tuned hyperparameters.
        update: The weight step.
        estimator: Follows the rows. Its stride is the number of steps from one that is observed
            to the next.
        averaging: The outer point, sampled at the steps that are observed.
        storage: The dtype of rows, or None for that of the weights.
    """

    def __init__(
        self,
        names: Sequence[str],
        update: Update,
        estimator: AbstractRows,
        averaging: Average,
        storage: torch.dtype | None,
    ) -> None:
        self.update, self.estimator, self.averaging = update, estimator, averaging
        self.storage = storage
        known = spared(names, update.rule, estimator)
        self.names = list(names)
        self.rows = [n for n in names if n not in known]
        self.shrinks = [n for n in names if n == "weight_decay" and n in known]
        self.leads = [n for n in names if n == "lr" and n in known]

    def start(self, value: Tensor, values: Mapping[str, Any]) -> Weight:
        """A parameter at the start of a run, responding to nothing yet."""
        return self._weight(value, values, self.rows, self.leads, self.storage)

    def shrinking(self, like: Tensor, values: Mapping[str, Any]) -> list[Weight]:
        """A weight of 1, whose response to weight decay stands for all; or nothing."""
        one = torch.ones(1, dtype=like.dtype, device=like.device)
        return [self._weight(one, values, [row], [], None) for row in self.shrinks]

    def _weight(
        self,
        value: Tensor,
        values: Mapping[str, Any],
        rows: Sequence[str],
        leads: Sequence[str],
        storage: torch.dtype | None,
    ) -> Weight:
        like = value.to(torch.promote_types(value.dtype, torch.float32))
        zeros = torch.zeros_like(like, dtype=storage or like.dtype)
        responds = self.update.tangent_state(rows, values)
        tangents = Tangents(
            [zeros.clone() for _ in rows],
            {row: {k: zeros.clone() for k in sorted(names)} for row, names in responds.items()},
        )
        return Weight(
            value, self.update.rule.init(like, values), like.clone(), tangents,
            [zeros.clone() for _ in (*rows, *leads)], [zeros.clone() for _ in leads],
        )  # fmt: skip

    # at an observed step

    def kept(self, age: Tensor) -> Tensor:
        """What the running averages keep of themselves over a stride that ends at an age.

        The first iterates are averaged evenly, as in :class:`~selftune.averaging.Average`.
        """
        stride = self.estimator.stride
        even = (1 - stride / (age + 2)).clamp_min(0)
        return even.clamp_max(self.averaging.rho**stride)

    def observed(
        self, weight: Weight, moved: Tensor, transition: Transition, moment: Moment
    ) -> Weight:
        """A weight with its average and responses after a step to ``moved``."""
        old, share = weight.average, 1 - moment.kept
        average = torch.where(moment.fine, torch.lerp(old, moved, share), old)
        weight = self._led(weight._replace(average=average), old, moved, moment)
        return self._pushed(weight, transition, self.rows, moment)

    def shrunk(self, weight: Weight, moment: Moment) -> Weight:
        """The weight of 1 with its response after the step; it stays 1."""
        transition = self.update.observed(
            weight.value, torch.zeros_like(weight.value), weight.rule, moment.values, moment.clock
        )[2]
        return self._pushed(weight, transition, self.shrinks, moment)

    def _led(self, weight: Weight, old: Tensor, moved: Tensor, moment: Moment) -> Weight:
        """A weight with its response to the rate after a step to ``moved``.

        What weights moved in a stride of k steps is their response to the log of the rate. With
        the discount γᵏ a stride, ``J = Σ γᵏʲ (w_{i−j} − w_{i−j−1})`` is ``w_i − E_{i−1}``, E their
        average that keeps γᵏ of itself. Within a stride movement is discounted evenly.
        """
        stride, discount = self.estimator.stride, self.estimator.discount
        within = geometric(discount, stride) / stride
        ahead, response = [], list(weight.response)
        for i, row in enumerate(self.leads, start=len(self.rows)):
            past = weight.ahead[i - len(self.rows)]
            fast = old + past.to(old.dtype)
            now = within * moment.slopes[row] / moment.values[row] * (moved - fast)
            fast = torch.lerp(moved, fast, discount**stride)
            ahead.append(self._kept(fast - weight.average, past, moment))
            mean = torch.lerp(now, response[i].to(old.dtype), moment.kept)
            response[i] = self._kept(mean, response[i], moment)
        return weight._replace(ahead=ahead, response=response)

    @staticmethod
    def _kept(new: Tensor, old: Tensor, moment: Moment) -> Tensor:
        """The new value, in the dtype of storage, if the step was taken."""
        return torch.where(moment.fine, new, old.to(new.dtype)).to(old.dtype)

    def _pushed(
        self, weight: Weight, transition: Transition, rows: Sequence[str], moment: Moment
    ) -> Weight:
        """A weight with its rows after the step."""
        dtype = weight.average.dtype
        old = weight.tangents
        copied = Tangents(
            [r.to(dtype, copy=True) for r in old.params],
            {r: {k: v.to(dtype, copy=True) for k, v in s.items()} for r, s in old.state.items()},
        )
        slopes = {n: moment.slopes[n] for n in rows}
        seen = self.estimator.push(copied, transition, slopes)

        params = [self._kept(a, b, moment) for a, b in zip(seen.params, old.params, strict=True)]
        state = {
            r: {k: self._kept(seen.state[r][k], v, moment) for k, v in s.items()}
            for r, s in old.state.items()
        }
        response = list(weight.response)
        for i, now in enumerate(seen.params):
            mean = torch.lerp(now, response[i].to(dtype), moment.kept)
            response[i] = self._kept(mean, response[i], moment)
        return weight._replace(tangents=Tangents(params, state), response=response)

    # at a hyperparameter step

    def hypergradients(
        self,
        weights: Sequence[Weight],
        shrinking: Sequence[Weight],
        grads: Sequence[Tensor],
        values: Mapping[str, Tensor],
        step: Tensor,
    ) -> list[Tensor]:
        """dL/dz of every tuned hyperparameter.

        Args:
            weights: All weights.
            shrinking: The weight of 1, or nothing.
            grads: The outer loss's gradients at the averages.
            values: The tuned hyperparameters.
            step: Of the run, shape ().
        """

        def along(vectors: Sequence[Tensor]) -> Tensor:
            pairs = zip(vectors, grads, strict=True)
            return torch.stack([(v.to(g.dtype) * g).sum() for v, g in pairs]).sum()

        found = {
            row: along([w.response[i] for w in weights])
            for i, row in enumerate([*self.rows, *self.leads])
        }
        for row, one in zip(self.shrinks, shrinking, strict=True):
            found[row] = one.response[0].squeeze(0) * along([w.average for w in weights])
        if "decay" in self.names and "decay" not in found:  # d log η/d log α = −αt/(1 + αt)
            lag = self.averaging.rho / (1 - self.averaging.rho)  # of the averaged response
            shrunk = values["decay"] * (step - torch.clamp(step / 2, max=lag))
            found["decay"] = -found["lr"] * shrunk / (1 + shrunk)
        return [found[n] for n in self.names]
