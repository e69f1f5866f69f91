"""Several runs, or several optimizers, that write to one recorder."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selftune as st
from selftune.__main__ import main
from selftune.monitor import JSONL, InMemory, Row, read_jsonl

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(200, 4, generator=GENERATOR)
Y = X.square().sum(1, keepdim=True)
BATCHES = list(zip(X.split(40), Y.split(40), strict=True))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))


def fit(folder: Path | None, recorder: Any, steps: int = 40, **options: Any) -> Any:
    return st.Tuner(net(), F.mse_loss).fit(
        BATCHES[:3], BATCHES[3:], steps=steps, progress=False, log_dir=folder, recorder=recorder,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["lines", "memory"])
def test_loading_one_of_two_optimizers_keeps_the_curves_of_the_other(
    kind: str, tmp_path: Path
) -> None:
    """Law: entries before the checkpoint stay; one counts five steps, the other one."""
    log = JSONL(tmp_path / "gan.jsonl") if kind == "lines" else InMemory()
    models = {"critic": net(), "generator": net()}
    opts = {
        n: st.AdamW(m.parameters(), lr=1e-3, log_dir=log, name=n, probe=False)
        for n, m in models.items()
    }

    def step(name: str) -> None:
        model, opt = models[name], opts[name]
        opt.zero_grad()
        F.mse_loss(model(X[:100]), Y[:100]).backward()
        opt.step()
        opt.hyper_step(lambda: F.mse_loss(model(X[100:]), Y[100:]))

    def tags() -> list[tuple[str, int]]:
        for opt in opts.values():
            opt.flush()
        rows = log.rows if isinstance(log, InMemory) else [
            Row(r["tag"], 0.0, r["step"]) for r in read_jsonl(log.path) if "tag" in r
        ]  # fmt: skip
        return [(r.tag, r.step) for r in rows]

    for _ in range(20):
        for _ in range(5):
            step("critic")
        step("generator")
    before, states = tags(), {n: o.state_dict() for n, o in opts.items()}
    assert max(s for t, s in before if t == "critic/hyper/lr") == 100
    for name, opt in opts.items():
        opt.load_state_dict(states[name])
    assert tags() == before


def test_a_run_without_a_checkpoint_keeps_what_others_wrote_before(tmp_path: Path) -> None:
    """Twin: the second run in a file of its own."""
    together, alone = tmp_path / "both.jsonl", tmp_path / "alone.jsonl"
    fit(tmp_path / "a", JSONL(together))
    first = together.read_text()
    fit(tmp_path / "b", JSONL(together), resume=True)
    fit(tmp_path / "c", JSONL(alone), resume=True)
    assert together.read_text().startswith(first)

    def curve(lines: list[dict[str, Any]], tag: str) -> list[Any]:
        return [(r["step"], r["value"]) for r in lines if r.get("tag") == tag]

    second = [json.loads(line) for line in together.read_text()[len(first) :].splitlines()]
    assert curve(second, "hyper/lr") == curve(read_jsonl(alone), "hyper/lr") != []


def test_of_two_runs_in_a_file_the_last_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Twin: the second run in a file of its own."""
    together, alone = tmp_path / "both.jsonl", tmp_path / "alone.jsonl"
    fit(None, JSONL(together), steps=60)
    for path in (together, alone):
        fit(None, JSONL(path))
    shown = []
    with caplog.at_level(logging.WARNING, "selftune"):
        for path in (together, alone):
            main(["show", str(path)])
            shown.append(capsys.readouterr().out.split("\n", 1)[1])
    assert shown[0] == shown[1]
    assert "another run begins; it alone is shown" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "lines"])
def test_an_extended_run_that_is_killed_shows_no_verdict_of_the_earlier_end(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: what was written at the end is not of the run that goes on."""
    lines = tmp_path / "lines.jsonl"
    fit(tmp_path, JSONL(lines), checkpoint_every=20)
    target = str(tmp_path if kind == "folder" else lines)
    main(["show", target])
    assert "by hypergradients (" in capsys.readouterr().out

    def die(progress: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, JSONL(lines), steps=80, callbacks=[die], evaluate_every=30,
            checkpoint_every=20, resume=True)  # fmt: skip
    main(["show", target])
    assert "by hypergradients (" not in capsys.readouterr().out


def test_runs_whose_loss_is_not_a_number_come_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {"a": 2.0, "b": float("nan"), "c": 1.0}
    for name, loss in losses.items():
        recorder = st.monitor.TensorBoard(tmp_path / name)
        recorder.scalars([Row("hyper/lr", 0.1, 1), Row("Loss/final", loss, 1)])
        recorder.end("finished")
    main(["show", *(str(tmp_path / n) for n in losses)])
    table = capsys.readouterr().out.split("final hyperparameters\n")[1]
    assert [line.split()[0] for line in table.splitlines()] == ["1", "2", "nan"]
