"""Batches of a tuner's run that follow the noise scale."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Outage, net, points, same, tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import selftune as st
from selftune.structure import Batches

VAL = [points(100, seed=1)]


def following(
    count: int = 400, *, workers: int = 0, whole: bool = False, **options: Any
) -> DataLoader[Any]:
    data = TensorDataset(*points(count))
    batches = Batches(data, **options)
    if whole:  # the dataset is indexed by lists
        return DataLoader(data, batch_size=None, sampler=batches)
    return DataLoader(data, batch_sampler=batches, num_workers=workers)


def sizes_of(loader: Any) -> Batches:
    found = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    assert isinstance(found, Batches)
    return found


class Custom:
    """A batch that is not a tensor."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples


class Slope(nn.Module):
    """Its gradient is the mean of the inputs, at any weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(200))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_the_noise_scale_is_that_of_the_data() -> None:
    """Closed form: gradients of examples with mean 1 and variance 48 in each direction."""
    torch.manual_seed(0)
    data = TensorDataset(1 + 48**0.5 * torch.randn(6000, 200), torch.zeros(6000))
    batches = Batches(data, start=8, most=512)
    options = dict(probe=False, guard=False, tune=(), rule=st.rules.SGD(), compile=False)
    slope = st.Tuner(Slope(), lambda out, _: out.mean(), **options)
    slope.fit(DataLoader(data, batch_sampler=batches), [data[:50]], steps=600, progress=False)
    assert batches.scale.value == pytest.approx(48, rel=0.1)
    assert batches.size == 64  # nearest power of two above √(32 · 64)


@pytest.mark.parametrize("size", [20, 21])
def test_halved_steps_are_those_of_whole_batches(size: int) -> None:
    """Truth: the same batches as a list, in float64 without BatchNorm."""
    x, y = points(200)
    data = TensorDataset(x.double(), y)
    batches = Batches(data, size, size)
    again = Batches(data, size, size)
    drawn = [data[pick] for _ in range(12) for pick in again]
    runs = []
    for train in (DataLoader(data, batch_sampler=batches), drawn):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        val = [(VAL[0][0].double(), VAL[0][1])]
        runs.append(tuner(model).fit(train, val, steps=100, progress=False))
    first, second = (run.best_weights for run in runs)
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-10)


def run(folder: Path | None, train: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    fit: dict[str, Any] = dict(steps=120, evaluate_every=30, checkpoint_every=7, progress=False)
    fit |= {n: options.pop(n) for n in ("resume", "callbacks") if n in options}
    return tuner(net(dropout=0.3), **options).fit(train, VAL, log_dir=folder, **fit)


def fail(progress: Any) -> None:
    """The power goes out four steps after a checkpoint."""
    if progress.step == 60:
        raise Outage


@pytest.mark.parametrize(
    "options",
    [{}, {"workers": 1}, {"interval": None}, {"drop_last": True}, {"whole": True}],
)
def test_a_killed_run_resumes_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    """Truth: the same run, uninterrupted; its batches grow within an epoch."""
    options = {"start": 8, "most": 64, "interval": 5} | options

    def train() -> DataLoader[Any]:
        return following(**options)

    first = train()
    whole = run(tmp_path / "whole", first)
    assert sizes_of(first).size > 8
    with pytest.raises(Outage):
        run(tmp_path / "cut", train(), callbacks=[fail])
    second = train()
    resumed = run(tmp_path / "cut", second, resume=True)
    assert same(resumed.history, whole.history)
    assert same(resumed.best_weights, whole.best_weights)
    assert sizes_of(second).state_dict() == sizes_of(first).state_dict()


@pytest.mark.slow
def test_a_compiled_run_follows_too() -> None:
    train = following(start=8, most=64, interval=5)
    run(None, train, compile=True)
    assert sizes_of(train).size > 8


def test_sizes_are_in_the_log(tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {}

    def record(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            seen.setdefault(name, []).append(value)

    train = following(start=8, most=64, interval=5)
    tuner().fit(train, VAL, steps=120, recorder=record, progress=False)
    assert seen["structure/batch_size"][0] == 8
    assert seen["structure/batch_size"][-1] == sizes_of(train).size
    assert seen["structure/noise_scale"][-1] == pytest.approx(sizes_of(train).scale.value)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match=r"epochs=3: structure.Batches change .* pass steps="):
        tuner().fit(following(start=8), VAL, epochs=3)
    with pytest.raises(ValueError, match=r"population=2: structure.Batches follow .* one run"):
        tuner(population=2).fit(following(start=8), VAL, steps=20)
    packed = DataLoader(list(range(64)), batch_sampler=Batches(range(64), 8), collate_fn=Custom)
    with pytest.raises(ValueError, match="a Custom in a batch cannot be divided into the halves"):
        tuner().fit(packed, VAL, steps=20)
