"""Self-tuned optimizers in training frameworks: one module for each, installed as an extra.

``selftune.integrations.lightning``, ``.transformers``, ``.skorch`` and ``.ignite`` import their
framework; this package and ``import selftune`` need none. Accelerate only needs :func:`unwrap`.
"""

from selftune.integrations._batches import ValidationBatches
from selftune.integrations._unwrapping import unwrap

__all__ = ["ValidationBatches", "unwrap"]
