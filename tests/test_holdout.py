"""Batches of a run that holds out a share. Truths: sets of examples, and the uninterrupted run."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)  # fmt: skip

import selftune as st
from selftune.holdout import split

STEPS, JOIN, COUNT = 60, 36, 103


def loader(count: int = COUNT, **options: Any) -> DataLoader[Any]:
    return DataLoader(range(count), **{"batch_size": 10, "shuffle": True, **options})  # type: ignore[arg-type]


def batches(data: Any, count: int | None = None) -> list[list[int]]:
    return [batch.tolist() for batch in islice(data, count)]


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_epoch_has_each_example_once_and_held_ones_come_after_the_join(
    drop_last: bool,
) -> None:
    data = st.HoldOut().over(loader(drop_last=drop_last), steps=STEPS)
    held, found = set(data.held), batches(data)
    assert (len(held), len(found), data.join, len(data)) == (10, STEPS, JOIN, STEPS)
    for first, last, expected in (
        (0, JOIN, set(range(COUNT)) - held),
        (JOIN, STEPS, set(range(COUNT))),
    ):
        length = len(expected) // 10 + (0 if drop_last else 1)
        for start in range(first, last, length):
            epoch = [i for batch in found[start : min(start + length, last)] for i in batch]
            assert len(epoch) == len(set(epoch))
            assert set(epoch) <= expected
            if start + length <= last and not drop_last:
                assert set(epoch) == expected


def test_validation_batches_are_of_held_out_examples_and_of_twice_the_size() -> None:
    data = st.HoldOut(share=0.5).over(loader(), steps=STEPS)
    found = batches(data.val, 4)
    assert {len(batch) for batch in found} == {20}
    assert {i for batch in found for i in batch} <= set(data.held)
    few = st.HoldOut().over(loader(), steps=STEPS)
    assert sorted(next(few.val).tolist()) == few.held == sorted(next(few.val).tolist())


def test_it_is_over_when_the_held_out_examples_join() -> None:
    data = st.HoldOut(until=0.5).over(loader(), steps=10)
    assert [data.holding for _ in data] == [True] * 5 + [False] * 5


def test_a_loader_that_does_not_shuffle_keeps_its_order() -> None:
    data = st.HoldOut().over(loader(shuffle=False), steps=22)
    rest = [i for i in range(COUNT) if i not in data.held]
    assert [i for batch in batches(data, 10) for i in batch] == rest
    assert batches(data)[-1] == list(range(80, 90))  # the ninth after step 13


def test_workers_and_other_random_numbers_change_nothing() -> None:
    found = batches(st.HoldOut().over(loader(), steps=STEPS, seed=3))
    torch.rand(7)
    data = st.HoldOut().over(loader(num_workers=2, persistent_workers=True), steps=STEPS, seed=3)
    assert batches(data) == found
    assert batches(st.HoldOut().over(loader(), steps=STEPS, seed=4)) != found


STOPS = [0, 17, JOIN - 1, JOIN, JOIN + 1, 55]


@pytest.mark.parametrize(("stopped", "workers"), [*((stop, 0) for stop in STOPS), (17, 1)])
def test_a_stopped_run_goes_on_alike(stopped: int, workers: int) -> None:
    whole = st.HoldOut().over(loader(), steps=STEPS)
    expected, val = batches(whole), batches(whole.val, 12)
    data = st.HoldOut().over(loader(num_workers=workers), steps=STEPS)
    assert batches(data, stopped) == expected[:stopped]
    assert batches(data.val, 5) == val[:5]
    again = st.HoldOut().over(loader(num_workers=workers), steps=STEPS)
    again.load_state_dict(data.state_dict())
    assert again.holding == (stopped <= JOIN)
    assert batches(again) == expected[stopped:]
    assert batches(again.val, 7) == val[5:]


def job(seed: int = 0) -> tuple[nn.Module, DataLoader[Any]]:
    torch.manual_seed(seed)
    x = torch.randn(120, 6)
    y = x[:, :1] * x[:, 1:2] + 0.3 * torch.randn(120, 1)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    return net, DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)


def train(net: nn.Module, opt: Any, data: st.HeldOut, steps: int = STEPS) -> list[Any]:
    def val_loss() -> torch.Tensor:
        x, y = next(data.val)
        return F.mse_loss(net(x), y)

    found = []
    for x, y in islice(data, steps):
        opt.zero_grad()
        F.mse_loss(net(x), y).backward()
        opt.step()
        if data.holding:
            opt.hyper_step(val_loss)
        found.append(dict(opt.hparams))
    return found


@pytest.mark.parametrize("stopped", [JOIN - 5, JOIN + 5])
def test_the_loop_of_ones_own_resumes_bit_for_bit(stopped: int) -> None:
    def made() -> tuple[nn.Module, Any, st.HeldOut]:
        net, batches = job()
        opt = st.AdamW(net, lr=1e-3, total_steps=STEPS)
        return net, opt, st.HoldOut().over(batches, steps=STEPS)

    net, opt, data = made()
    hparams = train(net, opt, data)
    assert hparams[0] != hparams[JOIN - 1] == hparams[-1]  # tuned, and kept from the join on
    cut = made()
    train(*cut, steps=stopped)
    again = made()
    for mine, saved in zip(again, cut, strict=True):
        mine.load_state_dict(saved.state_dict())
    assert train(*again) == hparams[stopped:]
    for one, other in ((net, again[0]), (net, made()[0])):
        equal = [torch.equal(a, b) for a, b in zip(*map(nn.Module.parameters, (one, other)))]  # noqa: B905
        assert all(equal) == (other is again[0])


def test_the_averages_statistics_follow_when_no_hyper_step_comes_any_more() -> None:
    """Truth: torch's ``update_bn`` at the averaged weights, over the training data."""
    net, whole = job()
    inputs = whole.dataset[:][0]
    opt = st.AdamW(net, lr=1e-3, total_steps=600)
    train(net, opt, st.HoldOut(until=0.3).over(whole, steps=600), 600)
    net.eval()
    with opt.averaged():
        found = [b.clone() for n, b in net.named_buffers() if "running" in n]
        net.train()
        torch.optim.swa_utils.update_bn([inputs], net)
        exact = [b.clone() for n, b in net.named_buffers() if "running" in n]
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)  # of batches of 20, with momentum 0.1


