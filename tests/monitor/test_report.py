"""The report and the console. Truths: the run's own history, an HTML parser, exit codes."""

import html
import html.parser
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import selftune as st
from selftune.__main__ import main
from selftune.monitor import JSONL, Row
from selftune.monitor.reading import read
from selftune.monitor.report import Line, line, table
from selftune.monitor.verdicts import KINDS


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    x = torch.randn(256, 4)
    batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16), strict=True))
    tuner = st.Tuner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, compile=False)
    return tuner.fit(
        batches[:12], batches[12:], epochs=10, progress=False, log_dir=folder, log_every=10,
        recorder=JSONL(folder / "run.jsonl"),
    )  # fmt: skip


def test_the_table_is_the_history(finished: Any) -> None:
    text, why = finished.report().split("\n\n")
    assert why == finished.why
    rows = [row.split() for row in text.splitlines()[1:]]
    assert [row[0] for row in rows] == ["lr", "beta1", "weight_decay"]
    for row in rows:
        course = finished.history[row[0]]
        assert row[1:3] == [f"{course[0]:.3g}", f"{course[-1]:.3g}"]
        assert finished.verdicts[row[0]].sentence == " ".join(row[4:])


def test_the_page_holds_everything_itself(finished: Any) -> None:
    """Law: no address of anything else; each tag that is opened is known to the parser."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra report)")
    finished.report()
    text = (finished.folder / "report.html").read_text()
    html.parser.HTMLParser().feed(text)
    assert len(re.findall("<img ", text)) == 1 + len(finished.verdicts)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert st.TunedSchedule.load(finished.folder / "schedule.json") == finished.schedule


def test_names_are_escaped_and_many_are_summarised() -> None:
    rows = [Line(f"<b>{i}", 1.0, 1.0 + i, (0, 9), "settled") for i in range(10_000)]
    text = table(rows)
    assert len(text.splitlines()) == 42
    assert text.splitlines()[1].startswith("<b>9999")
    assert text.endswith("9960 more that changed less")
    from selftune.monitor.report import page

    assert "&lt;b&gt;7" in page("a < b", rows[:10], {})


def test_where_it_moved_by_hand() -> None:
    """Closed form: the middle nine tenths of the way, in log space."""
    assert line("a", (range(5), [1.0, 1.0, 10.0, 100.0, 100.0]), "").moved == (1, 3)
    assert line("a", (range(3), [0.5] * 3), "").moved is None
    assert line("a", ([7], [0.0]), "").moved is None


@pytest.mark.parametrize("source", ["folder", "jsonl"])
def test_the_console_shows_runs(source: str, finished: Any, capsys: Any) -> None:
    path = finished.folder if source == "folder" else finished.folder / "run.jsonl"
    assert main(["show", str(path)]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[2:5]]
    found = {row[0]: row[1:3] for row in rows}
    for name in finished.verdicts:
        course = finished.history[name]
        assert found[name] == [f"{course[0]:.3g}", f"{course[-1]:.3g}"]


def test_the_console_compares_runs_and_names_what_is_none(
    finished: Any, tmp_path: Path, capsys: Any
) -> None:
    worse = JSONL(tmp_path / "worse.jsonl")
    worse.scalars([st.monitor.Row("Loss/val", 1e6, 5), st.monitor.Row("hyper/lr", 0.5, 5)])
    assert main(["show", str(worse.path), str(finished.folder), str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    order = [row for row in out.splitlines() if "lr=" in row]
    assert str(finished.folder) in order[0]
    assert "1e+06" in order[1]
    assert f"{tmp_path}: no log of a run" in err


def test_files_that_are_no_log_are_survived(finished: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "weights.pt").write_bytes(b"\xfe\x00\x80\n1\n[2]")
    (events,) = [p for p in finished.folder.glob("*tfevents*") if p.suffix != ".end"]
    assert main(["show", str(tmp_path / "weights.pt"), str(events)]) == 1
    out, err = capsys.readouterr()
    assert "weights.pt: no log of a run" in err
    assert "weight_decay" in out


@pytest.mark.slow
def test_a_killed_run_can_be_read(tmp_path: Path) -> None:
    """Truth: a process that kills itself by SIGKILL in the middle of training."""
    code = f"""
import os, signal, torch, selftune as st
x = torch.randn(256, 4)
batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16)))
def kill(progress):
    if progress.step >= 72:
        os.kill(os.getpid(), signal.SIGKILL)
tuner = st.Tuner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss, compile=False)
tuner.fit(batches[:12], batches[12:], epochs=10, progress=False, log_dir={str(tmp_path)!r},
          log_every=5, callbacks=[kill])
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    log = read(tmp_path)
    assert log.loss() is not None
    swept, now = log.curves["hyper/lr"][1][0], log.curves["hyper/lr"][1][-1]
    lines = log.reasons().splitlines()
    assert len(lines) == 3
    assert f"lr: given 0.001 → sweep {swept:.3g} → {now:.3g} by hypergradients so far (" in lines[0]
    assert {one.name for one in log.lines()} == {"lr", "beta1", "weight_decay"}
    assert max(log.curves["hyper/lr"][0]) >= 40


