"""The gradient noise scale: the batch size above which larger batches help little."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from selftune._arguments import Number, checked


class NoiseScale:
    """Estimates ``B = tr Σ / ‖G‖²`` from the gradients of micro-batches and of the full batch.

    Σ is the covariance of the gradient of one example and G its mean. A gradient over b examples
    has ``E ‖g_b‖² = ‖G‖² + tr Σ / b``, so two batch sizes determine both::

        ‖G‖² ≈ (b_big ‖g_big‖² − b_small ‖g_small‖²) / (b_big − b_small)
        tr Σ ≈ (‖g_small‖² − ‖g_big‖²) / (1/b_small − 1/b_big)

    Each is averaged over steps before the ratio is taken, because the ratio of single estimates is
    biased. Training with batches of B examples takes about twice as many steps as with noise-free
    gradients, and about twice as many examples as with a batch size of one.

    With gradient accumulation, the estimate needs one copy of the gradients and no extra pass::

        for x, y in parts:                          # k parts of equal size
            (loss_fn(model(x), y) / k).backward()
            scale.micro_batch(model.parameters())
        scale.whole_batch(examples)                 # before the optimizer clears the gradients

    Args:
        memory: Steps over which both estimates are averaged.

    Raises:
        ValueError: ``memory`` is below 1.

    Examples:
        >>> scale = NoiseScale()
        >>> scale.observe(1 + 6 / 2, 1 + 6 / 8, 2, 8)  # ‖G‖² = 1 and tr Σ = 6
        >>> round(scale.value, 6)
        6.0

    Source: McCandlish et al. 2018, appendix A.1.
    """

    @checked(memory=Number(least=1, finite=False))
    def __init__(self, memory: float = 50.0) -> None:
        self.memory = float(memory)
        self.forget()
        self._sum: list[Tensor] | None = None
        self._norms: list[Tensor] = []

    @property
    def value(self) -> float:
        """B in examples: NaN before the first observation, inf if noise dominates the gradient."""
        if self._weight == 0:
            return math.nan
        if self._signal <= 0:
            return math.inf
        return max(0.0, self._noise / self._signal)

    def observe(
        self, small: float | Tensor, big: float | Tensor, small_size: float, big_size: float
    ) -> None:
        """Update the estimates with the gradients of one step.

        Args:
            small: ‖g_small‖², the mean over the micro-batches, or over data-parallel ranks.
            big: ‖g_big‖², of the mean of their gradients.
            small_size: Examples in each micro-batch; their harmonic mean if they differ.
            big_size: Examples in the whole batch.

        Raises:
            ValueError: ``1 ≤ small_size < big_size`` does not hold.
        """
        if not 1 <= small_size < big_size:
            raise ValueError(
                f"small_size={small_size} and big_size={big_size}: a micro-batch must be smaller "
                "than the batch; split each batch into at least two parts"
            )
        a, b = float(small), float(big)
        if not (math.isfinite(a) and math.isfinite(b)):
            return  # skip this step
        signal = (big_size * b - small_size * a) / (big_size - small_size)
        noise = (a - b) / (1 / small_size - 1 / big_size)
        share = 1 / self.memory
        self._signal += share * (signal - self._signal)
        self._noise += share * (noise - self._noise)
        self._weight += share * (1 - self._weight)

    def forget(self) -> None:
        """Start anew, for example at other weights."""
        self._signal, self._noise, self._weight = 0.0, 0.0, 0.0

    def micro_batch(self, params: Iterable[Tensor]) -> None:
        """Record ``.grad`` after the backward pass of a micro-batch (mean loss divided by k).

        Raises:
            ValueError: No parameter has a gradient, others than before have one, or a gradient is
                sparse.
        """
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            raise ValueError("params have no gradients: call loss.backward() first")
        if any(g.is_sparse for g in grads):
            raise ValueError(
                "params have sparse gradients, whose parts cannot be compared: pass sparse=False "
                "to nn.Embedding and nn.EmbeddingBag, or leave these parameters out"
            )
        before = self._sum
        if before is not None and len(before) != len(grads):
            raise ValueError(
                f"{len(grads)} parameters have gradients after this micro-batch, but "
                f"{len(before)} after the previous one: use the same parameters in each"
            )
        with torch.no_grad():
            parts = [g.clone() for g in grads] if before is None else [
                g - s for g, s in zip(grads, before, strict=True)
            ]  # fmt: skip
            self._norms.append(squared_norm(parts))
            self._sum = parts if before is None else [g.clone() for g in grads]

    def whole_batch(self, size: int) -> None:
        """Finish a step of ``size`` examples, after all its micro-batches were recorded.

        Raises:
            ValueError: There are fewer than two micro-batches, or their sizes are not equal.
        """
        count, total = len(self._norms), self._sum
        if count < 2 or total is None or size % count:
            self._sum, self._norms = None, []
            raise ValueError(
                f"size={size} examples in {count} micro-batches: at least two, of equal size, are "
                "needed. Call micro_batch after the backward pass of each"
            )
        # .grad holds the sum of g_i / k, so that a part is g_i / k and the sum is g_big
        small = torch.stack(self._norms).mean() * count**2
        self._sum, self._norms = None, []
        self.observe(small, squared_norm(total), size // count, size)

    def state_dict(self) -> dict[str, Any]:
        """Both averages."""
        return {"signal": self._signal, "noise": self._noise, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self._signal, self._noise = float(state["signal"]), float(state["noise"])
        self._weight = float(state["weight"])


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of squares of several tensors, in float64."""
    norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.promote_types(t.dtype, torch.float32))
             for t in tensors]  # fmt: skip
    return torch.stack([n.double() for n in norms]).square().sum()