class Rows(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(100))


class Scaled(DataLoader[Any]):
    def __iter__(self) -> Any:
        return ((x / 255,) for (x,) in super().__iter__())


def part() -> DataLoader[Any]:
    data = TensorDataset(torch.arange(100.0))
    return DataLoader(data, batch_size=2, sampler=SequentialSampler(range(50)))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "share": (lambda: st.HoldOut(share=1.0), ValueError, r"share=1.0 must be above 0 and below 1"),
    "until": (lambda: st.HoldOut(until=0), ValueError, r"until=0 must be above 0 and below 1"),
    "no number": (lambda: st.HoldOut(until="x"), TypeError, "until='x' must be"),  # type: ignore[arg-type]
    "one step": (lambda: st.HoldOut().over(loader(), 1), ValueError, "steps=1 must be at least 2"),
    "a list": (lambda: over([1, 2]), ValueError, r"not loader \(list\): pass such a DataLoader"),
    "no length": (
        lambda: over(DataLoader(Rows(), batch_size=2)), ValueError,
        "needs a dataset with a length: hold out examples yourself; loader.dataset is a Rows",
    ),
    "too few": (lambda: over(loader(4)), ValueError, "share=0.1 of 4 examples leaves 0 for"),
    "an order of its own": (
        lambda: over(loader(shuffle=False, sampler=WeightedRandomSampler(torch.ones(103), 103))),
        ValueError, "cannot keep the order of sampler=WeightedRandomSampler: hold out examples",
    ),
    "a part in its order": (
        lambda: over(part()), ValueError, "cannot keep the order of sampler=SequentialSampler",
    ),
    "batches of its own": (
        lambda: over(Scaled(TensorDataset(torch.arange(100.0)))), ValueError,
        "cannot keep the __iter__ of loader=Scaled, which may change the batches",
    ),
    "all dropped": (
        lambda: over(loader(100, batch_size=95, drop_last=True)), ValueError,
        "drop_last=True drops all of its 90 training examples in batches of 95",
    ),
    "another run": (
        lambda: over(loader()).load_state_dict(over(loader(), 50).state_dict()), ValueError,
        "steps is 50 there and 60 here",
    ),
}  # fmt: skip


