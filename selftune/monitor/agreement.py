"""Agreement of changes of the validation loss with predictions from hypergradients."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from selftune._arguments import COUNT, checked


class Agreement:
    """Agreement of predicted and realised changes of the validation loss.

    The prediction is ``Σ g Δz``, hypergradients times changes of the hyperparameters; the realised
    value is the change of the running mean of the loss. Their agreement is
    ``Σ p r / √(Σ p² Σ r²)`` over the last intervals: near 1 if changes of hyperparameters dominate
    the loss, around 0 if training or noise does.

    Args:
        looks: Number of intervals.
    """

    @checked(looks=COUNT)
    def __init__(self, looks: int = 20) -> None:
        self._pairs: deque[tuple[float, float]] = deque(maxlen=looks)
        self._last: tuple[list[float], float] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state as plain containers."""
        raw, loss = self._last or (None, None)
        return {"pairs": [[*pair] for pair in self._pairs], "raw": raw, "loss": loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._pairs.clear()
        self._pairs.extend((p, r) for p, r in state["pairs"])
        raw = state["raw"]
        self._last = None if raw is None else (list(raw), float(state["loss"]))

    def look(
        self, grads: Sequence[float], raw: Sequence[float], loss: float
    ) -> list[tuple[str, float]]:
        """Rows of the log; none at the first call.

        Args:
            grads: Mean recent hypergradients in raw space.
            raw: Current raw values.
            loss: Current running mean of the validation loss.
        """
        before, self._last = self._last, (list(raw), loss)
        if before is None or len(before[0]) != len(raw):  # a parameter group was added
            return []
        moved = zip(grads, raw, before[0], strict=True)
        predicted = sum(g * (now - then) for g, now, then in moved)
        realised = loss - before[1]
        rows = [("response/predicted", predicted), ("response/realised", realised)]
        if math.isfinite(predicted) and math.isfinite(realised):
            self._pairs.append((predicted, realised))
        size = math.sqrt(sum(p * p for p, _ in self._pairs) * sum(r * r for _, r in self._pairs))
        if size > 0:
            rows.append(("response/agreement", sum(p * r for p, r in self._pairs) / size))
        return rows
