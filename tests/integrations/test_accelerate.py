"""Accelerate. Truth: the same loop by hand, bit for bit; an uninterrupted run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import (
    averaged,
    dataset,
    equal,
    loss_of,
    needs,
    network,
    run,
    train_loader,
    tuned,
    val_loader,
)
from torch.utils.data import DataLoader, IterableDataset, Subset

from selftune.integrations import ValidationBatches, unwrap

pytestmark = needs("accelerate")
try:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
except ModuleNotFoundError:
    pass


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate keeps its settings in the process."""
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()
    yield
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()


class Run:
    """As users write it; without BatchNorm on several ranks, each of which has its own batch."""

    def __init__(self, clip: float | None = None, ranks: int | None = None, **options: Any) -> None:
        self.accelerator, self.clip = Accelerator(cpu=True, **options), clip
        config = options.get("dataloader_config")  # may divide the loaders' batches itself
        model = network(norm=ranks is None)
        parts = 1 if ranks is None or (config and config.split_batches) else ranks
        self.model, self.opt, self.train, self.val = self.accelerator.prepare(
            model, tuned(model), train_loader(parts), val_loader(parts)
        )
        self.batches, self.step = ValidationBatches(self.val), 0

    def epochs(self, number: int) -> Run:
        opt = unwrap(self.opt)
        for _ in range(number):
            for batch in self.train:
                with self.accelerator.accumulate(self.model):
                    self.model.train()
                    self.accelerator.backward(loss_of(self.model, batch))
                    if self.clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                    self.opt.step()
                    self.opt.zero_grad()
                if self.accelerator.sync_gradients:
                    self.step += 1
                    drawn = self.batches.at(self.step)

                    def value(drawn: Iterator[Any] = drawn) -> torch.Tensor:
                        self.model.eval()
                        return loss_of(self.model, next(drawn))

                    opt.hyper_step(value)
        return self


class Streamed(IterableDataset[Any]):
    """A validation set without indexable examples."""

    def __iter__(self) -> Iterator[Any]:
        yield from [dataset(60, 1)[i] for i in range(60)]


@pytest.mark.parametrize("tune", [False, True])
def test_streams_of_validation_batches_leave_the_accumulation(tune: bool) -> None:
    """Truth: gradients are synchronised after two batches, and at the end of each epoch of five."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    opt, train = tuned(model), DataLoader(Subset(dataset(96, 0), range(80)), batch_size=16)
    val = DataLoader(Streamed(), batch_size=20)
    model, opt, train, val = accelerator.prepare(model, opt, train, val)
    drawn, found = ValidationBatches(val).at(0), []
    for _ in range(3):
        for batch in train:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                opt.step()
                opt.zero_grad()
            found.append(accelerator.sync_gradients)
            if tune and found[-1]:
                unwrap(opt).hyper_step(lambda: loss_of(model, next(drawn)))
    assert found == [False, True, False, True, True] * 3


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
        ({"clip": 0.1}, {"clip": 0.1}),
        ({"mixed_precision": "bf16"}, {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}),
    ],
    ids=["plain", "accumulation", "clipping", "bf16"],
)
def test_as_the_loop_by_hand(options: Any, by_hand: Any) -> None:
    done = Run(**options).epochs(4)
    model = network()
    opt = tuned(model)
    expected = run(model, opt, **by_hand)
    assert unwrap(done.opt).hparams == opt.hparams
    assert equal(averaged(done.accelerator.unwrap_model(done.model), unwrap(done.opt)), expected)


@pytest.mark.parametrize("evaluating", [False, True])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, evaluating: bool) -> None:
    """``save_state`` and ``load_state``; also of a state saved while averaged weights are shown."""
    whole, half = Run().epochs(4), Run().epochs(2)
    if evaluating:
        half.opt.eval()
    half.accelerator.save_state(str(tmp_path))
    rest = Run()
    rest.accelerator.load_state(str(tmp_path))
    rest.step = half.step
    rest.opt.train()
    rest.epochs(2)
    assert unwrap(rest.opt).hparams == unwrap(whole.opt).hparams
    ends = [averaged(r.accelerator.unwrap_model(r.model), unwrap(r.opt)) for r in (rest, whole)]
    assert equal(*ends)
