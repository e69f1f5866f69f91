"""Logs of runs that are resumed or share a folder. Truth: TensorBoard's own reader."""

import copy
import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.summary.writer import event_file_writer

import selftune as st
from selftune.monitor import JSONL, InMemory, Monitor, Row, TensorBoard, read_jsonl, reading


def fit(folder: Path, callbacks: Any = (), **options: Any) -> Any:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16), strict=True))
    tuner = st.Tuner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, compile=False)
    return tuner.fit(
        batches[:12], batches[12:], progress=False, log_dir=folder, log_every=5,
        evaluate_every=15, callbacks=callbacks, recorder=JSONL(folder / "run.jsonl"),
        **({"epochs": 5} | options),
    )  # fmt: skip


def test_a_resumed_run_goes_on_with_the_same_curves(tmp_path: Path) -> None:
    def die(progress: Any) -> None:
        if progress.step == 45:
            raise ZeroDivisionError("a defect of the user's")

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "twice", [die])  # its last checkpoint is that of step 30
    resumed = fit(tmp_path / "twice", resume=True)
    whole = fit(tmp_path / "once")
    assert resumed.hparams == whole.hparams
    for tag in ("hyper/lr", "Loss/val", "Loss/final"):
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


def test_the_end_of_a_run_that_is_resumed_is_not_doubled(tmp_path: Path) -> None:
    for folder in ("twice", "twice", "once"):
        fit(tmp_path / folder, resume=True)
    twice, once = (
        EventAccumulator(str(tmp_path / folder)).Reload() for folder in ("twice", "once")
    )
    for tag in ("hyper/lr", "Loss/final"):
        steps = [e.step for e in once.Scalars(tag)]
        assert steps[-1] == 60
        assert [e.step for e in twice.Scalars(tag)] == steps
        lines = read_jsonl(tmp_path / "twice" / "run.jsonl")
        assert [r["step"] for r in lines if r.get("tag") == tag] == steps


def test_the_end_sorts_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second are numbered, and the tenth sorts before the ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    recorder = TensorBoard(tmp_path)
    recorder.begin({"lr": 0.1}, ["lr"])
    recorder.scalars([Row("Loss/val", 0.5, 10)])
    recorder.last([Row("Loss/val", 0.4, 20)])
    recorder.end("finished")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("Loss/val")] == [10, 20]


def test_a_run_that_ended_before_its_first_checkpoint_begins_its_curves_anew(
    tmp_path: Path,
) -> None:
    def die(progress: Any) -> None:
        raise ZeroDivisionError("a defect of the user's")

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "twice", [die], checkpoint_every=30, resume=True)
    fit(tmp_path / "twice", checkpoint_every=30, resume=True)
    fit(tmp_path / "once", checkpoint_every=30)
    assert curves(tmp_path / "twice") == curves(tmp_path / "once")


def curves(folder: Path) -> str:
    """All curves without times, from event files and from lines; as text, for NaN is itself."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [t for t in read.Tags()["scalars"] if not t.startswith("time/")]
    lines = [r for r in read_jsonl(folder / "run.jsonl") if "value" in r]
    return "\n".join(
        f"{t} {[(e.step, e.value) for e in read.Scalars(t)]}"
        f" {[(r['step'], r['value']) for r in lines if r['tag'] == t]}"
        for t in tags
    )


def looped(recorder: Any, last: int, state: Any = None) -> Any:
    """A loop of one's own to a step, perhaps from a state; returns the state there."""
    torch.manual_seed(0)
    net, x = torch.nn.Linear(4, 1), torch.randn(64, 4)
    opt = st.SGD(net, lr=0.01, log_dir=recorder, total_steps=200, probe=False)
    first = 0
    if state is not None:
        first = state["step"]
        net.load_state_dict(state["net"])
        opt.load_state_dict(state["opt"])
    for _ in range(first, last):
        opt.zero_grad()
        loss = (net(x[:32]) - x[:32].sum(1, keepdim=True)).square().mean()
        loss.backward()
        opt.step()
        opt.report(loss)
        opt.hyper_step(lambda: (net(x[32:]) - x[32:].sum(1, keepdim=True)).square().mean())
    opt.flush()
    state = {"step": last, "net": net.state_dict(), "opt": opt.state_dict()}
    return copy.deepcopy(state)


