"""Training and validation batches from the arguments ``train`` and ``val``."""

from __future__ import annotations

import logging
from numbers import Real
from typing import Any

from selftune.holdout import HoldOut, split

log = logging.getLogger("selftune")


def parts(train: Any, val: Any, seed: int) -> tuple[Any, Any, HoldOut | None, float | None]:
    """Training and validation batches; settings of the join and share of a split, if any."""
    if val is None or isinstance(val, HoldOut):
        holding = HoldOut() if val is None else val
        given = f"val=None (a held-out share of {holding.share})" if val is None else f"val={val}"
        return *split(train, holding.share, seed, given), holding, float(holding.share)
    if isinstance(val, Real):
        share = float(val)
        if not 0 < share < 1:
            raise ValueError(
                f"val={val} must be between 0 and 1, or a loader of validation batches"
            )
        return *split(train, share, seed, f"val={val}"), None, share
    if val is train:
        log.warning("val is train: regularization cannot be tuned on the training data")
    return train, val, None, None
