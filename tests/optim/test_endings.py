"""The end of a run of known length. Truth: where the validation loss was lowest."""

import pytest
import torch
from torch import Tensor, nn

import selftune as st

STEPS, BEST = 100, 8.0


def climb(validation, guard: bool = True) -> tuple[nn.Parameter, st.optim.SelfTuned]:
    """A weight that grows by 0.1 a step, to 10, whatever validation says."""
    weight = nn.Parameter(torch.zeros(()))
    opt = st.SGD(
        [weight], lr=0.1, momentum=0.0, tune=(), probe=False, total_steps=STEPS, every=5,
        schedule="constant", average=st.Average(0.0), guard=guard,
    )  # fmt: skip
    for _ in range(STEPS):
        opt.zero_grad()
        (-weight).backward()
        opt.step()
        opt.hyper_step(lambda: validation(weight))
    return weight, opt


def shown(weight: Tensor, opt: st.optim.SelfTuned) -> float:
    with opt.averaged():
        return float(weight.detach())


def test_a_run_that_has_worsened_ends_at_its_good_weights() -> None:
    """(w − 8)² is lowest at step 80, too late for the guard's alarm."""
    weight, opt = climb(lambda w: (w - BEST).square())
    assert float(weight.detach()) == pytest.approx(10.0, abs=1e-4)
    assert shown(weight, opt) == pytest.approx(BEST, abs=1.0)
    assert float(weight.detach()) == pytest.approx(10.0, abs=1e-4)


def test_a_run_that_still_improves_ends_at_its_average() -> None:
    weight, opt = climb(lambda w: (w - 20).square())
    assert shown(weight, opt) == pytest.approx(10.0, abs=1e-4)


def test_noise_alone_brings_nothing_back() -> None:
    """A flat loss: the good weights were only lucky."""
    generator = torch.Generator().manual_seed(0)
    weight, opt = climb(lambda w: 0 * w + torch.rand((), generator=generator))
    assert shown(weight, opt) == pytest.approx(10.0, abs=1e-4)


def test_without_a_guard_the_average_stays() -> None:
    weight, opt = climb(lambda w: (w - BEST).square(), guard=False)
    assert shown(weight, opt) == pytest.approx(10.0, abs=1e-4)


def test_a_run_that_goes_on_shows_its_average_again() -> None:
    weight, opt = climb(lambda w: (w - BEST).square())
    for _ in range(5):
        opt.zero_grad()
        (-weight).backward()
        opt.step()
        opt.hyper_step(lambda: (weight - BEST).square())
    assert shown(weight, opt) == pytest.approx(float(weight.detach()), abs=1e-4)


def test_what_is_shown_at_the_end_is_saved() -> None:
    weight, opt = climb(lambda w: (w - BEST).square())
    expected = shown(weight, opt)
    again = nn.Parameter(weight.detach().clone())
    copy = st.SGD(
        [again], lr=0.1, momentum=0.0, tune=(), probe=False, total_steps=STEPS, every=5,
        schedule="constant", average=st.Average(0.0),
    )  # fmt: skip
    copy.load_state_dict(opt.state_dict())
    assert shown(again, copy) == expected


def test_batch_norm_shows_the_good_statistics_with_the_good_weights() -> None:
    """Inputs drift by 0.1 a step, so a running mean tells the step that it belongs to."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(1, affine=False, momentum=1.0)
    weight = nn.Parameter(torch.zeros(()))
    opt = st.SGD(
        [weight], lr=0.1, momentum=0.0, tune=(), probe=False, total_steps=STEPS, every=5,
        schedule="constant", average=st.Average(0.0), model=norm,
    )  # fmt: skip

    def validation() -> Tensor:
        norm.eval()
        loss = (weight - BEST).square() + 0 * norm(torch.ones(2, 1)).sum()
        norm.train()
        return loss

    for step in range(STEPS):
        opt.zero_grad()
        norm(0.1 * step + torch.randn(16, 1))
        (-weight).backward()
        opt.step()
        opt.hyper_step(validation)
    before = float(norm.running_mean)
    with opt.averaged():
        assert float(weight.detach()) == pytest.approx(BEST, abs=1.0)
        inside = float(norm.running_mean)
    assert inside < before - 1.0
    assert float(norm.running_mean) == before
