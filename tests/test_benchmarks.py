"""Every benchmark can be imported; a model of letters looks back alone. Truth: by hand."""

import importlib
import pkgutil

import pytest
import torch

import benchmarks
from benchmarks.heads import LENGTH, Letters

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


def test_the_model_of_letters_does_not_see_the_next_one() -> None:
    model = Letters(65, 32)
    letters = torch.randint(65, (2, LENGTH))
    others = letters.clone()
    others[:, 40:] = torch.randint(65, (2, LENGTH - 40))
    before, after = model(letters), model(others)
    assert torch.allclose(before[:, :40], after[:, :40], atol=1e-5)
    assert not torch.allclose(before[:, 40:], after[:, 40:], atol=1e-2)