def over(batches: Any, steps: int = STEPS) -> st.HeldOut:
    return st.HoldOut().over(batches, steps)


@pytest.mark.parametrize("case", list(REFUSED))
def test_bad_input_is_refused(case: str) -> None:
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()


def test_a_run_that_over_fitted_ends_with_its_last_good_weights() -> None:
    """Truth: a plain run, which over-fits wrong labels."""
    x = torch.randn(1200, 100, generator=torch.Generator().manual_seed(0))
    y = ((x[:, 0] > 0) ^ (x[:, 1].abs() < 0.32)).long()  # a quarter is wrong to a linear model
    batches = DataLoader(TensorDataset(x[:200], y[:200]), batch_size=20, shuffle=True)
    torch.manual_seed(0)
    net, twin = nn.Linear(100, 2), nn.Linear(100, 2)
    options: dict[str, Any] = dict(lr=0.02, momentum=0.9)
    opt = st.SGD(net, tune=("momentum",), probe=False, total_steps=400, **options)
    plain = torch.optim.SGD(twin.parameters(), **options)
    data = st.HoldOut(share=0.3).over(batches, steps=400)

    def val_loss() -> torch.Tensor:
        inputs, targets = next(data.val)
        return F.cross_entropy(net(inputs), targets)

    for inputs, targets in data:
        for model, optimizer in ((net, opt), (twin, plain)):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        if data.holding:
            opt.hyper_step(val_loss)
    with torch.no_grad(), opt.averaged():
        losses = [float(F.cross_entropy(model(x[200:]), y[200:])) for model in (net, twin)]
    assert losses[0] < 0.7 * losses[1]


def test_a_split_keeps_the_generator_of_the_sampler() -> None:
    """Law: the order follows it, whatever torch's own generator does."""
    data = TensorDataset(torch.arange(40.0))
    orders = []
    for seed in (1, 2):
        own = torch.Generator().manual_seed(0)
        train, _ = split(
            DataLoader(data, 8, sampler=RandomSampler(data, generator=own)), 0.1, 0, "val=0.1"
        )
        torch.manual_seed(seed)
        orders.append([x.tolist() for (x,) in train])
    assert orders[0] == orders[1]


@pytest.mark.parametrize("size", [17, 18])
def test_a_split_makes_no_batch_of_one_example(size: int) -> None:
    """Law: the last batch has 3 of 190 examples, and would have one of 171, or of 181 in 18."""
    whole = DataLoader(TensorDataset(torch.arange(190.0)), size)
    train, _ = split(whole, 0.1 if size == 17 else 9 / 190, 0, "val")
    held = st.HoldOut(share=0.1 if size == 17 else 9 / 190).over(whole, 60)
    assert min(len(x) for (x,) in [*train, *held]) > 1


def test_the_model_draws_the_same_random_numbers_after_a_resume() -> None:
    """Law: dropout in the middle of an epoch depends on torch's generator alone."""
    ends = []
    for resumed in (False, True):
        torch.manual_seed(0)
        data = st.HoldOut().over(loader(), steps=STEPS)
        drawn = []
        for _ in data:
            next(data.val)
            drawn.append(float(torch.rand(())))
            if resumed and data.step == 17:
                random, position = torch.get_rng_state(), data.state_dict()
                data = st.HoldOut().over(loader(), steps=STEPS)
                data.load_state_dict(position)
                torch.set_rng_state(random)
                for _ in data:
                    next(data.val)
                    drawn.append(float(torch.rand(())))
                break
        ends.append(drawn)
    assert len(ends[0]) == STEPS
    assert ends[0] == ends[1]


def test_seeds_may_be_as_large_as_torchs() -> None:
    data = st.HoldOut().over(loader(), steps=STEPS, seed=67280421310721)
    assert len(list(data)) == STEPS