def test_a_value_at_its_floor_was_not_set_by_hypergradients(tmp_path: Path) -> None:
    """Truth: the verdict that the unfinished run has logged."""
    recorder = JSONL(tmp_path / "run.jsonl")
    recorder.begin({"weight_decay": 0.01}, ["weight_decay"])
    tags = ("hyper", 0.06), ("verdict", KINDS.index("at bound"))
    rows = [Row(f"{tag}/weight_decay", float(value), 20) for tag, value in tags]
    recorder.scalars([*rows, Row("margin/weight_decay/low", 0.06, 20)])
    found = read(tmp_path / "run.jsonl").reasons()
    assert found == "weight_decay: given 0.01 → 0.06, its bound or floor"


def test_the_console_shows_sentences_and_looks_into_folders(finished: Any, capsys: Any) -> None:
    for path in (finished.folder, finished.folder / "run.jsonl", finished.folder.parent):
        assert main(["show", str(path)]) == 0
        out = capsys.readouterr().out
        assert str(path if path.suffix else finished.folder) in out
        for verdict in finished.verdicts.values():
            assert verdict.sentence in out
        assert finished.why in out


def test_a_run_under_way_has_sentences_too(tmp_path: Path, capsys: Any) -> None:
    running = JSONL(tmp_path / "running.jsonl")
    rows = [("hyper/lr", 0.5), ("verdict/lr", 1.0), ("hyper/l1", 0.25)]
    running.scalars([st.monitor.Row(tag, value, 5) for tag, value in rows])
    assert main(["show", str(running.path)]) == 0
    out = capsys.readouterr().out
    assert "lr is moving, now at 0.5" in out
    assert "running" in out


