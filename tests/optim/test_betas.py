"""The betas that a sweep leaves. Truth: the values."""

from typing import Any

import pytest
import torch
from torch import nn

import selftune as st


def begun(beta1: float, **options: Any) -> float:
    """β₁ of an optimizer right after its sweep."""
    weight = nn.Parameter(torch.ones(2))
    opt = st.AdamW([weight], betas=(beta1, 0.999), probe=10, **options)
    for _ in range(11):
        weight.grad = weight.detach().clone()
        opt.step()
    return float(opt.param_groups[0]["betas"][0])


SHORT = [
    (1500, 0.99, 0.8),
    (1500, 0.9, 0.8),
    (1500, 0.5, 0.5),
    (3000, 0.99, 0.9),
    (100, 0.9, 2 / 3),
]


@pytest.mark.parametrize(("steps", "given", "after"), SHORT)
def test_beta1_goes_on_with_a_memory_that_fits_the_run(
    steps: int, given: float, after: float
) -> None:
    """Closed form: 1 − 300/T at most, but for a memory of 3; in the optimizers and the tuner."""
    assert begun(given, total_steps=steps) == pytest.approx(after)
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(4)]
    made = st.Tuner(
        nn.Linear(3, 1), nn.functional.mse_loss, hparams={"beta1": given}, probe=8, compile=False,
        tune=("lr", "beta1"), bounds={"beta1": (0.1, 0.999)},
    )  # fmt: skip
    ends = [lambda progress: True]
    result = made.fit(
        batches, batches, steps=steps, evaluate_every=9, callbacks=ends, progress=False
    )
    assert result.history["beta1"][0] == pytest.approx(after)


BETA2 = [(300, 0.99), (2000, 0.99), (10_000, 0.998), (20_000, 0.999), (10**6, 0.999), (None, 0.999)]


@pytest.mark.parametrize("shell", [st.Adam, st.AdamW])
@pytest.mark.parametrize(("steps", "beta2"), BETA2)
def test_beta2_remembers_a_twentieth_of_the_run(
    shell: Any, steps: int | None, beta2: float
) -> None:
    """Closed form: from 100 gradients to the usual 1000, which it is where nobody knows."""
    net = nn.Linear(2, 1)
    for given in ({}, {"betas": None}):
        opt = shell(net, total_steps=steps, **given)
        assert opt.param_groups[0]["betas"] == (0.9, pytest.approx(beta2))


@pytest.mark.parametrize(
    "options",
    [
        dict(betas=(0.9, 0.999)),
        dict(tune=()),
        dict(tune=("weight_decay",)),
        dict(betas=None, tune=()),
    ],
)
def test_a_beta2_that_is_given_or_of_a_rate_that_is_not_tuned_is_torchs(options: Any) -> None:
    """Law: what somebody gives is theirs, and an optimizer that tunes no rate is torch's."""
    opt = st.AdamW(nn.Linear(2, 1), total_steps=300, **options)
    assert opt.param_groups[0]["betas"] == (0.9, 0.999)


def test_without_a_known_length_the_usual_beta1_stays() -> None:
    """Law: what nobody knows to be short is taken as it is given."""
    assert begun(0.9) == pytest.approx(0.9)


def test_a_beta1_that_is_not_tuned_or_not_swept_stays() -> None:
    """Law: what is not tuned is the user's, and so is where a run without a sweep starts."""
    assert begun(0.95, tune=("lr",), total_steps=400) == 0.95
    weight = nn.Parameter(torch.ones(2))
    opt = st.AdamW([weight], betas=(0.9, 0.999), probe=False, total_steps=400)
    weight.grad = weight.detach().clone()
    opt.step()
    assert opt.param_groups[0]["betas"][0] == pytest.approx(0.9)


def test_betas_that_are_none_are_those_of_the_optimizer() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    assert st.Muon(net, betas=None).param_groups[0]["betas"] == (0.9, 0.999)
    with pytest.raises(TypeError, match="betas=None"):
        st.Lion(net, betas=None)  # type: ignore[arg-type]
