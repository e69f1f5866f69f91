"""Self-tuned optimizers inside training frameworks: one module a framework, each an extra.

``selftune.integrations.lightning``, ``.transformers``, ``.skorch`` and ``.ignite`` import their
framework; this package and ``import selftune`` need none. Accelerate needs :func:`unwrap` alone.
"""

from selftune.integrations._batches import ValidationBatches
from selftune.integrations._unwrapping import unwrap

__all__ = ["ValidationBatches", "unwrap"]
