"""The whole truth about a short run: reverse mode through every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selftune.estimators.rollout import Loss, Rollout


@dataclass(frozen=True)
class Exact:
    """``dL_val(w_T(h))/dh`` by reverse mode through all T steps: the reference of the others.

    Memory grows with T times the weights; meant for short runs and tests.

    Example:
        >>> from selftune import rules
        >>> from selftune.update import Update
        >>> values = dict(momentum=0.0, dampening=0.0, nesterov=False, decay=0.0, weight_decay=0.0)
        >>> exact, loss = Exact(), lambda w: (w**2).sum() / 2
        >>> run = exact.init(Rollout(Update(rules.SGD()), torch.ones(1), values))
        >>> run = exact.observe(run, loss)  # w becomes 1 - lr
        >>> exact.estimate(run, loss, {"lr": torch.tensor(0.1)})
        {'lr': tensor(-0.9000)}

    Source: Maclaurin et al. 2015; Franceschi et al. 2017, section 3.1.
    """

    def init(self, run: Rollout) -> Rollout:
        """The run before its first step."""
        return run

    def observe(self, run: Rollout, loss: Loss) -> Rollout:
        """Record the training loss of one more step."""
        return Rollout(run.update, run.params, run.values, run.rate, [*run.losses, loss])

    def estimate(
        self, run: Rollout, outer_loss: Loss, hparams: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Derivatives of the outer loss at the end, in each of ``hparams``."""
        return torch.func.grad(lambda h: outer_loss(run.end(h)))(dict(hparams))


@dataclass(frozen=True)
class FiniteDifference:
    """``(L(h + ε) − L(h − ε)) / 2ε`` of the whole run: independent of any differentiation.

    Args:
        relative_step: ε over |h|; the error is of order ε², the rounding of order 1e-16/ε.
    """

    relative_step: float = 1e-5

    def init(self, run: Rollout) -> Rollout:
        """The run before its first step."""
        return run

    def observe(self, run: Rollout, loss: Loss) -> Rollout:
        """Record the training loss of one more step."""
        return Exact().observe(run, loss)

    def estimate(
        self, run: Rollout, outer_loss: Loss, hparams: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Central differences of the outer loss at the end, in each of ``hparams``."""
        found = {}
        for name, value in hparams.items():
            step = self.relative_step * value.abs().clamp_min(1e-3)
            up, down = (
                outer_loss(run.end({**hparams, name: value + sign * step})) for sign in (1, -1)
            )
            found[name] = (up - down) / (2 * step)
        return found