def test_a_killed_extension_leaves_no_entries_twice(tmp_path: Path) -> None:
    """Truth: the curves of an extension that nobody killed."""

    def die(progress: Any) -> None:
        if progress.step > 60:
            raise ZeroDivisionError("a defect of the user's")

    for name in ("killed", "whole"):
        fit(tmp_path / name)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "killed", [die], resume=True, epochs=10, checkpoint_every=10**6)
    curves = []
    for name in ("killed", "whole"):
        fit(tmp_path / name, resume=True, epochs=10)
        lines = read_jsonl(tmp_path / name / "run.jsonl")
        rows = [(r["tag"], r["step"]) for r in lines if "value" in r]
        curves.append(sorted(r for r in rows if not r[0].startswith("time/")))
    assert curves[0] == curves[1]


def test_an_event_at_the_step_of_a_resume_stays_apart(tmp_path: Path) -> None:
    """Truth: the curve without a resume, in which a NaN follows every event."""
    recorder = TensorBoard(tmp_path)
    recorder.begin({"lr": 0.1}, ["lr"])
    recorder.scalars([Row("when/lr", -1.0, 50), Row("hyper/lr", 0.1, 50)])
    recorder.end("failed")
    recorder = TensorBoard(tmp_path)
    recorder.resume(50)
    recorder.scalars([Row("when/lr", -2.0, 90)])
    recorder.end("finished")
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("when/lr")
    found = [(e.step, None if math.isnan(e.value) else e.value) for e in events]
    assert found == [(50, -1.0), (51, None), (90, -2.0), (91, None)]


def test_a_loaded_optimizer_writes_the_same_curves(tmp_path: Path) -> None:
    """Also those that compare an entry with earlier ones: margins, agreement, verdicts."""
    whole, cut = InMemory(), InMemory()
    looped(whole, 140)
    looped(cut, 140, looped(cut, 80))
    rows = [[r for r in one.rows if not r.tag.startswith("time/")] for one in (whole, cut)]
    assert {"response/agreement", "margin/lr/low", "verdict/lr"} <= {r.tag for r in rows[0]}
    assert repr(rows[0]) == repr(rows[1])  # for NaN is itself


@pytest.mark.slow
def test_a_run_in_the_folder_of_a_killed_one_replaces_its_curves(tmp_path: Path) -> None:
    script = f"""
import os, signal
from selftune.monitor import Row, TensorBoard
TensorBoard({str(tmp_path)!r}).scalars([Row("a", float(s), s) for s in range(5)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    recorder = TensorBoard(tmp_path)
    recorder.scalars([Row("a", 7.0, s) for s in range(3)])
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in read.Scalars("a")] == [(s, 7.0) for s in range(3)]
    recorder.end("finished")
    TensorBoard(tmp_path).scalars([Row("b", 8.0, 1)])  # beside one that has ended
    read = EventAccumulator(str(tmp_path)).Reload()
    assert len(read.Scalars("a")) == 3


def test_a_run_beside_the_run_of_another_process_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: files of this process, such as those of the user's own writer, are no other run."""
    for _ in range(2):
        TensorBoard(tmp_path).scalars([Row("a", 1.0, 1)])
    assert not caplog.messages
    (tmp_path / "events.out.tfevents.1.elsewhere.1.0").touch()
    recorder = TensorBoard(tmp_path)
    for step in range(2):
        recorder.scalars([Row("a", 1.0, step)])
    assert len(caplog.messages) == 1
    assert "already contains a run" in caplog.messages[0]
    resumed = TensorBoard(tmp_path)
    resumed.resume(1)
    resumed.scalars([Row("a", 1.0, 2)])
    assert len(caplog.messages) == 1


def test_a_second_run_of_a_process_in_the_folder_of_the_first_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A notebook's cell that is run again."""
    for _ in range(2):
        recorder = TensorBoard(tmp_path)
        recorder.begin({"lr": 0.1}, ["lr"])
        recorder.end("finished")
    assert len(caplog.messages) == 1
    assert "already contains a run" in caplog.messages[0]


def test_a_run_in_a_folder_that_was_deleted_does_not_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        recorder = TensorBoard(tmp_path / "run")
        recorder.begin({"lr": 0.1}, ["lr"])
        recorder.end("finished")
        shutil.rmtree(tmp_path / "run")
    assert not caplog.messages


def test_two_writers_share_a_folder(tmp_path: Path) -> None:
    one, other = TensorBoard(tmp_path), TensorBoard(tmp_path)
    one.scalars([Row("a", 1.0, 1)])
    other.scalars([Row("b", 2.0, 1)])
    one.scalars([Row("a", 3.0, 2)])
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in read.Scalars("a")] == [1.0, 3.0]
    assert [e.value for e in read.Scalars("b")] == [2.0]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import selftune as st
