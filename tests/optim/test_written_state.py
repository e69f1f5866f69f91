"""State that is cleared, replaced or carried in ``opt.state``. Truth: torch's optimizers."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selftune as st

PLAIN: dict[str, Any] = {"tune": (), "probe": False, "guard": False}
TUNED: dict[str, Any] = {"tune": ("lr",), "probe": False}
RULES = {
    "SGD": (st.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (st.AdamW, torch.optim.AdamW, {"lr": 0.1}),
}
MOMENTA = {"momentum_buffer", "exp_avg", "exp_avg_sq"}


def anew(opt: Any) -> None:
    opt.state = defaultdict(dict)


def deleted(opt: Any) -> None:
    del opt.state[opt.param_groups[0]["params"][0]]


def replaced(opt: Any) -> None:
    for entry in opt.state.values():
        for key in MOMENTA & entry.keys():
            entry[key] = torch.full_like(entry[key], 0.5)


def zeroed(opt: Any) -> None:
    for entry in opt.state.values():
        for key in MOMENTA & entry.keys():
            entry[key].zero_()


CHANGES: dict[str, Callable[[Any], None]] = {
    "cleared": lambda opt: opt.state.clear(), "anew": anew, "deleted": deleted,
    "replaced": replaced, "zeroed": zeroed,
}  # fmt: skip


def steps(params: list[nn.Parameter], opt: Any, first: int, last: int) -> None:
    for seed in range(first, last):
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype) + 1
        opt.step()


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(2).double())]


def ends(
    rule: str, more: dict[str, Any], change: Callable[[list[nn.Parameter], Any], None]
) -> list[list[nn.Parameter]]:
    """The parameters of torch's run and of ours, with a change after five of nine steps."""
    ours, torchs, given = RULES[rule]
    found = []
    for make, own in ((torchs, {}), (ours, more)):
        params = parameters()
        opt = make(params, **given, **own)
        steps(params, opt, 0, 5)
        change(params, opt)
        steps(params, opt, 5, 9)
        opt.state_dict()
        found.append(params)
    return found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rule", RULES)
def test_state_is_taken_as_torch_takes_it(rule: str, change: str) -> None:
    runs = ends(rule, PLAIN, lambda params, opt: CHANGES[change](opt))
    for expected, found in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rule", RULES)
def test_the_changed_state_is_saved(rule: str, change: str) -> None:
    """Truth: the run that was not interrupted, bit for bit."""
    make, _, options = RULES[rule]
    params = parameters()
    opt = make(params, **options, **TUNED)
    steps(params, opt, 0, 5)
    CHANGES[change](opt)
    saved, weights = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    steps(params, opt, 5, 9)
    again = [nn.Parameter(w) for w in weights]
    resumed = make(again, **options, **TUNED)
    resumed.load_state_dict(saved)
    steps(again, resumed, 5, 9)
    for expected, found in zip(params, again, strict=True):
        assert torch.equal(expected, found)


def test_a_cleared_state_begins_averages_anew() -> None:
    """Truth: the weights themselves, of which the average consists then."""
    params = parameters()
    opt = st.AdamW(params, lr=0.1, **TUNED)
    steps(params, opt, 0, 5)
    opt.state.clear()
    with opt.averaged():
        found = [p.detach().clone() for p in params]
    assert all(torch.equal(f, p) for f, p in zip(found, params, strict=True))


def lengthened(opt: Any, more: Tensor) -> nn.Parameter:
    """As in 3D Gaussian splatting: the moments of a longer parameter, new ones are zero."""
    group = opt.param_groups[0]
    old = group["params"][0]
    entry = opt.state.pop(old)
    for key in MOMENTA & entry.keys():
        entry[key] = torch.cat([entry[key], torch.zeros_like(more)])
    new = nn.Parameter(torch.cat([old.detach(), more]))
    group["params"][0], opt.state[new] = new, entry
    return new


@pytest.mark.parametrize("options", [PLAIN, TUNED], ids=["plain", "tuned"])
@pytest.mark.parametrize("rule", RULES)
def test_state_is_carried_to_a_longer_parameter(rule: str, options: dict[str, Any]) -> None:
    def lengthen(params: list[nn.Parameter], opt: Any) -> None:
        params[0] = lengthened(opt, torch.zeros(2, dtype=torch.float64))

    for expected, found in zip(*ends(rule, options, lengthen), strict=True):
        # Nothing is tuned without validation data.
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_slice_restarts_where_the_parameter_grows() -> None:
    """Truth: the weights of a plain run; a slice of many weights has sensitivities."""
    runs = []
    for make, more in ((torch.optim.AdamW, {}), (st.AdamW, TUNED)):
        params = [nn.Parameter(torch.ones(60_000, dtype=torch.float64)), *parameters()]
        opt = make(params, lr=0.1, **more)
        steps(params, opt, 0, 3)
        params[0] = lengthened(opt, torch.zeros(70, dtype=torch.float64))
        steps(params, opt, 3, 6)
        opt.state_dict()
        runs.append(params)
    for expected, found in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_moments_of_another_length_are_named() -> None:
    params = parameters()
    opt = st.AdamW(params, lr=0.1, **TUNED)
    steps(params, opt, 0, 3)
    opt.state[params[1]]["exp_avg"] = torch.zeros(5, dtype=torch.float64)
    message = r"exp_avg' of param_groups\[0\]\[1\] has shape \(5,\), the parameter \(2,\)"
    with pytest.raises(ValueError, match=message):
        steps(params, opt, 3, 4)
