"""Random states. Truth: the numbers that the generators draw."""

import random

import numpy as np
import pytest
import torch

from selftune import _modes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_states_are_restored_whatever_the_default_device(device: str) -> None:
    """Private, as checkpoints hold the states: a default device must not receive them."""
    with torch.device(device):
        states = _modes.random_states()
        drawn = torch.rand(1, device="cpu").item(), random.random(), np.random.random()  # noqa: NPY002
        _modes.restore_random_states(states)
    assert (torch.rand(1).item(), random.random(), np.random.random()) == drawn  # noqa: NPY002