from selftune.monitor import JSONL

driver, folder, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(256, 4)
batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16), strict=True))
net, loss_fn = torch.nn.Linear(4, 1), torch.nn.functional.mse_loss
recorder = JSONL(folder / "run.jsonl")

def die(step):
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)

if driver == "tuner":
    tuner = st.Tuner(net, loss_fn, compile=False)
    tuner.fit(
        batches[:12], batches[12:], epochs=10, progress=False, log_dir=folder, log_every=5,
        evaluate_every=15, checkpoint_every=30, callbacks=[lambda p: die(p.step)],
        recorder=recorder, resume=True,
    )
else:
    opt = st.SGD(net, lr=0.01, log_dir=recorder, total_steps=120)
    path, first = folder / "saved.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        opt.load_state_dict(saved["opt"])
        net.load_state_dict(saved["net"])
        first = saved["step"]
    for step in range(first, 120):
        x, y = batches[step % 12]
        opt.zero_grad()
        loss_fn(net(x), y).backward()
        opt.step()
        opt.hyper_step(lambda: loss_fn(net(batches[12][0]), batches[12][1]))
        if step + 1 in (30, 60):
            state = {"opt": opt.state_dict(), "net": net.state_dict(), "step": step + 1}
            torch.save(state, path)
        die(step + 1)
    opt.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["tuner", "optimizer"])
def test_curves_have_no_hole_before_the_checkpoint_of_a_killed_run(
    driver: str, tmp_path: Path
) -> None:
    """Truth: the curves of a run that nobody killed."""
    curves = []
    for name, kills in (("killed", (75, 0)), ("whole", (0,))):
        (tmp_path / name).mkdir()
        for last in kills:
            command = [sys.executable, "-c", KILLED, driver, str(tmp_path / name), str(last)]
            done = subprocess.run(command, check=False)
            assert done.returncode == (-signal.SIGKILL if last else 0)
        lines = read_jsonl(tmp_path / name / "run.jsonl")
        rows = [(r["tag"], r["step"], r["value"]) for r in lines if "value" in r]
        curves.append(sorted(r for r in rows if not r[0].startswith("time/")))
    assert curves[0] == curves[1]
    assert {"hyper/lr", "Loss/val"} <= {tag for tag, _, _ in curves[0]}


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
@pytest.mark.parametrize("ends", ["finish", "nothing"])
def test_a_logged_run_leaves_no_thread_and_no_descriptor(ends: str, tmp_path: Path) -> None:
    def run(number: int) -> None:
        net = torch.nn.Linear(2, 1)
        opt = st.SGD(net, lr=0.01, probe=False, log_dir=tmp_path / str(number))
        for _ in range(12):
            opt.zero_grad()
            net(torch.ones(4, 2)).square().mean().backward()
            opt.step()
            opt.hyper_step(lambda: net(torch.ones(4, 2)).square().mean())
        opt.flush()
        if ends == "finish":
            opt.finish()

    run(0)
    gc.collect()
    threads, files = threading.active_count(), _open_files()
    for number in range(1, 6):
        run(number)
        if ends == "nothing":
            gc.collect()
    assert threading.active_count() <= threads
    assert _open_files() <= files
    read = EventAccumulator(str(tmp_path / "3")).Reload()
    assert [e.step for e in read.Scalars("Loss/val")] == [5, 10]


def test_a_fit_leaves_no_thread(tmp_path: Path) -> None:
    fit(tmp_path / "0")
    threads, files = threading.active_count(), _open_files()
    fit(tmp_path / "1")
    assert threading.active_count() == threads
    assert _open_files() == files


def test_a_recorder_that_has_ended_goes_on_behind_what_it_wrote(tmp_path: Path) -> None:
    recorder = TensorBoard(tmp_path)
    recorder.resume(0)
    for step in (1, 2):
        recorder.scalars([Row("a", float(step), step)])
        recorder.end("finished")
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in read.Scalars("a")] == [1.0, 2.0]


