"""Benchmarks: every figure the project quotes is printed by a module of this package."""
