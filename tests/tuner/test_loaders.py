"""Batches of loaders with workers, without a length, with a state. Truth: the plain loader's run.

Resumed runs: the same run, uninterrupted.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Batch, Outage, loader, net, points, same, tuner
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset, get_worker_info

pytestmark = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")  # by torchdata
VAL = [points(100, seed=1)]


class Rows(IterableDataset[Any]):
    """Examples one by one, each worker its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        first, workers = (0, 1) if info is None else (info.id, info.num_workers)
        x, y = points(self.count)
        for at in range(first, self.count, workers):
            yield x[at], y[at]


class Counted:
    """A stream that can say where it is.

    Attributes:
        read: Batches read from all of these streams, the number of each.
    """

    read: list[int]

    def __init__(self) -> None:
        self.at, self.read = 0, []

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.at += 1
            self.read.append(self.at)
            yield points(20, seed=self.at)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def fit(train: Any, folder: Path | None = None, val: Any = None, **options: Any) -> Any:
    torch.manual_seed(3)
    fit = dict(steps=40, evaluate_every=20, checkpoint_every=7, progress=False, log_dir=folder)
    return tuner(net(dropout=0.3)).fit(train, VAL if val is None else val, **(fit | options))


def outage(progress: Any) -> None:
    raise Outage


def rows(**options: Any) -> DataLoader[Any]:
    return DataLoader(Rows(205), batch_size=20, **options)


def generated(seed: int = 0) -> Iterator[Batch]:
    while True:
        seed += 1
        yield points(20, seed=seed)


def stateful(data: Any = None, **options: Any) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    data = TensorDataset(*points(205)) if data is None else data
    torch.manual_seed(0)  # of its sampler, which takes one when it is made
    return module.StatefulDataLoader(data, batch_size=20, **options)


STREAMS: dict[str, Callable[[], Any]] = {
    "no length": rows,
    "no length, workers": lambda: rows(num_workers=2),
    "no length, persistent workers": lambda: rows(num_workers=2, persistent_workers=True),
    "persistent workers": lambda: loader(205, shuffle=True, num_workers=2, persistent_workers=True),
    "generator": generated,
    "stream with a state": Counted,
    "stateful": lambda: stateful(shuffle=True),
    "stateful, workers": lambda: stateful(shuffle=True, num_workers=2),
    "stateful, persistent workers": lambda: stateful(
        shuffle=True, num_workers=2, persistent_workers=True
    ),
    "stateful, no length": lambda: stateful(Rows(205)),
    "stateful, no length, workers": lambda: stateful(Rows(205), num_workers=2),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_run_on_any_stream_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = fit(STREAMS[name]())
    with pytest.raises(Outage):
        fit(STREAMS[name](), tmp_path, callbacks=[outage])
    torch.rand(7)  # where the random streams are now must not matter
    again = fit(STREAMS[name](), tmp_path, resume=True)
    assert same(again.history, whole.history)
    assert same(again.best_weights, whole.best_weights)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_gives_what_a_plain_one_does(workers: int) -> None:
    plain = fit(loader(205, num_workers=workers))
    assert same(fit(stateful(num_workers=workers)).history, plain.history)


def test_a_stream_with_a_state_is_not_read_again(tmp_path: Path) -> None:
    with pytest.raises(Outage):
        fit(Counted(), tmp_path, callbacks=[outage])
    stream = Counted()
    fit(stream, tmp_path, resume=True)
    assert stream.read[0] > 14  # the last checkpoint before the outage
    with pytest.raises(ValueError, match="train had a state_dict when the run was saved"):
        fit(generated(), tmp_path, resume=True)


class Secret(list[Batch]):
    """Its state is no plain container, so that it is read again."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": Secret}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(state)


def test_a_state_that_a_checkpoint_cannot_hold_is_not_used(tmp_path: Path) -> None:
    whole = fit(Secret(loader(205)))
    with pytest.raises(Outage):
        fit(Secret(loader(205)), tmp_path, callbacks=[outage])
    assert same(fit(Secret(loader(205)), tmp_path, resume=True).history, whole.history)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_end_with_the_run(persistent: bool) -> None:
    """Law: garbage collection waited five seconds for each worker."""
    run = tuner()
    batches = [loader(205, num_workers=2, persistent_workers=persistent) for _ in "tv"]
    result = run.fit(*batches, steps=15, progress=False)
    assert not multiprocessing.active_children()
    begun = time.monotonic()
    del run, batches, result
    gc.collect()
    assert time.monotonic() - begun < 4


def test_a_share_of_numpy_splits_like_a_float() -> None:
    of_numpy, plain = (fit(loader(), val=val).history for val in (np.float32(0.1), 0.1))
    assert same(of_numpy, plain)


def test_what_has_no_length_asks_for_steps() -> None:
    with pytest.raises(ValueError, match=r"epochs=2 needs train to have a length: pass steps="):
        fit(rows(), steps=None, epochs=2)
    with pytest.raises(ValueError, match=r"val=0.1 needs a dataset with a length: pass val"):
        fit(rows(), val=0.1)


def test_validation_streams_need_no_length_either() -> None:
    for val in (generated(100), rows(), rows(num_workers=1, persistent_workers=True)):
        assert fit(rows(), val=val, steps=60).best_loss < 0.5


class Curriculum:
    """A loader that counts its passes: in each the inputs are larger.

    Attributes:
        read: The pass of every batch read.
    """

    read: list[int]

    def __init__(self) -> None:
        self.passes, self.read = 0, []

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        for seed in range(4):
            self.read.append(self.passes)
            x, y = points(20, seed=seed)
            yield x * self.passes, y


class Stages(Curriculum, IterableDataset[Any]):
    """The same as a dataset."""


class Growing(Sampler[list[int]]):
    """Batches that grow from pass to pass."""

    passes = 0

    def __len__(self) -> int:
        return 8 >> min(self.passes, 3)

    def __iter__(self) -> Iterator[list[int]]:
        size = 10 << min(self.passes, 3)
        self.passes += 1
        return iter([list(range(at, at + size)) for at in range(0, 80, size)])


@pytest.mark.parametrize("kind", ["loader", "dataset"])
def test_each_pass_of_a_loader_that_counts_them_is_trained_on(kind: str) -> None:
    """Truth: a plain loop over the loader."""
    stages = Curriculum() if kind == "loader" else Stages()
    train: Any = stages if kind == "loader" else DataLoader(stages, batch_size=None)
    tuner().fit(train, VAL, epochs=3, progress=False)
    assert stages.read == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_epochs_of_another_length_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    x, y = points(80)
    train: DataLoader[Any] = DataLoader(TensorDataset(x, y), batch_sampler=Growing())
    tuner().fit(train, VAL, epochs=2, progress=False)
    told = [r.getMessage() for r in caplog.records if "computed with 8" in r.getMessage()]
    assert told == [
        "train: epoch 1 has 4 batches, but the length of the run was computed with 8 for each "
        "epoch. Pass steps= instead of epochs= if their number changes"
    ]