def test_a_cut_event_file_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = TensorBoard(tmp_path)
    recorder.scalars([Row("a", 1.0, step) for step in range(20)])
    recorder.end("finished")
    assert len(reading.read(tmp_path).curves["a"][0]) == 20
    assert not caplog.records
    path = min(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    assert 10 < len(reading.read(tmp_path).curves["a"][0]) < 20
    assert f"{path} is damaged, or truncated" in caplog.text


def test_a_file_of_something_else_is_kept_beside_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("my notes\n")
    JSONL(path).scalars([Row("a", 1.0, 1)])
    held = path.read_bytes()
    JSONL(path).resume(1)
    assert [r["tag"] for r in read_jsonl(path)] == ["a"]
    assert (tmp_path / "run.jsonl.cut").read_bytes() == held
    assert "run.jsonl.cut" in caplog.text


def test_a_log_that_stops_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run.jsonl"
    monitor = Monitor([JSONL(path)])
    monitor.scalar("a", 1.0, 1)
    monitor.flush()
    assert f"{path}: logging stopped" in caplog.text


class Loop:
    """A run that may go back, or be resumed elsewhere."""

    def __init__(self, target: Any) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(60, 4)
        self.net = torch.nn.Linear(4, 1)
        self.opt = st.AdamW(self.net, lr=0.01, total_steps=120, log_dir=target)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            x = self.x[step % 50 : step % 50 + 8]
            self.opt.zero_grad()
            self.loss(x).backward()
            self.opt.step()
            self.opt.hyper_step(lambda: self.loss(self.x[50:]))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def save(self) -> Any:
        return copy.deepcopy((self.net.state_dict(), self.opt.state_dict()))

    def load(self, state: Any) -> None:
        self.net.load_state_dict(state[0])
        self.opt.load_state_dict(state[1])


def curve(target: Any) -> list[tuple[int, float]]:
    if isinstance(target, InMemory):
        return list(zip(*target.curve("Loss/val"), strict=True))
    if isinstance(target, JSONL):
        return list(zip(*reading.read(target.path).curves["Loss/val"], strict=True))
    events = EventAccumulator(str(target), {"scalars": 0}).Reload().Scalars("Loss/val")
    return [(e.step, e.value) for e in events]


@pytest.mark.parametrize("kind", ["folder", "lines", "memory"])
def test_going_back_in_the_same_optimizer(kind: str, tmp_path: Path) -> None:
    """Truth: the run that did not go back (undone entries stayed)."""
    targets = [
        {"folder": path, "lines": JSONL(path / "run.jsonl"), "memory": InMemory()}[kind]
        for path in (tmp_path / "once", tmp_path / "back")
    ]
    once = Loop(targets[0])
    once.train(0, 120)
    once.opt.finish()
    back = Loop(targets[1])
    back.train(0, 60)
    state = back.save()
    back.train(60, 90)
    back.load(state)
    back.train(60, 120)
    back.opt.finish()
    assert curve(targets[1]) == curve(targets[0])
    assert len(curve(targets[0])) > 10


def test_a_run_resumed_elsewhere_has_its_start_there(tmp_path: Path) -> None:
    """Truth: the values given, which the HParams page compares."""
    first = Loop(tmp_path / "first")
    first.train(0, 60)
    state = first.save()
    for target in (tmp_path / "second", JSONL(tmp_path / "run.jsonl"), InMemory()):
        other = Loop(target)
        other.load(state)
        other.train(60, 120)
        other.opt.finish()
        if isinstance(target, InMemory):
            assert target.hparams["lr"] == 0.01
        else:
            assert reading.read(getattr(target, "path", target)).given["lr"] == 0.01
    data = EventAccumulator(str(tmp_path / "second")).Reload().PluginTagToContent("hparams")
    assert {"_hparams_/session_start_info", "_hparams_/session_end_info"} <= data.keys()


def test_a_fit_resumed_elsewhere_has_its_start_there(tmp_path: Path) -> None:
    def stop(progress: Any) -> bool:
        return progress.step >= 30

    fit(tmp_path / "first", [stop])
    fit(tmp_path / "second", resume=tmp_path / "first" / "last.pt")
    given = [reading.read(tmp_path / name).given for name in ("first", "second")]
    assert given[0] == pytest.approx(given[1])
    assert given[0]["lr"] > 0


def test_files_of_an_earlier_process_with_this_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a restarted container. Truth: a killed run's curves are replaced, without a warning."""
    recorder = TensorBoard(tmp_path)
    recorder.scalars([Row("a", 1.0, step) for step in range(9)])
    del recorder
    gc.collect()
    (file,) = tmp_path.iterdir()
    parts = file.name.split(".")
    parts[3] = str(int(parts[3]) - 10**6)  # before this process began
    file.rename(tmp_path / ".".join(parts))
    recorder = TensorBoard(tmp_path)
    recorder.scalars([Row("a", 2.0, step) for step in range(3)])
    recorder.end("finished")
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [e.value for e in read.Scalars("a")] == [2.0] * 3
    assert "already contains a run" not in caplog.text
