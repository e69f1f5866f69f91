"""Inspection of a run: scalars for TensorBoard."""

from selftune.monitor._base import Monitor, Writer, hyper_rows

__all__ = ["Monitor", "Writer", "hyper_rows"]
