"""Bad arguments. Truth: the issue's list; the error names argument, value and remedy."""

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import selftune as st


def param(*size: int, **options) -> nn.Parameter:
    return nn.Parameter(torch.ones(*size or (2,), **options))


def frozen(**options) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, **options), requires_grad=False)


def twice() -> list[nn.Parameter]:
    return [param()] * 2


def sparse() -> nn.Parameter:
    return nn.Parameter(torch.ones(2).to_sparse())


# What is built, and what the message must name: argument, value, remedy.
BUILDS: dict[str, tuple[Callable, list[str]]] = {
    "lr 0": (lambda: st.SGD([param()], lr=0.0), ["lr=0.0", "above 0"]),
    "lr < 0": (lambda: st.Adam([param()], lr=-0.1), ["lr=-0.1", "above 0"]),
    "lr nan": (lambda: st.SGD([param()], lr=float("nan")), ["lr=nan", "above 0"]),
    "lr inf": (lambda: st.SGD([param()], lr=torch.tensor(torch.inf)), ["lr=", "inf", "finite"]),
    "group lr": (lambda: st.SGD([{"params": [param()], "lr": -1.0}]), ["lr=-1.0", "above 0"]),
    "momentum": (lambda: st.SGD([param()], momentum=1.0), ["momentum=1.0", "below 1"]),
    "betas": (lambda: st.Adam([param()], betas=(0.9, 1.0)), [r"betas=\(0.9, 1.0\)", "below 1"]),
    "betas list": (lambda: st.Adam([param()], betas=[0.9, 1.5]), ["betas=", "1.5", "below 1"]),
    "decay": (lambda: st.AdamW([param()], weight_decay=-1.0), ["weight_decay=-1.0", "0 or more"]),
    "nesterov": (lambda: st.SGD([param()], nesterov=True, dampening=0.1), ["(?i)nesterov", "0.1"]),
    "tune": (lambda: st.SGD([param()], tune=("lr", "beta1")), ["tune='beta1'", "momentum"]),
    "per": (lambda: st.SGD([param()], per="layer"), ["per='layer'", "tensor"]),
    "bounds": (lambda: st.SGD([param()], bounds={"lr": (1, 0.1)}), [r"bounds\['lr'\]", "below"]),
    "domain": (
        lambda: st.SGD([param()], bounds={"lr": (-1.0, 1.0)}),
        [r"bounds\['lr'\]", "above 0"],
    ),
    "capturable": (lambda: st.Adam([param()], capturable=True), ["capturable=True", "leave it"]),
    "every": (lambda: st.SGD([param()], every=0), ["every=0", "at least 1"]),
    "horizon": (lambda: st.SGD([param()], total_steps=0), ["total_steps=0", "at least 1"]),
    "schedule": (lambda: st.SGD([param()], schedule="cosine"), ["'cosine'", "total_steps="]),
    "probe": (lambda: st.SGD([param()], probe=1), ["probe=1", "at least 2"]),
    "empty": (lambda: st.SGD([]), ["params|parameter list", "empty"]),
    "twice": (lambda: st.SGD(twice()), [r"params: .*\[0\]\[1\] duplicates .*\[0\]\[0\]", "once"]),
    "two groups": (lambda: st.SGD([{"params": p} for p in twice()]), ["parameters", "more than"]),
    "sparse": (lambda: st.SGD([sparse()]), [r"param_groups\[0\]\[0\]", "sparse", "dense"]),
    "complex": (lambda: st.SGD([param(dtype=torch.cfloat)]), ["complex64", "view_as_real"]),
    "integer": (lambda: st.SGD([frozen(dtype=torch.int)]), ["int32", "floating-point"]),
    "named": (lambda: st.SGD([("w", param(dtype=torch.cfloat))]), ["params", "w is complex"]),
    "devices": (lambda: st.SGD([param(), param(device="meta")]), ["meta", "cpu", "one device"]),
    "dtypes": (lambda: st.SGD([param(), param(dtype=torch.double)]), ["float64", "one dtype"]),
    "half": (lambda: st.SGD([param(dtype=torch.half), param(dtype=torch.double)]), ["one dtype"]),
}


def check_message(error: pytest.ExceptionInfo, words: list[str]) -> None:
    for word in words:
        assert re.search(word, str(error.value)), f"{word!r} is missing in {error.value}"


@pytest.mark.parametrize("case", BUILDS)
def test_what_cannot_be_built(case: str) -> None:
    # "nesterov" with dampening is accepted, torch refuses it.
    build, words = BUILDS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError) as error:  # noqa: PT011 - words are checked below
            build()
    check_message(error, words)


TYPES: dict[str, tuple[Callable, list[str]]] = {
    "estimator": (lambda: st.SGD([param()], estimator="trace"), ["estimator='trace'", "Trace"]),
    "tune str": (lambda: st.SGD([param()], tune="lr"), ["tune='lr'", r"\['lr'\]"]),
    "penalty": (lambda: st.SGD([param()], penalty="l1"), ["penalty='l1'", "L1"]),
    "steps": (lambda: st.SGD([param()], total_steps=9.0), ["total_steps=9.0", "whole number"]),
    "rule": (lambda: st.Tuner(net(), nn.MSELoss(), rule="adam"), ["rule='adam'", "AdamW"]),
    "tuner": (lambda: st.Tuner(net(), nn.MSELoss(), estimator="x"), ["estimator='x'", "Trace"]),
    "tuner's": (lambda: st.Tuner(net(), nn.MSELoss(), penalty="l1"), ["penalty='l1'", "L1"]),
}


def net() -> nn.Module:
    return nn.Linear(2, 1)


@pytest.mark.parametrize("case", TYPES)
def test_what_is_of_another_type(case: str) -> None:
    build, words = TYPES[case]
    with pytest.raises(TypeError) as error:
        build()
    check_message(error, words)
