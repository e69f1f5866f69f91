"""Doctests of an integration are collected where its framework is installed (its extra)."""

import importlib.util
from pathlib import Path

_INTEGRATIONS = Path(__file__).parent / "selftune" / "integrations"
collect_ignore = [
    str(path)
    for path in _INTEGRATIONS.glob("[!_]*.py")
    if importlib.util.find_spec(path.stem) is None
]
