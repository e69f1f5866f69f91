"""The end of a run of known length. Truth: where the validation loss is lowest."""

import pytest
import torch
from torch import Tensor, nn

import selftune as st

STEPS, BEST = 100, 8.0


def climb(
    validation,
    guard: bool = True,
    keeps: float = 0.0,
    period: int = 1,
    recorder: st.monitor.InMemory | None = None,
) -> tuple[nn.Parameter, st.optim.SelfTuningOptimizer]:
    """A weight that grows by 0.1 a step, to 10, whatever validation says."""
    weight = nn.Parameter(torch.zeros(()))
    opt = st.SGD(
        [weight], lr=0.1, momentum=0.0, tune=(), probe=False, total_steps=STEPS, every=5,
        schedule="constant", average=st.Average(keeps), guard=guard, log_dir=recorder,
    )  # fmt: skip
    for step in range(1, STEPS + 1):
        opt.zero_grad()
        (-weight).backward()
        opt.step()
        if step % period == 0:
            opt.hyper_step(lambda: validation(weight))
    opt.flush()
    return weight, opt


def shown(weight: Tensor, opt: st.optim.SelfTuningOptimizer) -> float:
    with opt.averaged():
        return float(weight.detach())


def test_a_run_that_has_worsened_ends_at_its_good_weights() -> None:
    """(w − 8)² is lowest at step 80, too late for the guard's alarm."""
    weight, opt = climb(lambda w: (w - BEST).square())
    assert float(weight.detach()) == pytest.approx(10.0, abs=1e-4)
    assert shown(weight, opt) == pytest.approx(BEST, abs=1.0)
    assert float(weight.detach()) == pytest.approx(10.0, abs=1e-4)


def test_a_run_that_still_improves_ends_at_its_average(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "selftune"):
        weight, opt = climb(lambda w: (w - 20).square())
    assert shown(weight, opt) == pytest.approx(10.0, abs=1e-4)
    assert [r.message for r in caplog.records] == ["SGD: final weights: the running average"]


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize(
    ("best", "expected"), [(9.7, 9.7), (20.0, 10.0), (9.95, 9.95), (9.3, 0.0), (-20.0, None)]
)
def test_the_end_lies_where_the_loss_is_lowest_on_the_way_from_the_average(
    best: float, expected: float | None, guard: bool
) -> None:
    """A quadratic loss, whose slopes give its lowest point; batches differ by far more."""

    def validation(w: Tensor) -> Tensor:
        return (w - best).square() + 100 * torch.rand(())

    torch.manual_seed(0)
    recorder = st.monitor.InMemory()
    weight, opt = climb(validation, guard, keeps=0.9, period=10, recorder=recorder)
    average = float(opt.state[weight]["average"])
    position = recorder.curve("weights/position")[1][-1]
    assert 9.0 < average < 9.3
    if best < 0:  # all ways lead uphill; without a guard there is none back
        assert position == (-1.0 if guard else 0.0)
    elif best < (average + 10.0) / 2:  # the last weights are worse
        assert position == expected
    else:
        assert shown(weight, opt) == pytest.approx(expected, abs=1e-3)


def test_a_loop_that_always_asks_is_judged_a_step_before_its_end() -> None:
    """The weight moves on by 0.1, and with it what lies at a share of the way."""
    recorder = st.monitor.InMemory()
    weight, opt = climb(lambda w: (w - 9.7).square(), keeps=0.9, recorder=recorder)
    assert recorder.curve("weights/position")[0] == [STEPS - 1]
    assert shown(weight, opt) == pytest.approx(9.8, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["own generator", "torch's generator"])
def test_noise_alone_brings_nothing_back(own: bool) -> None:
    """A flat loss in the mean: only luck brings a run back, of four places that share theirs."""
    returned = 0
    generator = torch.Generator() if own else torch.default_generator
    generator.manual_seed(0)
    for _ in range(30):
        recorder = st.monitor.InMemory()
        climb(lambda w, g=generator: 5 + (torch.rand((), generator=g) - 0.5) * w, recorder=recorder)
        returned += recorder.curve("weights/position")[1][-1] < 0
    assert returned <= 17  # of 30 at 30 %: less likely than 0.2 %


def test_the_comparison_draws_batches_as_training_would() -> None:
    """Law: torch's generator gives a closure other numbers at every call, and then goes on.

    After all comparing, the stream stands where it would have stood without.
    """
    seen: list[float] = []

    def validation(w: Tensor) -> Tensor:
        seen.append(float(torch.rand(())))
        return (w - BEST).square()

    torch.manual_seed(0)
    climb(validation)
    after = float(torch.rand(()))
    assert len(set(seen[-16:])) == 16
    torch.manual_seed(0)
    draws = torch.stack([torch.rand(()) for _ in range(60)]).tolist()
    assert after in draws


def test_without_a_guard_no_good_weights_are_shown() -> None:
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


@pytest.mark.parametrize(("best", "keeps"), [(BEST, 0.0), (9.5, 0.9)], ids=["good", "on the way"])
def test_what_is_shown_at_the_end_is_saved(best: float, keeps: float) -> None:
    weight, opt = climb(lambda w: (w - best).square(), keeps=keeps)
    expected = shown(weight, opt)
    again = nn.Parameter(weight.detach().clone())
    copy = st.SGD(
        [again], lr=0.1, momentum=0.0, tune=(), probe=False, total_steps=STEPS, every=5,
        schedule="constant", average=st.Average(keeps),
    )  # fmt: skip
    copy.load_state_dict(opt.state_dict())
    assert shown(again, copy) == expected


@pytest.mark.parametrize(
    ("best", "earlier"), [(BEST, 1.0), (20.0, 0.0)], ids=["good weights", "last weights"]
)
def test_batch_norm_shows_the_statistics_that_belong_to_the_weights(
    best: float, earlier: float
) -> None:
    """Inputs drift by 0.1 a step, so a running mean tells the step that it belongs to."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(1, affine=False, momentum=1.0)
    weight = nn.Parameter(torch.zeros(()))
    opt = st.SGD(
        [weight], lr=0.1, momentum=0.0, tune=(), probe=False, total_steps=STEPS, every=5,
        schedule="constant", average=st.Average(0.0 if earlier else 0.9), model=norm,
    )  # fmt: skip

    def validation() -> Tensor:
        norm.eval()
        loss = (weight - best).square() + 0 * norm(torch.ones(2, 1)).sum()
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
        assert float(weight.detach()) == pytest.approx(min(best, 10.0), abs=1.0)
        inside = float(norm.running_mean)
    assert inside < before - 1.0 if earlier else inside == before
    assert float(norm.running_mean) == before
