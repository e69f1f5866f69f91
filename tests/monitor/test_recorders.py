"""Recorders. Truths: what was handed in, TensorBoard's own reader, the file system."""

import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import selftune as st
from selftune.monitor import JSONL, InMemory, Monitor, Row, TensorBoard, as_recorder, read_jsonl

ROWS = [Row("Loss/val", 0.5, 1), Row("hyper/a b/c", math.nan, 1), Row("Loss/val", 0.25, 2)]


def test_memory_keeps_everything() -> None:
    recorder = InMemory()
    recorder.begin({"lr": 0.1}, ["lr"])
    recorder.scalars(ROWS)
    recorder.text("verdicts", "all well", 2)
    recorder.end("finished")
    assert recorder.curve("Loss/val") == ([1, 2], [0.5, 0.25])
    assert (recorder.hparams, recorder.status) == ({"lr": 0.1}, "finished")
    assert recorder.texts == [("verdicts", "all well", 2)]


def test_lines_are_json_and_nan_is_null(tmp_path: Path) -> None:
    """Truth: json, strictly; a line that a kill cut short is left out."""
    recorder = JSONL(tmp_path / "new" / "run.jsonl")
    recorder.begin({"lr": 0.1}, ["lr"])
    recorder.scalars(ROWS)
    recorder.end("finished")
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in recorder.path.read_text().splitlines()
    ]
    assert [line.get("value", "-") for line in lines] == ["-", 0.5, None, 0.25, "-"]
    with recorder.path.open("a") as file:
        file.write('{"tag": "val/lo')
    assert read_jsonl(recorder.path) == lines


@pytest.mark.parametrize("kind", ["memory", "jsonl", "tensorboard"])
def test_a_resumed_run_doubles_no_step(kind: str, tmp_path: Path) -> None:
    """Law: steps after the checkpoint are of a past that did not happen."""
    make: Any = {
        "memory": InMemory, "jsonl": lambda: JSONL(tmp_path / "run.jsonl"),
        "tensorboard": lambda: TensorBoard(tmp_path),
    }[kind]  # fmt: skip
    first = make()
    first.scalars([Row("loss", float(s), s) for s in range(6)])
    first.end("failed")
    again = first if kind == "memory" else make()
    again.resume(2)
    again.scalars([Row("loss", 10.0 * s, s) for s in range(3, 6)])
    if kind == "memory":
        found = list(zip(*again.curve("loss"), strict=True))
    elif kind == "jsonl":
        found = [(row["step"], row["value"]) for row in read_jsonl(tmp_path / "run.jsonl")]
    else:
        events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
        found = [(e.step, e.value) for e in events]
    assert found == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_a_function_is_called_once_a_step() -> None:
    calls: list[Any] = []
    as_recorder(lambda values, step: calls.append((step, values))).scalars(ROWS[::2])
    assert calls == [(1, {"Loss/val": 0.5}), (2, {"Loss/val": 0.25})]


def test_a_function_sees_steps_in_order() -> None:
    """As W&B needs them; marks of the sweep are written after it, at its start."""
    steps: list[int] = []
    model = torch.nn.Linear(4, 1)
    opt = st.SGD(model, lr=1e-3, total_steps=100, log_dir=lambda values, step: steps.append(step))
    x = torch.randn(32, 4)
    for _ in range(100):
        opt.zero_grad()
        loss = (model(x) - x[:, :1]).square().mean()
        loss.backward()
        opt.step()
        opt.report(loss)
        opt.hyper_step(lambda: (model(x) - x[:, :1]).square().mean())
    opt.finish()
    assert steps == sorted(steps)
    assert len(steps) > 5


def test_an_object_without_flush_is_refused() -> None:
    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    with pytest.raises(TypeError, match="with its add_scalar and flush"):
        as_recorder(Writer())


