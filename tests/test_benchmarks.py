"""Every benchmark can be imported. Truth: Python's import."""

import importlib
import pkgutil

import pytest

import benchmarks

NAMES = [m.name for m in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith("__main__")])
def test_a_benchmark_can_be_imported(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("selftune", "benchmarks", ""):
            raise
        pytest.skip(f"needs the extra bench ({missing} is not installed)")
