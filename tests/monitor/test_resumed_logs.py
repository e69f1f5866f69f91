"""Logs of runs that are resumed or share a folder. Truth: TensorBoard's own reader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata

import selftune as st
from selftune.monitor import JSONL, Row, TensorBoard, read_jsonl


def fit(folder: Path, callbacks: Any = (), **options: Any) -> Any:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16), strict=True))
    tuner = st.Tuner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, compile=False)
    return tuner.fit(
        batches[:12], batches[12:], epochs=10, progress=False, log_dir=folder, log_every=5,
        evaluate_every=30, callbacks=callbacks, recorder=JSONL(folder / "run.jsonl"), **options,
    )  # fmt: skip


def test_a_resumed_run_goes_on_with_the_same_curves(tmp_path: Path) -> None:
    def die(progress: Any) -> None:
        if progress.step == 90:
            raise ZeroDivisionError("a defect of the user's")

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "twice", [die])  # its last checkpoint is that of step 60
    resumed = fit(tmp_path / "twice", resume=True)
    whole = fit(tmp_path / "once")
    assert resumed.hparams == whole.hparams
    for tag in ("hyper/lr", "val/loss", "score/loss"):
        curves = []
        for name in ("twice", "once"):
            events = EventAccumulator(str(tmp_path / name)).Reload().Scalars(tag)
            curves.append([(e.step, e.value) for e in events])
            lines = read_jsonl(tmp_path / name / "run.jsonl")
            rows = [(r["step"], r["value"]) for r in lines if r.get("tag") == tag]
            assert [s for s, _ in rows] == [s for s, _ in curves[-1]]
        assert curves[0] == curves[1]
    data = EventAccumulator(str(tmp_path / "twice")).Reload().PluginTagToContent("hparams")
    end = metadata.parse_session_end_info_plugin_data(data["_hparams_/session_end_info"])
    assert end.status == api_pb2.STATUS_SUCCESS, "its first end was taken back"


def test_two_writers_share_a_folder(tmp_path: Path) -> None:
    one, other = TensorBoard(tmp_path), TensorBoard(tmp_path)
    one.scalars([Row("a", 1.0, 1)])
    other.scalars([Row("b", 2.0, 1)])
    one.scalars([Row("a", 3.0, 2)])
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in read.Scalars("a")] == [1.0, 3.0]
    assert [e.value for e in read.Scalars("b")] == [2.0]