def test_a_url_is_left_to_torch_s_writer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Truth: fsspec, with which the writer opens it; nothing is written to the directory."""
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []
    writer = torch.utils.tensorboard.SummaryWriter
    monkeypatch.setattr(
        "torch.utils.tensorboard.SummaryWriter", lambda folder: seen.append(folder) or writer("a")
    )
    recorder = TensorBoard("memory://bucket/run")
    recorder.scalars(ROWS[:1])
    recorder.end("finished")
    assert seen == ["memory://bucket/run"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["jsonl", "tensorboard"])
def test_the_place_does_not_depend_on_later_directories(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    recorder: Any = JSONL("run.jsonl") if kind == "jsonl" else TensorBoard("run")
    recorder.scalars(ROWS[:1])
    monkeypatch.chdir(tmp_path / "other")
    recorder.scalars(ROWS[2:])
    recorder.end("finished")
    assert not list((tmp_path / "other").iterdir())
    if kind == "jsonl":
        assert [r.get("value") for r in read_jsonl(tmp_path / "run.jsonl")] == [0.5, 0.25, None]
    else:
        events = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("Loss/val")
        assert [e.value for e in events] == [0.5, 0.25]


def test_a_run_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback changes the directory; log, checkpoints and report stay together."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(6, 8, 3)]

    def change(progress: Any) -> None:
        monkeypatch.chdir(tmp_path / "other")

    tuner = st.Tuner(torch.nn.Linear(3, 1), torch.nn.MSELoss(), compile=False, probe=False)
    result = tuner.fit(
        batches[:4], batches[4:], steps=12, log_dir="run", callbacks=[change], progress=False
    )
    result.report()
    assert not list((tmp_path / "other").iterdir())
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"best.pt", "last.pt", "report.html", "schedule.json"} <= names


def test_several_listen() -> None:
    one, other = InMemory(), InMemory()
    both = as_recorder([one, other])
    both.begin({"lr": 1.0}, [])
    both.scalars(ROWS[:1])
    both.text("a", "b", 1)
    both.resume(0)
    both.end("stopped")
    assert vars(one) == vars(other)
    assert (one.rows, one.status, one.hparams) == ([], "stopped", {"lr": 1.0})
    with pytest.raises(TypeError, match="recorder=3"):
        as_recorder(3)


def test_a_shared_one_drops_the_final_numbers_of_a_resumed_run() -> None:
    memory = InMemory()
    named = as_recorder(memory, "generator")
    named.last(ROWS[:1])
    assert memory.rows == [Row(f"generator/{ROWS[0].tag}", ROWS[0].value, ROWS[0].step)]
    named.resume(ROWS[0].step)
    assert memory.rows == []


def test_one_that_fails_leaves_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    memory = InMemory()
    monitor = Monitor([JSONL(tmp_path / "file" / "run.jsonl"), memory])
    monitor.begin({}, [])
    monitor.scalar("loss", 1.0, 1)
    monitor.end("finished")
    assert memory.curve("loss") == ([1], [1.0])
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert monitor.on


def test_writing_that_fails_ends_logging_not_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Law: one warning, whatever is written first."""
    (tmp_path / "file").write_text("")
    monitor = Monitor(JSONL(tmp_path / "file" / "run.jsonl"))  # a folder that cannot be made
    monitor.begin({}, [])
    for step in range(300):
        monitor.scalar("loss", 0.0, step)
    monitor.text("a", "b", 1)
    monitor.end("finished")
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert not monitor.on


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_session_has_a_start_and_an_end(status: str, tmp_path: Path) -> None:
    """Truth: TensorBoard's plugin data, read back."""
    from tensorboard.plugins.hparams import api_pb2, metadata

    recorder = TensorBoard(tmp_path)
    recorder.begin({"lr": 0.1, "weight_decay": 0.01}, ["lr"])
    recorder.end(status)
    data = EventAccumulator(str(tmp_path)).Reload().PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(data["_hparams_/session_start_info"])
    end = metadata.parse_session_end_info_plugin_data(data["_hparams_/session_end_info"])
    assert {n: v.number_value for n, v in start.hparams.items()} == {
        "start/lr": 0.1, "start/weight_decay": 0.01
    }  # fmt: skip
    well = status == "finished"
    assert end.status == (api_pb2.STATUS_SUCCESS if well else api_pb2.STATUS_FAILURE)
    assert 0 < start.start_time_secs <= end.end_time_secs
    assert not any(p.is_dir() for p in tmp_path.iterdir()), "no child run"


