"""The two ways in which steps are taken, for tests that hold in both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["eager", "graph"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Numbers that the host looks at, or tensors as in graphs and under torch's transforms."""
    with torch.set_grad_enabled(request.param == "graph"):
        yield
