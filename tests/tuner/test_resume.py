"""Runs that end early. Truth: the same run, uninterrupted."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Dying, Outage, loader, net, points, same, tuner

import selftune as st
from selftune.tuner._compiled import Fused  # private: Ctrl-C has to come inside a step

VAL = [points(100, seed=1)]


def train_loader(**options: Any) -> Any:
    return loader(205, shuffle=True, **options)


def run(folder: Path | None, train: Any = None, resume: Any = False, **options: Any) -> Any:
    """A run with everything random in it: shuffling, dropout, shuffled validation."""
    torch.manual_seed(3)
    model = net(dropout=0.3)
    fit: dict[str, Any] = dict(epochs=options.pop("epochs", 6), resume=resume)
    fit |= dict(evaluate_every=11, checkpoint_every=4, progress=False)
    batches = train_loader() if train is None else train
    val = loader(60, seed=1, shuffle=True, batch_size=16)
    return tuner(model, **options).fit(batches, val, log_dir=folder, **fit)


@cache
def uninterrupted(case: str = "plain") -> Any:
    return run(None, **OPTIONS[case])


def assert_same(one: Any, other: Any) -> None:
    assert same(one.history, other.history)
    assert same(one.best_weights, other.best_weights)
    assert one.schedule == other.schedule
    assert one.best_loss == other.best_loss


@pytest.mark.parametrize("died", [5, 11, 12, 13, 37, 65])
def test_a_killed_run_resumes_bit_for_bit(died: int, tmp_path: Path) -> None:
    whole = uninterrupted()
    with pytest.raises(Outage):
        run(tmp_path, Dying(train_loader(), died))
    torch.rand(7)  # where the random streams are now must not matter
    assert_same(run(tmp_path, resume=True), whole)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_an_eager_run_may_go_on_compiled(tmp_path: Path) -> None:
    """Truth: the uninterrupted eager run, up to rounding."""
    with pytest.raises(Outage):
        run(tmp_path, Dying(train_loader(), 37))
    found, whole = run(tmp_path, resume=True, compile=True).history, uninterrupted().history
    for name, values in whole.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-3, err_msg=name)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sweep": dict(probe=30),
    "float32 tangents at every step": dict(epochs=3, tangents=None, estimator=None, every=3),
    "population": dict(epochs=3, population=3, exploit_every=10),
    "unrolled": dict(epochs=3, estimator=st.Unrolled(7, checkpoint=3)),
    "forward": dict(epochs=3, estimator=st.Forward(0.9, curvature="diagonal")),
    "implicit": dict(epochs=3, estimator=st.Implicit(through="update", warm=True)),
}


@pytest.mark.parametrize("case", [case for case in OPTIONS if case != "plain"])
def test_so_does_any_other_kind_of_run(case: str, tmp_path: Path) -> None:
    whole = uninterrupted(case)
    with pytest.raises(Outage):
        run(tmp_path, Dying(train_loader(), whole.steps - 8), **OPTIONS[case])
    assert_same(run(tmp_path, resume=True, **OPTIONS[case]), whole)


def test_workers_shuffle_alike_after_a_resume(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", train_loader(num_workers=1), epochs=3)
    with pytest.raises(Outage):
        run(tmp_path / "cut", Dying(train_loader(num_workers=1), 15), epochs=3)
    again = run(tmp_path / "cut", train_loader(num_workers=1), resume=True, epochs=3)
    assert_same(again, whole)


SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_resume import run
    run(Path(sys.argv[1]), resume=True)
"""


def test_a_process_that_is_killed_resumes_bit_for_bit(tmp_path: Path) -> None:
    """A real SIGKILL, which may fall into the writing of a checkpoint."""
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent)))
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "cut")])
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert (tmp_path / "cut" / "last.pt").exists()
    assert_same(run(tmp_path / "cut", resume=True), uninterrupted())


class Pressed:
    """Batches, and Ctrl-C while one of them is being trained on."""

    def __init__(self, at: int) -> None:
        self.batches, self.at = train_loader(), at

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.at -= 1
            if self.at == 0:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