def test_everything_a_tuner_tells(tmp_path: Path) -> None:
    """Law: the documented tags, at their steps; the end is recorded too."""
    import torch

    torch.manual_seed(0)
    x = torch.randn(256, 4)
    batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16), strict=True))
    recorder = InMemory()
    result = st.Tuner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, compile=False).fit(
        batches[:12], batches[12:], epochs=10, progress=False, recorder=recorder, log_every=10
    )
    tags = {r.tag for r in recorder.rows}
    names = ["lr", "beta1", "weight_decay"]
    want = {"Loss/train", "Loss/val", "Loss/gap", "outer/averaged-vs-last", "time/overhead"}
    want |= {"response/agreement", "response/predicted", "response/realised", "Loss/final"}
    for name in names:
        want |= {f"hyper/{name}", f"verdict/{name}"}
        want |= {f"hypergrad/{name}/{k}" for k in ("value", "norm", "snr")}
        want |= {f"margin/{name}/low", f"margin/{name}/high"}
    assert want <= tags
    assert recorder.status == "finished"
    assert set(result.verdicts) == set(names)
    steps, rates = recorder.curve("hyper/lr")
    assert (steps[-1], rates[-1]) == (120, result.hparams["lr"])
    lows, highs, present = (
        dict(zip(*recorder.curve(tag), strict=True))
        for tag in ("margin/lr/low", "margin/lr/high", "log10/lr")
    )
    assert len(lows) > 5
    for step, low in lows.items():
        assert low <= present[step] + 1e-9
        assert present[step] <= highs[step] + 1e-9


def drawn(name: str) -> str:
    """The tag that the chart of a hyperparameter draws."""
    return f"hyper/{name}" if name == "beta1" else f"log10/{name}"


