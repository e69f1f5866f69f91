"""Batches of a tuner's run that follow the noise scale."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Outage, loader, net, points, same, tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import selftune as st
from selftune.structure import Batches
from selftune.tuner._data import Stream  # private: a position after each single batch

VAL = [points(100, seed=1)]


def following(
    count: int = 400, *, workers: int = 0, whole: bool = False, **options: Any
) -> DataLoader[Any]:
    data = TensorDataset(*points(count))
    batches = Batches(data, **options)
    if whole:  # the dataset is indexed by lists
        return DataLoader(data, batch_size=None, sampler=batches)
    return DataLoader(data, batch_sampler=batches, num_workers=workers)


def sizes_of(train: Any) -> Batches:
    found = train.sampler if train.batch_sampler is None else train.batch_sampler
    assert isinstance(found, Batches)
    return found


class Custom:
    """A batch that is not a tensor."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples


def loss_of_custom(model: nn.Module, batch: Custom) -> Tensor:
    return model(torch.ones(2, 2) * len(batch.examples)).square().mean()


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
    assert batches.scale.value > 0  # known
    first, second = (run.best_weights for run in runs)
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-10)


def run(folder: Path | None, train: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    fit: dict[str, Any] = dict(steps=70, evaluate_every=30, checkpoint_every=7, progress=False)
    fit |= {n: options.pop(n) for n in ("resume", "callbacks") if n in options}
    return tuner(net(dropout=0.3), **options).fit(train, VAL, log_dir=folder, **fit)


def fail(progress: Any) -> None:
    """The power goes out four steps after a checkpoint."""
    if progress.step == 60:
        raise Outage


@pytest.mark.parametrize(
    "options",
    [
        {}, pytest.param({"workers": 1}, marks=pytest.mark.slow),
        {"interval": None}, {"drop_last": True}, {"whole": True},
    ],
)  # fmt: skip
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
    with pytest.raises(ValueError, match="train had a sampler structure"):
        run(tmp_path / "cut", loader(), resume=True)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_continue_after_any_of_them(workers: int) -> None:
    """Truth: the same batches, uninterrupted; workers draw them ahead, up to the next epoch."""

    def stream() -> Stream:
        train = following(60, workers=workers, start=8, most=32, interval=2)
        return Stream(train, "train", torch.device("cpu"))

    def measure(at: Stream) -> None:
        sizes = at.following
        assert sizes is not None
        sizes.scale.observe(1 + 100 / 8, 1 + 100 / 16, 8, 16)

    whole, states, drawn = stream(), [], []
    for _ in range(14):
        drawn.append(whole.next()[0])
        measure(whole)
        states.append(whole.state_dict())
    assert len({len(batch) for batch in drawn}) > 3
    assert whole.epoch > 1
    for step, state in enumerate(states):
        resumed = stream()
        resumed.load_state_dict(state)
        for batch in drawn[step + 1 :]:
            assert torch.equal(resumed.next()[0], batch)
            measure(resumed)
    whole.close()


def test_targets_for_each_position() -> None:
    """A view of the halves, as of whole batches."""
    x = torch.randn(64, 6, 4)
    data = TensorDataset(x, x.sum(2).gt(0).long())
    train = DataLoader(data, batch_sampler=Batches(data, 8, 8))
    model = nn.Linear(4, 2)
    loss = st.Tuner(
        model, lambda out, y: nn.functional.cross_entropy(out.view(-1, 2), y.view(-1)),
        compile=False,
    ).fit(train, [data[:]], steps=60, progress=False)  # fmt: skip
    assert loss.best_loss < 0.6


def test_a_return_to_good_weights_forgets_the_noise_scale() -> None:
    """Otherwise one exploding gradient would decide the estimate for hundreds of steps."""
    train = following(start=8, most=64)
    sizes_of(train).scale.observe(2e9, 1e9, 8, 16)
    result = tuner(hparams={"lr": 30.0}, probe=False).fit(train, VAL, steps=200, progress=False)
    assert "last good weights" in result.why or "divided" in result.why
    assert sizes_of(train).scale.value != 16.0


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_a_compiled_run_follows_too() -> None:
    train, eager = (following(start=8, most=64, interval=5) for _ in range(2))
    end = run(None, train, compile=True)
    assert sizes_of(train).size > 8
    assert end.best_loss == pytest.approx(run(None, eager).best_loss, abs=0.1)


def test_sizes_are_in_the_log(tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {}

    def record(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            seen.setdefault(name, []).append(value)

    train = following(start=8, most=64, interval=5)
    tuner().fit(train, VAL, steps=120, recorder=record, progress=False)
    assert seen["structure/batch_size"][0] == 8
    assert seen["structure/batch_size"][-1] == sizes_of(train).size
    assert all(noise > 0 for noise in seen["structure/noise_scale"])


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match=r"epochs=3: structure.Batches change .* pass steps="):
        tuner().fit(following(start=8), VAL, epochs=3)
    with pytest.raises(ValueError, match=r"population=2: structure.Batches follow .* one run"):
        tuner(population=2).fit(following(start=8), VAL, steps=20)
    with pytest.raises(ValueError, match=r"least=3 .* need 4: pass start=4"):
        tuner().fit(following(start=3), VAL, steps=20)
    packed = DataLoader(list(range(64)), batch_sampler=Batches(range(64), 8), collate_fn=Custom)
    with pytest.raises(ValueError, match="a Custom in a batch cannot be divided into the halves"):
        tuner(loss_fn=None, objective=loss_of_custom).fit(packed, packed, steps=20)
