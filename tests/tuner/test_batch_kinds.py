"""Batches of other kinds than pairs of tensors, streams with a position, models with a state.

Truth: the run with tensors, with a list of batches, or without an evaluation in between.
"""

import datetime
import threading
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import loader, net, points, same, tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

import selftune as st

X, Y = points(17, seed=1)
X[-1] *= 50  # so that the weight of a last batch of one example shows
CUTS = (slice(0, 16), slice(16, 17))


class Graphs:
    """A batch of graphs, as of PyTorch Geometric: nodes of all of them, and their number."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.nodes, self.x, self.y, self.num_graphs = torch.ones(3, 2), x, y, len(x)

    def to(self, device: torch.device) -> "Graphs":
        return Graphs(self.x.to(device), self.y.to(device))


@dataclass
class Pair:
    """A batch of its own kind."""

    x: Tensor
    y: Tensor


KINDS: dict[str, Any] = {
    "graphs": lambda c: Graphs(X[c], Y[c]),
    "a dataclass": lambda c: Pair(X[c], Y[c]),
    "arrays": lambda c: (X[c].numpy(), Y[c].numpy()),
    "a dictionary that is no dict": lambda c: UserDict(x=X[c], y=Y[c]),
    "names first": lambda c: (["name"] * len(X[c]), X[c], Y[c]),
    "a tuple of names first": lambda c: (("name",) * len(X[c]), X[c], Y[c]),
}


def objective(model: nn.Module, batch: Any) -> Tensor:
    batch = (batch.x, batch.y) if isinstance(batch, (Graphs, Pair)) else batch
    x, y = batch.values() if isinstance(batch, dict) else batch[-2:]
    return F.cross_entropy(model(x), y)


def best(val: Any) -> float:
    return (
        tuner(loss_fn=None, objective=objective, probe=False)
        .fit(loader(), val, steps=10, progress=False)
        .best_loss
    )


@pytest.mark.parametrize("kind", KINDS)
def test_validation_batches_are_weighed_by_their_examples(kind: str) -> None:
    assert best([KINDS[kind](c) for c in CUTS]) == best([(X[c], Y[c]) for c in CUTS])


LONG = [torch.randn(length, 2) for length in (3, 5, 2, 7)]
NESTED: dict[str, Any] = {
    "images and a tensor": lambda c: (list(torch.ones(4, 3, 2, 2)[c]), torch.ones(4)[c]),
    "images and dictionaries": lambda c: (
        list(torch.ones(4, 3, 2, 2)[c]), [{"boxes": torch.ones(n, 4)} for n in (2, 3, 4, 5)][c],
    ),
    "sequences of unequal length": lambda c: (LONG[c], ["name"] * len(LONG[c])),
    "packed sequences": lambda c: (pack_sequence(LONG[c], enforce_sorted=False),),
    "two inputs and two targets": lambda c: (
        (torch.ones(4, 2)[c], torch.ones(4, 5)[c]), (torch.ones(4)[c], torch.ones(4)[c]),
    ),
}  # fmt: skip


class Level(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize("kind", NESTED)
def test_nested_batches_are_weighed_by_their_examples(kind: str) -> None:
    """Closed form: a batch of three examples with a loss of 1, and one of one with a loss of 3."""
    losses = iter([1.0, 3.0] * 100)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return 1e-9 * (model.level - 1).square() + (1.0 if model.training else next(losses))

    val = [NESTED[kind](slice(0, 3)), NESTED[kind](slice(3, 4))]
    given = st.Tuner(Level(), objective=loss, probe=False, guard=False, compile=False, tune=())
    found = given.fit(list(val), val, steps=4, evaluate_every=2, progress=False)
    assert found.best_loss == pytest.approx(1.5)


class Placed:
    """Batches that continue from a position, held by another object; an ended epoch resets it."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.place = batches, {"at": 0}

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.place["at"] < len(self.batches):
            self.place["at"] += 1
            yield self.batches[self.place["at"] - 1]
        self.place["at"] = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(self.place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place.update(state)


def test_a_stream_with_a_position_is_read_from_its_start() -> None:
    train, val = list(loader()), list(loader(90, seed=1))
    runs = [
        tuner().fit(kind(train), kind(val), steps=20, evaluate_every=5, progress=False)
        for kind in (list, Placed)
    ]
    assert same(runs[0].history, runs[1].history)


class Dated(nn.Sequential):
    """A model whose state holds a date."""

    def get_extra_state(self) -> dict[str, Any]:
        return {"made": datetime.date(2020, 1, 1)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


def test_a_state_that_no_checkpoint_can_hold_is_kept_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tuner(Dated(nn.Linear(2, 3)))
    result = run.fit(loader(), [(X, Y)], steps=20, progress=False, log_dir=tmp_path)
    assert result.best_weights["_extra_state"] == {"made": datetime.date(2020, 1, 1)}
    assert caplog.text.count("kept in memory") == 1
    assert not (tmp_path / "best.pt").exists()


class Counting(nn.Sequential):
    """A model that counts its passes, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 3))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes.add_(1)
        return super().forward(x)


def test_evaluations_change_no_buffers() -> None:
    counts = [
        tuner(Counting(), probe=False)
        .fit(loader(), [(X, Y)] * batches, steps=20, evaluate_every=20, progress=False)
        .best_weights["passes"]
        for batches in (1, 3)
    ]
    assert counts[0] == counts[1]


def test_pictures_leave_the_validation_loader_where_it_is() -> None:
    def fit(every: int | None) -> Any:
        val = DataLoader(
            list(zip(*points(60, seed=1), strict=True)), 20, shuffle=True,
            generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        torch.manual_seed(1)
        run = tuner(nn.Sequential(st.nn.Dropout(0.1), *net()), estimator=st.BestResponse())
        return run.fit(
            loader(), val, steps=30, progress=False, pictures_every=every,
            recorder=st.monitor.InMemory(),
        )  # fmt: skip

    assert fit(10).best_loss == fit(None).best_loss


def test_a_lock_in_a_model_is_named() -> None:
    model = net()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"cannot be copied.*lock.*__deepcopy__"):
        tuner(model).fit(loader(), [(X, Y)], steps=5, progress=False)


def test_a_number_before_the_inputs_does_not_count_as_one_example() -> None:
    """Twin: without the number."""
    two = torch.tensor(2.0)
    assert best([(two, X[c], Y[c]) for c in CUTS]) == best([(X[c], Y[c]) for c in CUTS])


def test_data_frames_are_arrays() -> None:
    """Twin: arrays."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frames = [(pandas.DataFrame(X[c].numpy()), Y[c].numpy()) for c in CUTS]
    assert best(frames) == best([(X[c], Y[c]) for c in CUTS])


@pytest.mark.parametrize("which", ["train", "val"])
def test_a_dataset_is_no_loader(which: str) -> None:
    given = {"train": loader(40), "val": loader(40, seed=1)}
    given[which] = given[which].dataset
    with pytest.raises(TypeError, match=rf"{which}=TensorDataset yields single examples: pass"):
        tuner().fit(given["train"], given["val"], epochs=1, progress=False)
