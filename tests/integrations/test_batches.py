"""Validation batches by (seed, step). Truth: sets of indices; the loader's own order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import selftune as st
from selftune.integrations import ValidationBatches, unwrap
from selftune.integrations._records import records_kept, silent  # private: callbacks use them

NUMBERS: Any = range(50)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    def drawn(seed: int, step: int) -> list[list[int]]:
        batches = ValidationBatches(DataLoader(NUMBERS, batch_size=8), seed).at(step)
        return [next(batches).tolist() for _ in range(3)]

    assert drawn(0, 5) == drawn(0, 5)
    assert len({str(drawn(*key)) for key in ((0, 5), (0, 6), (1, 5))}) == 3
    assert all(len(set(batch)) == 8 for batch in drawn(0, 5))


def test_processes_share_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: the batch of one process, with as many examples as theirs together."""
    whole = next(ValidationBatches(DataLoader(NUMBERS, batch_size=8)).at(5)).tolist()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def drawn(rank: int, size: int) -> list[int]:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        return next(ValidationBatches(DataLoader(NUMBERS, batch_size=size)).at(5)).tolist()

    assert drawn(0, 4) + drawn(1, 4) == whole
    assert drawn(0, 40) != drawn(1, 40)  # more than there are
    assert len(set(drawn(1, 40))) == 40


def test_every_example_is_drawn() -> None:
    batches = ValidationBatches(DataLoader(NUMBERS, batch_size=8))
    seen = {n for step in range(200) for n in next(batches.at(step)).tolist()}
    assert seen == set(NUMBERS)


def test_global_random_numbers_are_left_alone() -> None:
    batches = ValidationBatches(DataLoader(NUMBERS, batch_size=8, shuffle=True))
    before = torch.get_rng_state()
    next(batches.at(1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("indices", [[3, 4, 5], torch.tensor([3, 4, 5])])
def test_only_the_examples_of_a_split(indices: Any) -> None:
    loaders = (
        DataLoader(NUMBERS, batch_size=2, sampler=SubsetRandomSampler(indices)),
        DataLoader(Subset(NUMBERS, [3, 4, 5]), batch_size=2),
    )
    for loader in loaders:
        batches = ValidationBatches(loader)
        assert {int(n) for s in range(40) for n in next(batches.at(s))} == {3, 4, 5}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(5))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=2),
        DataLoader(NUMBERS, batch_sampler=[[0, 1], [2, 3], [4]]),
        (b for b in [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4])]),
    ],
    ids=["iterable dataset", "batch sampler", "generator"],
)
def test_what_cannot_be_addressed_is_read_in_order(loader: Any) -> None:
    batches = ValidationBatches(loader)
    assert [next(batches.at(s)).tolist() for s in range(3)] == [[0, 1], [2, 3], [4]]


def test_a_sampler_of_another_class_is_asked_itself() -> None:
    """Truth: the only index with a weight."""
    sampler = WeightedRandomSampler([0.0] * 7 + [1.0] + [0.0] * 42, 4)
    batches = ValidationBatches(DataLoader(NUMBERS, batch_size=2, sampler=sampler))
    assert next(batches.at(0)).tolist() == [7, 7]


def test_sizes() -> None:
    small = DataLoader(range(3), batch_size=8)  # type: ignore[arg-type]
    assert sorted(next(ValidationBatches(small).at(0)).tolist()) == [0, 1, 2]
    whole = DataLoader([torch.zeros(4), torch.ones(4)], batch_size=None)  # type: ignore[arg-type]
    assert next(ValidationBatches(whole).at(0)).shape == (4,)
    given = DataLoader(NUMBERS, batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 6, False))
    assert len(next(ValidationBatches(given).at(0))) == 6
    assert next(ValidationBatches([torch.ones(2)]).at(0)).tolist() == [1, 1]


@pytest.mark.parametrize("loader", [[], iter([]), DataLoader([], batch_size=2)])
def test_no_batches(loader: Any) -> None:
    with pytest.raises(ValueError, match="no more batches"):
        next(ValidationBatches(loader).at(0))


def test_unwrap_refuses_a_plain_optimizer() -> None:
    with pytest.raises(TypeError, match="SGD is not self-tuned"):
        unwrap(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    opt = st.SelfTuning(torch.optim.NAdam([torch.zeros(1, requires_grad=True)]))
    assert unwrap(opt) is opt


class FirstHalf(SequentialSampler):
    def __iter__(self) -> Any:
        return iter(range(25))

    def __len__(self) -> int:
        return 25


class Halved(DataLoader):  # type: ignore[type-arg]
    """Changes its batches."""

    def __iter__(self) -> Any:
        return (batch / 2 for batch in super().__iter__())


def test_samplers_and_loaders_of_the_users_are_read_in_their_own_order() -> None:
    """Truth: what they yield; those that inherit from torch's were bypassed."""
    sampler = FirstHalf(NUMBERS)
    seen: set[int] = set()
    for step in range(40):
        batches = ValidationBatches(DataLoader(NUMBERS, batch_size=8, sampler=sampler)).at(step)
        seen |= set(next(batches).tolist())
    assert seen <= set(range(25))
    found = ValidationBatches(Halved(NUMBERS, batch_size=8)).at(3)
    assert next(found).tolist() == [n / 2 for n in range(8)]


class Owner:
    """A mask that is made anew for each shape, a data set, and a growing list of mixed entries."""

    def __init__(self) -> None:
        self.shape: Any = (2,)
        self.mask, self.mixed = torch.zeros(2), [1, "x"]
        self.data, self.kind = Data(), Meta
        self.array = np.zeros(2)


class Data:
    def __init__(self) -> None:
        self.rows = [{"x": [1.0]} for _ in range(5000)]

    def __len__(self) -> int:
        return len(self.rows)


class Kind(type):
    """Classes of a package of the user's."""


class Meta(metaclass=Kind):
    count = 0


def test_attributes_that_belong_together_are_restored_together() -> None:
    """Truth: the attributes before; a mask returned, and its shape did not."""
    owner = Owner()
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    owner.deep = deep  # type: ignore[attr-defined]
    with records_kept([owner]):
        owner.shape, owner.mask = (5,), torch.ones(5)
        owner.mixed.reverse()
        owner.kind.count += 1
        owner.array.resize(4, refcheck=False)
    assert owner.shape == (2,)
    assert torch.equal(owner.mask, torch.zeros(2))
    assert owner.mixed == [1, "x"]


def test_a_log_of_the_users_own_is_put_back() -> None:
    owner, calls = Owner(), []
    owner.log = calls.append  # type: ignore[attr-defined]
    with silent(owner):
        owner.log("in a tuning pass")  # type: ignore[attr-defined]
    owner.log("after it")  # type: ignore[attr-defined]
    assert calls == ["after it"]


def test_records_of_the_last_of_many_modules_are_restored() -> None:
    """Torch's own attributes of modules use up no part of the limit."""
    layers = nn.Sequential(*[nn.Identity() for _ in range(500)])
    last: Any = layers[-1]
    last.sums = {"n": 1}
    with records_kept(layers.modules()):
        last.sums["n"] += 1
    assert last.sums == {"n": 1}
