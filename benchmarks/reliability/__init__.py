"""What may go wrong with a run, made to go wrong: ``python -m benchmarks.reliability``."""
