"""Steps between two that are tracked. Truth: sums written out, and a run that was not stopped."""

import pytest
import torch
from torch import nn

import selftune as st

STEPS = 12
LAST = st.Average(0.0)


def train(weight: nn.Parameter, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        noise = torch.Generator().manual_seed(step)
        weight.grad = torch.randn(3, generator=noise)
        opt.step()


def sgd(weight: nn.Parameter, **options) -> st.optim.SelfTuningOptimizer:
    return st.SGD([weight], lr=0.1, tune=("lr",), probe=False, **options)


def sensitivity(opt: st.optim.SelfTuningOptimizer, weight: nn.Parameter) -> torch.Tensor:
    """Of the last iterate, where nothing is averaged, to the log of the rate."""
    return opt.state[weight]["sensitivity/0"]


@pytest.mark.parametrize("stride", [1, 3, 4])
def test_what_weights_moved_is_their_sensitivity_to_the_log_of_the_rate(stride: int) -> None:
    """Closed form without discount: w₁₂ − w₀, whichever steps are tracked."""
    weight = nn.Parameter(torch.zeros(3))
    opt = sgd(weight, estimator=st.Trace(1.0, stride=stride), average=LAST)
    train(weight, opt, range(STEPS))
    torch.testing.assert_close(sensitivity(opt, weight), weight.detach())


def test_discounted_sensitivities_count_a_stride_evenly() -> None:
    """The sum written out: J₊ = γᵏ J + moved; (1 + γ + … + γᵏ⁻¹)/k waits for the hypergradient."""
    weight = nn.Parameter(torch.zeros(3))
    opt = sgd(weight, estimator=st.Trace(0.9, stride=4), average=LAST)
    want, last = torch.zeros(3), torch.zeros(3)
    for start in range(0, STEPS, 4):
        train(weight, opt, range(start, start + 4))
        want = 0.9**4 * want + (weight.detach() - last)
        last = weight.detach().clone()
    torch.testing.assert_close(sensitivity(opt, weight), want)


def test_a_run_is_saved_in_the_middle_of_a_stride() -> None:
    weights = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    whole, halves = (sgd(w) for w in weights)
    train(weights[0], whole, range(STEPS))
    train(weights[1], halves, range(6))
    again = sgd(weights[1])
    again.load_state_dict(halves.state_dict())
    train(weights[1], again, range(6, STEPS))
    for key in ("recent/0", "sensitivity/0", "average"):
        assert torch.equal(whole.state[weights[0]][key], again.state[weights[1]][key]), key


def test_averages_short_of_a_stride_take_in_every_step() -> None:
    weight = nn.Parameter(torch.zeros(3))
    opt = sgd(weight, average=st.Average(0.0))
    for step in range(STEPS):
        train(weight, opt, range(step, step + 1))
        with opt.averaged():
            shown = weight.detach().clone()
        assert torch.equal(shown, weight.detach())


def test_a_rewind_forgets_what_was_moved() -> None:
    weight = nn.Parameter(torch.zeros(3))
    opt = sgd(weight)
    train(weight, opt, range(6))
    assert sensitivity(opt, weight).any()
    for _ in range(3):
        opt.report(torch.nan)
    assert not sensitivity(opt, weight).any()
    assert torch.equal(opt.state[weight]["recent/0"], weight.detach())
    assert torch.equal(opt.state[weight]["average"], weight.detach())


def test_averages_and_sensitivities_take_in_every_fourth_step() -> None:
    """The sum written out, through steps that one kernel takes."""
    weight = nn.Parameter(torch.ones(3))
    opt = st.SGD(
        [weight], lr=0.1, momentum=0.9, weight_decay=0.1, probe=False, guard=False, every=10,
        tune=("lr", "weight_decay"), hyper_optimizer=lambda raw: torch.optim.SGD(raw, lr=0.0),
    )  # fmt: skip
    average, averaging = torch.ones(3), st.Average()

    def known() -> torch.Tensor:
        """To the rate, and of a weight of 1 to its decay."""
        state = opt.state[weight]
        return torch.cat([state["sensitivity/0"], state["decay"].view(1)])

    before = torch.zeros(4)
    for step in range(1, 45):
        train(weight, opt, range(step, step + 1))
        opt.hyper_step(lambda: weight.square().sum())
        if step % 4 == 0:
            average = torch.lerp(average, weight.detach(), averaging.weight(step, 4))
        torch.testing.assert_close(opt.state[weight]["average"], average)
        moved = known() != before
        assert bool(moved.all() if step % 4 == 0 else not moved.any()), step
        before = known()
