"""The monitor. Truths: TensorBoard's own reader, a recording writer, tensors without data."""

import copy
import gc
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selftune.monitor import InMemory, Monitor, hyper_rows


class Recorder:
    """A writer that keeps what it is given, or fails from some call on."""

    def __init__(self, working: int = 10**9) -> None:
        self.rows: list[tuple[str, float, int]] = []
        self.flushed = 0
        self.working = working
        self.calls = 0

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.calls += 1
        if self.calls > self.working:
            raise OSError("no space left on device")
        self.rows.append((tag, scalar_value, global_step))

    def flush(self) -> None:
        self.flushed += 1


@pytest.mark.parametrize("as_path", [str, Path])
def test_tensorboard_reads_it_back(tmp_path: Path, as_path: Any) -> None:
    """Truth: the files as EventAccumulator reads them; nothing is on disk before a block is."""
    monitor = Monitor(as_path(tmp_path / "run"))
    for step in range(3):
        monitor.scalar("Loss/train", torch.tensor(0.5 * step, dtype=torch.float64), step)
        monitor.scalars([("hyper/lr", 0.25), ("Loss/val", torch.tensor(2.0))], 10 * step)
    assert not (tmp_path / "run").exists()
    monitor.flush()
    read = EventAccumulator(str(tmp_path / "run")).Reload()
    assert sorted(read.Tags()["scalars"]) == ["Loss/train", "Loss/val", "hyper/lr"]
    events = [(e.step, e.value) for e in read.Scalars("Loss/train")]
    assert events == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert [(e.step, e.value) for e in read.Scalars("hyper/lr")] == [
        (0, 0.25),
        (10, 0.25),
        (20, 0.25),
    ]


def test_nothing_is_read_before_the_block_is_full() -> None:
    """Truth: a meta tensor, which has no data to read, raises as soon as anyone tries."""
    writer = Recorder()
    monitor = Monitor(writer)
    for step in range(monitor.block - 1):
        monitor.scalar("loss", torch.empty((), device="meta"), step)
    assert writer.calls == writer.flushed == 0
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        monitor.scalar("loss", torch.empty((), device="meta"), 99)


def test_a_full_block_is_written_in_order() -> None:
    """Law: every number once, at its step, in the order given; tensors and floats alike."""
    writer = Recorder()
    monitor = Monitor(writer)
    want = []
    for step in range(monitor.block + 5):
        number: Any = float(step) if step % 3 else torch.tensor(step, dtype=torch.int64)
        monitor.scalar("mixed", number, step)
        want.append(("mixed", float(step), step))
    assert writer.rows == want[: monitor.block]
    monitor.flush()
    monitor.flush()
    assert writer.rows == want
    assert writer.flushed == 2  # an empty block is not written


@pytest.mark.parametrize("working", [0, 150])
def test_a_full_disk_stops_logging_with_one_warning(
    working: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: no exception, one warning, and the writer is left alone from then on."""
    writer = Recorder(working)
    monitor = Monitor(writer)
    assert monitor.on
    with caplog.at_level(logging.WARNING, logger="selftune"):
        for step in range(1000):
            monitor.scalar("loss", 0.0, step)
        monitor.flush()
    assert writer.calls == working + 1
    assert [r.getMessage() for r in caplog.records] == [
        "TensorBoard: logging stopped, training continues: no space left on device"
    ]
    assert not monitor.on


def test_without_a_target_nothing_is_kept() -> None:
    """Truth: the same meta tensors, which would raise when read; memory does not grow."""
    monitor = Monitor(None)
    assert not monitor.on
    for step in range(2 * monitor.block):
        monitor.scalar("loss", torch.empty((), device="meta"), step)
    assert monitor._rows == []


UNFINISHED = """
import sys, torch, selftune as st
net, x = torch.nn.Linear(4, 1), torch.randn(64, 4)
opt = st.SGD(net, lr=0.1, total_steps=60, every=5, log_dir=sys.argv[1])
for _ in range(60):
    opt.zero_grad()
    net(x).square().mean().backward()
    opt.step()
    opt.hyper_step(lambda: net(x).square().mean())
"""


@pytest.mark.slow
def test_a_process_that_ends_without_finish_loses_no_entry(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", UNFINISHED, str(tmp_path)], check=True)
    assert EventAccumulator(str(tmp_path)).Reload().Scalars("Loss/val")[-1].step >= 55


def test_a_deleted_monitor_loses_no_entry() -> None:
    """Nor does a copy, which writes its own."""
    recorder = InMemory()
    monitor = Monitor(recorder)
    monitor.scalar("loss", 1.0, 1)
    copied = copy.copy(monitor)
    copied.scalar("loss", 2.0, 2)
    del monitor, copied
    gc.collect()
    assert sorted((row.value, row.step) for row in recorder.rows) == [(1.0, 1), (1.0, 1), (2.0, 2)]


def test_rows_of_a_hyper_step() -> None:
    """Truth: tags and numbers by hand (a 3-4-5 gradient), many values as their range."""
    values = {"lr": 0.1, "l1": [0.3, 0.2, 0.3], "l2": [float(i) for i in range(20, 0, -1)]}
    pair = (torch.tensor([3.0, 4.0]), torch.tensor([0.5, 1.0]))
    signals = {"lr": (torch.tensor([-2.0]), torch.tensor([0.25])), "l1": pair}
    assert dict(hyper_rows(1.5, values, signals)) == {
        "Loss/val": 1.5,
        "hyper/lr": 0.1,
        "hyper/l1/0": 0.3,
        "hyper/l1/1": 0.2,
        "hyper/l1/2": 0.3,
        "hyper/l2/lowest": 1.0,
        "hyper/l2/median": 11.0,
        "hyper/l2/highest": 20.0,
        "hypergrad/lr/norm": 2.0,
        "hypergrad/lr/snr": 0.25,
        "hypergrad/lr/value": -2.0,
        "hypergrad/l1/norm": 5.0,
        "hypergrad/l1/snr": 0.75,
    }