def test_many_layers_are_summed_up(tmp_path: Path) -> None:
    """Law: 30 tensors with rates of their own give a range and a histogram, not 30 charts."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(15)])
    x = torch.randn(32, 4)
    opt = st.SGD(model, lr=0.01, per={"lr": "tensor"}, probe=False, log_dir=tmp_path)
    for _ in range(60):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        opt.hyper_step(lambda: (model(x) - 1).square().mean())
    opt.finish()
    read = EventAccumulator(str(tmp_path), {"histograms": 0, "scalars": 0}).Reload()
    told = {t for t in read.Tags()["scalars"] if t.startswith("hyper/lr")}
    assert told <= {"hyper/lr", *(f"hyper/lr/{i}" for i in range(8)), "hyper/lr/lowest",
                    "hyper/lr/median", "hyper/lr/highest", "log10/lr"}  # fmt: skip
    assert read.Tags()["histograms"] == ["layers/lr"]
    last = read.Histograms("layers/lr")[-1].histogram_value
    rates = [v for v in opt.hparams["lr"]]
    assert (last.num, last.min, last.max) == (30, min(rates), max(rates))


def test_a_run_that_fails_says_so() -> None:
    import torch

    def broken(output: Any, target: Any) -> Any:
        if len(seen) > 40:
            raise RuntimeError("broken loss")
        seen.append(1)
        return torch.nn.functional.mse_loss(output, target)

    seen: list[int] = []
    batches = [(torch.ones(4, 2), torch.ones(4, 1))] * 4
    recorder = InMemory()
    with pytest.raises(RuntimeError, match="broken loss"):
        st.Tuner(torch.nn.Linear(2, 1), broken, compile=False).fit(
            batches, batches[:1], epochs=50, progress=False, recorder=recorder
        )
    assert recorder.status == "failed"


def test_an_optimizer_tells_what_the_tuner_tells() -> None:
    """Law: a margin encloses its value, a share of time is one, and a verdict is a known one."""
    import torch

    from selftune.monitor.verdicts import KINDS

    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 1), torch.randn(64, 4)
    target, recorder = x.sum(1, keepdim=True), InMemory()
    opt = st.AdamW(model, lr=0.01, probe=False, log_dir=recorder)
    for _ in range(300):
        opt.zero_grad()
        loss = (model(x[:32]) - target[:32]).square().mean()
        loss.backward()
        opt.step()
        opt.report(loss)
        opt.hyper_step(lambda: (model(x[32:]) - target[32:]).square().mean())
    opt.finish()
    tags = {row.tag for row in recorder.rows}
    for name in ("lr", "beta1", "weight_decay"):
        assert {f"hyper/{name}", f"verdict/{name}"} <= tags
        assert set(recorder.curve(f"verdict/{name}")[1]) <= set(range(len(KINDS)))
        lows, values, highs = (
            recorder.curve(tag)[1]
            for tag in (f"margin/{name}/low", drawn(name), f"margin/{name}/high")
        )
        assert len(lows) == len(values) == len(highs) > 50
        for low, value, high in zip(lows, values, highs, strict=True):
            assert low <= value + 1e-9
            assert value <= high + 1e-9
        assert max(highs) > min(lows)
    assert {"Loss/gap", "response/predicted", "response/realised"} <= tags
    steps, gains = recorder.curve("outer/averaged-vs-last")
    assert len(steps) == len(recorder.curve("hyper/lr")[0]) // 20
    assert all(abs(g) < 10 for g in gains)
    shares = recorder.curve("time/overhead")[1]
    assert min(shares) > 0
    assert max(shares) < 1
    assert [tag for tag, *_ in recorder.texts] == ["verdicts", "why"]
    assert "lr" in str(recorder.texts[0])


@pytest.mark.slow
def test_thousands_of_rates(tmp_path: Path) -> None:
    """Law: as many charts as for thirty, and the histogram counts all of them."""
    import torch

    params = [torch.nn.Parameter(torch.full((1,), 0.5 + i % 7)) for i in range(3_000)]
    opt = st.SGD(params, lr=0.01, per={"lr": "tensor"}, probe=False, log_dir=tmp_path)

    def loss() -> torch.Tensor:
        return (torch.cat(params) - noise).square().sum()

    for _ in range(20):
        noise = torch.randn(3_000)
        opt.zero_grad()
        loss().backward()
        opt.step()
        opt.hyper_step(loss)
    opt.finish()
    read = EventAccumulator(str(tmp_path), {"histograms": 0, "scalars": 0}).Reload()
    assert len(read.Tags()["scalars"]) < 45
    last = read.Histograms("layers/lr")[-1].histogram_value
    assert last.num == 3_000


@pytest.mark.slow
def test_logging_leaves_an_optimizer_s_run_alone() -> None:
    """Truth: the same run without a log, bit for bit, BatchNorm and dropout included."""
    import torch

    def run(**options: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.Dropout(),
            torch.nn.Linear(8, 1),
        )
        x = torch.randn(64, 4)
        opt = st.SGD(model, lr=0.01, probe=False, **options)
        for _ in range(250):
            opt.zero_grad()
            model(x[:32]).square().mean().backward()
            opt.step()
            opt.hyper_step(lambda: (model(x[32:]) - 1).square().mean())
        return [*model.parameters(), *model.buffers()]

    recorder = InMemory()
    for a, b in zip(run(), run(log_dir=recorder), strict=True):
        assert torch.equal(a, b)
    assert recorder.curve("outer/averaged-vs-last")[0]


@pytest.mark.parametrize("driver", ["tuner", "optimizer"])
def test_times_are_those_of_logging_and_not_of_writing(driver: str, tmp_path: Path) -> None:
    """Truth: the clock at each step; rows are written in blocks."""
    x, y = torch.randn(32, 2), torch.randn(32, 1)

    class Slow(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return super().forward(x)

    model = Slow(2, 1)
    if driver == "tuner":
        tuner = st.Tuner(model, torch.nn.MSELoss(), compile=False, probe=False, every=2)
        tuner.fit([(x, y)], [(x, y)], steps=50, evaluate_every=50, log_every=2, log_dir=tmp_path,
                  progress=False)  # fmt: skip
    else:
        opt = st.SGD(model, lr=0.01, probe=False, log_dir=tmp_path, every=2)
        for step in range(50):
            opt.zero_grad()
            (model(x) - y).square().mean().backward()
            opt.step()
            if step % 2:
                opt.hyper_step(lambda: (model(x) - y).square().mean())
        opt.finish()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("hyper/lr")
    times = {e.step: e.wall_time for e in events if 0 < e.step < 50}
    assert len(times) > 8
    for (first, start), (last, end) in pairwise(sorted(times.items())):
        assert end - start > 0.02 * (last - first)
