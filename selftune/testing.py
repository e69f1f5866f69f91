"""Checks of hypergradients on users' own models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selftune.estimators import AbstractEstimator, FiniteDifference, hypergradient
from selftune.problem import Hparams, Problem


@dataclass(frozen=True)
class Verdict:
    """The result of a check, printed as a table and a sentence.

    Attributes:
        estimated: Estimated hypergradients by name.
        reference: Hypergradients by finite differences.
        errors: ‖estimated − reference‖ / ‖reference‖ by name.
        uncertainty: Relative change of the reference with its step size.
        cosine: Cosine between the estimated and the reference vector of all entries.
        agrees: Whether all errors are within the tolerance.
        sentence: The conclusion.
    """

    estimated: Mapping[str, Tensor]
    reference: Mapping[str, Tensor]
    errors: Mapping[str, float]
    uncertainty: Mapping[str, float]
    cosine: float
    agrees: bool
    sentence: str

    def __str__(self) -> str:
        lines = [f"{'hparam':<18}{'estimated':>14}{'differences':>14}{'error':>10}"]
        for name, value in self.estimated.items():
            shown = [_shown(value), _shown(self.reference[name])]
            lines.append(f"{name:<18}{shown[0]:>14}{shown[1]:>14}{self.errors[name]:>10.1e}")
        return "\n".join([*lines, f"cosine {self.cosine:.4f}: {self.sentence}"])


def check_hypergradient(
    problem: Problem,
    estimator: AbstractEstimator,
    params: Tensor,
    hparams: Hparams,
    batches: Sequence[Any],
    outer_batch: Any,
    tolerance: float = 1e-3,
) -> Verdict:
    """Compare an estimator on a short run with finite differences of the whole run.

    Args:
        problem: The bilevel problem (:func:`selftune.as_problem` makes one from a model).
        estimator: The estimator to check.
        params: The initial weights, shape (N,); use float64 for accuracy.
        hparams: The hyperparameters.
        batches: Training batches, one for each step.
        outer_batch: The validation batch.
        tolerance: The relative error that counts as agreement.

    Examples:
        >>> import torch, selftune as st
        >>> problem, weights = st.as_problem(
        ...     torch.nn.Linear(2, 1).double(), torch.nn.functional.mse_loss,
        ...     st.Update(st.rules.SGD()),
        ... )
        >>> batch = torch.eye(2).double(), torch.ones(2, 1).double()
        >>> lr = {"lr": torch.tensor(0.1, dtype=torch.float64)}
        >>> verdict = check_hypergradient(problem, st.Forward(), weights, lr, [batch] * 3, batch)
        >>> verdict.agrees
        True
    """
    batches = list(batches)
    args = (params, hparams, batches, outer_batch)
    estimated = hypergradient(problem, estimator, *args).grads
    exact_step = torch.finfo(params.dtype).eps ** (1 / 3)
    references = [
        hypergradient(problem, FiniteDifference(scale * exact_step), *args).grads
        for scale in (1.0, 4.0)
    ]
    reference = references[0]
    errors = {n: _relative(estimated[n], reference[n]) for n in hparams}
    uncertainty = {n: _relative(references[1][n], reference[n]) for n in hparams}
    a, b = (torch.cat([g[n].flatten() for n in hparams]) for g in (estimated, reference))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    doubtful = [n for n in hparams if uncertainty[n] > tolerance]
    agrees = all(error <= tolerance for error in errors.values())
    sentence = _sentence(agrees, cosine, doubtful)
    return Verdict(estimated, reference, errors, uncertainty, cosine, agrees, sentence)


def _sentence(agrees: bool, cosine: float, doubtful: Sequence[str]) -> str:
    if agrees:
        return "the estimate agrees with finite differences"
    if doubtful:
        return (
            f"finite differences of {list(doubtful)} are themselves unreliable: use float64, "
            "fewer steps or a smaller learning rate"
        )
    if cosine > 0:
        return "the estimate is biased, but still points downhill"
    return "the estimate points uphill: do not tune with it here"


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm().clamp_min(torch.finfo(truth.dtype).tiny))


def _shown(value: Tensor) -> str:
    return f"{float(value):.6g}" if not value.ndim else f"‖·‖ {float(value.norm()):.4g}"


__all__ = ["Verdict", "check_hypergradient"]