@pytest.mark.parametrize("kind", [SummaryWriter, JSONL])
def test_the_console_shows_named_optimizers_apart(kind: Any, tmp_path: Path, capsys: Any) -> None:
    """The optimizers' own hyperparameters and explanations."""
    torch.manual_seed(0)
    x, net = torch.randn(32, 4), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    path = str(tmp_path / "run")
    options: dict[str, Any] = {"log_dir": kind(path), "total_steps": 30, "lr": 1e-2}
    opts = {
        "body": st.AdamW(net[0], name="body", **options),
        "a/head": st.SGD(net[1], name="a/head", **options),
    }

    def loss() -> torch.Tensor:
        return (net(x) - x.sum(1, keepdim=True)).square().mean()

    for _ in range(30):
        loss().backward()
        for opt in opts.values():
            opt.step()
            opt.zero_grad()
            opt.hyper_step(loss)
    for opt in opts.values():
        opt.finish()
    assert main(["show", path]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    for at, (name, opt) in enumerate(sorted(opts.items())):
        title, _, *rows = blocks[2 * at].splitlines()
        assert title == f"{path}: {name}"
        ends = {row.split()[0]: row.split()[2] for row in rows}
        assert ends == {n: f"{v:.3g}" for n, v in opt.hparams.items() if n in ends}
        assert {"lr", "weight_decay"} <= set(ends)
        assert blocks[2 * at + 1] == opt.explain()


def test_sentences_of_names_with_spaces_are_found(tmp_path: Path) -> None:
    """The sentences as written; one name begins another."""
    recorder = JSONL(tmp_path / "run.jsonl")
    names = ("first", "first layer", "first layer dropout")
    sentences = {name: f"{name} has settled at 0.5" for name in names}
    recorder.scalars([Row(f"{tag}/{n}", 0.0, 5) for n in names for tag in ("hyper", "verdict")])
    recorder.text("verdicts", "\n".join(f"- {s}" for s in sentences.values()), 5)
    assert {one.name: one.verdict for one in read(recorder.path).lines()} == sentences


@pytest.mark.parametrize(
    "line",
    ['{"tag": "hyper/lr", "value": 0.1}', '{"tag": "hyper/lr", "value": "x", "step": 1}',
     '{"value": 0.1, "step": 1}', '{"tag": "hyper/lr", "value": 0.1, "step": [1]}'],
)  # fmt: skip
def test_lines_that_are_no_entries_are_named(
    line: str, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(f'{{"hparams": 3}}\n{line}\n')
    assert main(["show", str(path)]) == 1
    assert "no log of a run" in capsys.readouterr().err
    JSONL(path).scalars([Row("hyper/lr", 0.5, 5)])
    assert read(path).curves == {"hyper/lr": ([5], [0.5])}
    assert f"{path}, line 2: no tag with numbers as value and step; 1 such" in caplog.text


def test_a_log_without_hyperparameters_says_what_it_has(tmp_path: Path, capsys: Any) -> None:
    recorder = JSONL(tmp_path / "run.jsonl")
    recorder.scalars([Row("score/loss", 0.5, 5)])
    assert main(["show", str(recorder.path)]) == 0
    assert "no hyperparameters, only score/loss" in capsys.readouterr().out


def test_the_demo_ends_with_a_score(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    assert main(["demo", "--epochs", "1", "--log-dir", str(tmp_path / "demo")]) == 0
    found = re.search(r"([\d.]+) % accuracy on 360 test digits", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) > 50


def test_weight_decay_on_its_floor_says_so(tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    batches = list(zip(x.split(16), x.sum(1, keepdim=True).split(16), strict=True))
    model = torch.nn.Linear(4, 1)
    tuner = st.Tuner(model, torch.nn.functional.mse_loss, compile=False)
    result = tuner.fit(batches[:12], batches[12:], epochs=20, progress=False, log_dir=tmp_path)
    assert "lies on its floor" in result.verdicts["weight_decay"].sentence
    (line,) = (one for one in result.why.splitlines() if one.startswith("weight_decay: "))
    assert line.endswith(f" → {result.hparams['weight_decay']:.3g}, its floor")
    assert line in result.report()
    assert html.escape(line) in (tmp_path / "report.html").read_text()
    assert main(["show", str(tmp_path)]) == 0
    assert line in capsys.readouterr().out


def test_broken_lines_of_a_log_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They were left out in silence; with a byte order mark, so was the beginning."""
    recorder = JSONL(tmp_path / "run.jsonl")
    recorder.begin({"lr": 0.1}, ["lr"])
    recorder.scalars([Row("hyper/lr", 0.1, 1)])
    text = "\ufeff" + recorder.path.read_text()
    recorder.path.write_text(text + 'words\n[1]\n{"tag": "hyper\n{"tag": "hyper/l', "utf-8")
    assert read(recorder.path).given == {"lr": 0.1}
    assert "run.jsonl, line 3: no tag" in caplog.text
    assert "3 such lines" in caplog.text  # without the last one, which a kill cut short


def test_a_run_that_cannot_be_read_hides_no_other(
    finished: Any, tmp_path: Path, capsys: Any
) -> None:
    """Truth: the errors of the system for a name that is too long and a folder that is no file."""
    (tmp_path / "events.out.tfevents.1").mkdir()
    long = "x" * 300
    assert main(["show", long, str(tmp_path), str(finished.folder)]) == 1
    out, err = capsys.readouterr()
    assert [text in err for text in (long, str(tmp_path))] == [True, True]
    assert "weight_decay" in out


@pytest.mark.parametrize(
    "line",
    [f'{{"tag": "hyper/lr", "value": 1, "step": {"9" * 5000}}}', "[" * 100_000,
     f'{{"tag": "hyper/lr", "value": {"9" * 400}, "step": 1}}',
     '{"tag": "hyper/lr", "value": 1, "step": Infinity}',
     '{"tag": "hyper/lr", "value": 1, "step": NaN}'],
    ids=["digits", "nested", "value", "infinite", "nan"],
)  # fmt: skip
def test_numbers_that_are_none_are_named(
    line: str, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = JSONL(tmp_path / "run.jsonl")
    recorder.scalars([Row("hyper/lr", 0.5, 5)])
    recorder.path.write_text(f"{recorder.path.read_text()}{line}\n")
    recorder.scalars([Row("hyper/lr", 0.25, 6)])
    assert main(["show", str(recorder.path)]) == 0
    assert "0.25" in capsys.readouterr().out
    assert f"{recorder.path}, line 2: no tag with numbers" in caplog.text


@pytest.mark.parametrize(
    "entry", ['"verdict/lr", "value": 99', '"verdict/lr", "value": -1', '"when/lr", "value": 400']
)
def test_entries_of_another_version_are_left_out(entry: str, tmp_path: Path, capsys: Any) -> None:
    """Law: an unknown verdict is none, and a mark beyond the largest number is infinite."""
    lines = ['"hyper/lr", "value": 0.5', '"margin/lr/low", "value": 0.5', '"log10/lr", "value": 0']
    text = "".join(f'{{"tag": {line}, "step": 5}}\n' for line in [*lines, entry])
    (tmp_path / "run.jsonl").write_text(text)
    assert main(["show", str(tmp_path / "run.jsonl")]) == 0
    assert "lr" in (out := capsys.readouterr().out)
    assert "no verdict yet" in out


def test_a_demo_that_cannot_write_shows_its_table(tmp_path: Path, capsys: Any) -> None:
    """Truth: a file where the folder would be made."""
    pytest.importorskip("sklearn")
    (tmp_path / "file").touch()
    assert main(["demo", "--epochs", "1", "--log-dir", str(tmp_path / "file" / "demo")]) == 1
    out, err = capsys.readouterr()
    assert "weight_decay" in out
    assert str(tmp_path / "file") in err
