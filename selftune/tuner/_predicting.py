"""What the validation loss would be at other hyperparameters, without training again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from selftune.tuner._training import Training


@torch.no_grad()
def predict(
    training: Training, asked: Mapping[str, Sequence[float]], most: int | None = None
) -> NDArray[Any]:
    """The loss over the validation set at the averaged weights moved by ``J δ``.

    Args:
        training: A run.
        asked: Values of one or two hyperparameters by name.
        most: Batches of the validation set at most.

    Raises:
        ValueError: Not one or two names, one without a response, or values out of bounds.
    """
    bilevel, followed = training.bilevel, training.fused.followed
    if not 1 <= len(asked) <= 2:
        raise ValueError(f"predict({', '.join(asked)}): name one or two hyperparameters")
    known = [] if followed is None else bilevel.followed
    for name, values in asked.items():
        if name not in known:
            raise ValueError(
                f"predict({name}=…): its response was not learned, only those of {known}: tune it "
                "with estimator=BestResponse(), or BestResponse(update=True) for the update's"
            )
        hparam = bilevel.hyper.hparams[name]
        if not all(hparam.lower <= v <= hparam.upper for v in values):
            raise ValueError(
                f"predict({name}={list(values)}): values must be between {hparam.lower:g} and "
                f"{hparam.upper:g}"
            )
    assert followed is not None
    run = training.fused.run
    present = dict(zip(bilevel.hyper.names, run.hyper.raw, strict=True))
    found = []
    for values in itertools.product(*asked.values()):
        move = {n: torch.zeros_like(present[n]) for n in known}
        for name, value in zip(asked, values, strict=True):
            scale = bilevel.hyper.hparams[name].bijection
            move[name] = scale.inverse(torch.full_like(present[name], value)) - present[name]
        shift = followed.shift(run, torch.stack([move[n] for n in known]))
        weights = [w.average + s for w, s in zip(run.weights, shift, strict=True)]
        found.append(training.scorer.loss(weights, run.average_buffers, training.val, most))
    return np.asarray(found).reshape([len(v) for v in asked.values()])