def test_ctrl_c_ends_with_a_checkpoint_and_the_result_so_far(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    result = run(tmp_path, Pressed(30))
    assert result.ended == "interrupted"
    assert 25 <= result.steps < 35
    assert len(result.history["train_loss"]) == result.steps
    assert signal.getsignal(signal.SIGINT) is before
    assert_same(run(tmp_path, resume=True), uninterrupted())


def test_a_second_ctrl_c_inside_a_step_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step may be half written, so what is saved must be the run before it."""
    whole, train = uninterrupted(), Fused.train

    def pressed(fused: Fused, batch: Any, **kind: bool) -> torch.Tensor:
        if int(fused.run.step) == 30:
            fused.run.weights[0].zero_()
            raise KeyboardInterrupt
        return train(fused, batch, **kind)

    with monkeypatch.context() as patched:
        patched.setattr(Fused, "train", pressed)
        result = run(tmp_path)
    assert (result.ended, result.steps) == ("interrupted", 30)
    assert_same(run(tmp_path, resume=True), whole)


@pytest.mark.parametrize("at", [8, 20])
def test_two_at_once_before_the_first_step_end_the_call_without_a_checkpoint(
    tmp_path: Path, at: int
) -> None:
    """The weights are those of a step of the sweep then."""

    class Twice(Pressed):
        def __iter__(self) -> Iterator[Any]:
            for batch in self.batches:
                self.at -= 1
                if self.at == 0:
                    os.kill(os.getpid(), signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Twice(at), **OPTIONS["sweep"])
    assert not (tmp_path / "last.pt").exists()
    assert_same(run(tmp_path, resume=True, **OPTIONS["sweep"]), uninterrupted("sweep"))


WORKERS = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_resume import run, train_loader
    result = run(Path(sys.argv[1]), train_loader(num_workers=2), epochs=1000, probe=False)
    print(result.ended, len(result.history["train_loss"]) == result.steps)
"""


@pytest.mark.slow
def test_ctrl_c_that_reaches_the_workers_too_ends_cleanly(tmp_path: Path) -> None:
    """A terminal sends it to the whole group of processes."""
    script = textwrap.dedent(WORKERS.format(tests=str(Path(__file__).parent)))
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert told.split() == ["interrupted", "True"]


def test_an_interrupt_by_a_callback_is_one_as_well(tmp_path: Path) -> None:
    def pressed(progress: Any) -> None:
        raise KeyboardInterrupt

    result = tuner().fit(
        loader(), VAL, steps=50, evaluate_every=10, log_dir=tmp_path, callbacks=[pressed],
        progress=False,
    )  # fmt: skip
    assert (result.ended, result.steps) == ("interrupted", 10)
    assert (tmp_path / "last.pt").exists()


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the size of files makes the system refuse a write in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    held: list[bytes] = []

    def fill_up(progress: Any) -> None:
        if progress.step == 22:
            held.append((tmp_path / "last.pt").read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))

    torch.manual_seed(0)
    try:
        result = tuner().fit(
            loader(), VAL, steps=44, evaluate_every=11, checkpoint_every=5, log_dir=tmp_path,
            callbacks=[fill_up], progress=False, log_every=50,  # event files stay below the limit
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.steps == 44
    assert (tmp_path / "last.pt").read_bytes() == held[0]
    assert not list(tmp_path.glob("*.partial"))
    assert any("was not written" in r.message for r in caplog.records)
    again = tuner().fit(loader(), VAL, steps=44, log_dir=tmp_path, resume=True, progress=False)
    assert again.steps == 44


def test_a_finished_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    whole = run(tmp_path)
    assert_same(run(tmp_path, resume=True), whole)


def test_resuming_where_nothing_is_starts_anew(tmp_path: Path) -> None:
    assert_same(run(tmp_path / "new", resume=True), uninterrupted())


@pytest.mark.parametrize("population", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_finished_run_is_made_longer(
    population: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Truths: the run before, whose course stays; the average; the longer run's schedule."""
    options: dict[str, Any] = dict(population=population) if population > 1 else {}
    epochs = 6 if population == 1 else 3
    short = run(tmp_path, epochs=epochs, **options)
    longer = run(tmp_path, resume=True, epochs=2 * epochs, **options)
    assert longer.ended == "finished"
    assert longer.steps == 2 * short.steps == len(longer.history["train_loss"])
    before = len(short.history["train_loss"])
    assert same({"": longer.history["train_loss"][:before]}, {"": short.history["train_loss"]})
    assert longer.best_loss <= short.best_loss
    told = [
        r.getMessage() for r in caplog.records if "continues from its average" in r.getMessage()
    ]
    assert len(told) == 1
    assert f"of {short.steps} steps" in told[0]
    assert f"to step {longer.steps}" in told[0]
    rates = dict(map(tuple, longer.schedule.values["lr"]))
    for step, rate in short.schedule.values["lr"] if population == 1 else ():
        assert rates[step] == rate
    if population == 1 and not len(longer.history["rewinds"]):
        ended, begun = (longer.schedule.at(short.schedule.steps + i)["lr"] for i in (-1, 0))
        assert begun > 10 * ended  # annealed, and then anew
    assert_same(run(tmp_path, resume=True, epochs=2 * epochs, **options), longer)


def test_the_weights_of_a_finished_run_stay_the_best_ones(tmp_path: Path) -> None:
    """The end is chosen after the last checkpoint; what follows is better than that one only."""

    def fit(steps: int) -> st.TuningResult:
        x, y = points(200)
        batches = list(zip(x.split(20), y.split(20), strict=True))
        return tuner().fit(batches, VAL, steps=steps, evaluate_every=40, progress=False,
                           log_dir=tmp_path, resume=True)  # fmt: skip

    short, scores = fit(40), fit(50).history["score/loss"]
    assert short.best_loss < scores[1] < scores[0]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["loss"] == short.best_loss
    assert same(best["model"], short.best_weights)


@pytest.mark.slow
def test_a_run_made_longer_resumes_bit_for_bit(tmp_path: Path) -> None:
    run(tmp_path / "whole", epochs=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    whole = run(tmp_path / "whole", resume=True, epochs=6)
    with pytest.raises(Outage):
        run(tmp_path / "cut", Dying(train_loader(), 20), resume=True, epochs=6)
    assert_same(run(tmp_path / "cut", resume=True, epochs=6), whole)


def test_a_run_that_has_not_finished_keeps_its_length(tmp_path: Path) -> None:
    with pytest.raises(Outage):
        run(tmp_path, Dying(train_loader(), 30))
    with pytest.raises(ValueError, match="number of steps"):
        run(tmp_path, resume=True, epochs=12)


def test_resuming_says_where_and_names_a_changed_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Outage):
        run(tmp_path, Dying(train_loader(), 30))
    changed = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-4}
    result = run(tmp_path, resume=True, hparams=changed)
    told = [r.getMessage() for r in caplog.records]
    assert any(f"resumed at step 28 of {result.steps}" in t for t in told)
    (named,) = (t for t in told if "is ignored" in t)
    assert named.startswith("resume: lr=0.5 is ignored: the run started at 0.01 and continues")
    assert result.why.startswith("lr: given 0.01 →")


@pytest.mark.parametrize("seed", [1, 2])
def test_an_interrupted_run_resumes_to_the_weights_of_an_undisturbed_one(
    seed: int, tmp_path: Path
) -> None:
    """Also if the interrupted one ended with better weights than any evaluation had."""

    def fit(folder: str, interrupt: bool) -> st.TuningResult:
        torch.manual_seed(seed)
        x = torch.randn(120, 20)
        y = x[:, :1] + 2 * torch.randn(120, 1)
        train = list(zip(x[:60].split(10), y[:60].split(10), strict=True))
        val = list(zip(x[60:].split(20), y[60:].split(20), strict=True))
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)
        )

        def press(progress: Any) -> None:
            if interrupt and progress.step == 60:
                os.kill(os.getpid(), signal.SIGINT)

        made = st.Tuner(model, torch.nn.MSELoss(), hparams={"lr": 3e-3}, schedule="constant",
                        compile=False)  # fmt: skip
        return made.fit(
            train, val, steps=300, evaluate_every=20, log_dir=tmp_path / folder, resume=True,
            callbacks=[press], progress=False,
        )  # fmt: skip

    interrupted = fit("twice", interrupt=True)
    assert interrupted.ended == "interrupted"
    best = torch.load(tmp_path / "twice" / "best.pt", weights_only=True)
    assert best["loss"] == interrupted.best_loss
    assert same(best["model"], interrupted.best_weights)
    assert_same(fit("twice", interrupt=False), fit("once", interrupt=False))


def test_the_bar_of_a_resumed_run_counts_its_own_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Truth: the time that each step takes at least."""

    class Slow(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return super().forward(x)

    def fit(stop: int) -> None:
        x, y = torch.randn(64, 2), torch.randn(64, 1)
        st.Tuner(Slow(2, 1), torch.nn.MSELoss(), compile=False, probe=False).fit(
            [(x, y)], [(x, y)], steps=100, evaluate_every=20, log_dir=tmp_path, resume=True,
            callbacks=[lambda p: os.kill(os.getpid(), signal.SIGINT) if p.step == stop else None],
        )  # fmt: skip

    fit(80)
    capsys.readouterr()
    fit(0)
    rates = re.findall(r"100/100 .*?([\d.]+)step/s", capsys.readouterr().err)
    assert float(rates[-1]) < 100
