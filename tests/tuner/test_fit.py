"""What fit takes and gives. Truths: torch's own optimizer, and evaluation by hand."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jobs import loader, loss_of, net, points, same, tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import selftune as st

VAL = [points(100, seed=1)]


def test_with_nothing_tuned_it_is_torchs_own_loop() -> None:
    model, twin = net(), net()
    still = tuner(
        model, tune=(), probe=False, guard=False, schedule="constant", every=1,
        average=st.Average(0.0), estimator=st.Trace(stride=1),
    )  # fmt: skip
    batches = list(loader())
    still.fit(batches, VAL, epochs=3, evaluate_every=30, progress=False)
    opt = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for x, y in batches * 3:
        opt.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        opt.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_model_ends_with_the_best_weights() -> None:
    model = net()
    before = loss_of(model, VAL[0])
    result = tuner(model).fit(loader(shuffle=True), VAL, epochs=20, progress=False)
    assert result.ended == "finished"
    assert result.steps == 200
    assert result.best_loss == pytest.approx(loss_of(model, VAL[0]), rel=1e-5)
    assert result.best_loss <= min(result.history["score/loss"]) * (1 + 1e-5)
    assert result.best_loss < 0.5 * before
    assert same(result.best_weights, model.state_dict())
    assert all(not t.requires_grad for t in result.best_weights.values())


def test_the_model_ends_where_validation_is_lowest_from_the_average_to_the_last_weights() -> None:
    """A weight that is on its way from 0 to 100, and validation data that wants another."""
    seen: list[float] = []  # the average, at the evaluation that ends a run

    def end(wanted: float) -> float:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        one = torch.ones(4, 1)
        climbing = tuner(
            model, loss_fn=F.mse_loss, tune=(), probe=False, guard=False, schedule="constant",
            hparams={"lr": 5e-4, "momentum": 0.0, "weight_decay": 0.0}, average=st.Average(0.9),
        )  # fmt: skip
        climbing.fit(
            [(one, 100 * one)] * 100, [(one, wanted * one)], epochs=1, progress=False,
            callbacks=[lambda progress: seen.append(float(model.weight.detach()))],
        )  # fmt: skip
        return float(model.weight.detach())

    last = end(1000.0)
    average = seen[-1]
    assert last == pytest.approx(100 * (1 - (1 - 1e-3) ** 100), rel=1e-4)
    assert average < last - 0.5
    for share in (0.1, 0.5, 0.9):
        expected = average + round(2 * share) / 2 * (last - average)
        assert end(average + share * (last - average)) == pytest.approx(expected, rel=1e-5)


def test_history_and_schedule_have_an_entry_for_all_that_happened() -> None:
    result = tuner(probe=8).fit(loader(), VAL, steps=100, evaluate_every=25, progress=False)
    history = result.history
    assert all(isinstance(v, np.ndarray) for v in history.values())
    assert len(history["train_loss"]) == 100
    assert np.isfinite(history["train_loss"]).sum() == 100 - history["hyper_step"][0]
    assert list(history["score_step"]) == [25, 50, 75, 100]
    tuned = ("lr", "momentum", "weight_decay")
    assert all(len(history[n]) == len(history["hyper_step"]) == len(history["val_loss"])
               for n in tuned)  # fmt: skip
    start = int(history["hyper_step"][0])
    assert result.schedule.steps == 100 - start
    assert set(result.schedule.values) == {"lr", "momentum", "weight_decay"}
    for step, peak in zip(history["hyper_step"][:-1], history["lr"], strict=False):
        acted = result.schedule.at(step - start)["lr"]
        assert acted == pytest.approx(peak * (1 - step / 100), rel=0.01)
    assert result.hparams["lr"] == history["lr"][-1]


class Named(nn.Module):
    """Takes keywords and returns its loss, as many pretrained models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        logits = self.net(inputs)
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


def named(count: int = 100) -> list[dict[str, Tensor]]:
    return [{"inputs": x, "labels": y} for x, y in loader(count)]


def once() -> Iterator[Any]:
    yield from list(loader()) * 5


FORMS: dict[str, Any] = {
    "loader": (lambda: tuner(), lambda: loader(shuffle=True), VAL),
    "list": (lambda: tuner(), lambda: list(loader()), VAL),
    "arrays": (lambda: tuner(), lambda: [(x.numpy(), y.numpy()) for x, y in loader()], VAL),
    "generator": (lambda: tuner(), once, VAL),
    "short last batch": (lambda: tuner(), lambda: loader(205), VAL),
    "dictionaries, loss from the model": (
        lambda: st.Tuner(Named(), compile=False), named, named(40),
    ),
    "dictionaries": (
        lambda: st.Tuner(Keyword(), F.cross_entropy, compile=False), named, named(40),
    ),
    "objective": (
        lambda: st.Tuner(
            net(), objective=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            compile=False,
        ),
        loader, VAL,
    ),
    "autocast": (lambda: tuner(amp=True), loader, VAL),
    "penalty": (lambda: tuner(penalty=st.penalties.Elastic(1e-4)), loader, VAL),
    "l1": (lambda: st.Tuner(net(), F.cross_entropy, hparams={"l1": 1e-5}, compile=False),
           loader, VAL),
}  # fmt: skip


@pytest.mark.parametrize("form", list(FORMS))
def test_it_takes_what_people_have(form: str) -> None:
    make, train, val = FORMS[form]
    result = make().fit(train(), val, steps=45, progress=False)
    assert result.steps == 45
    assert np.isfinite(result.history["train_loss"][-20:]).all()
    assert result.history["score/loss"][-1] < 1.1


def test_a_share_of_the_training_data_is_set_aside() -> None:
    data = TensorDataset(torch.arange(100.0).unsqueeze(1), torch.arange(100.0).unsqueeze(1))
    seen: dict[bool, set[float]] = {True: set(), False: set()}

    def objective(model: nn.Module, batch: Any) -> Tensor:
        seen[model.training].update(batch[0].flatten().tolist())
        return (model(batch[0]) - batch[1]).square().mean() * 1e-6

    run = st.Tuner(nn.Linear(1, 1), objective=objective, compile=False)
    run.fit(DataLoader(data, batch_size=10, shuffle=True), val=0.2, epochs=2, progress=False)
    assert len(seen[True]) == 80
    assert len(seen[False]) == 20
    assert not seen[True] & seen[False]


def test_epochs_are_those_of_the_part_that_is_trained_on() -> None:
    result = tuner().fit(loader(), 0.2, epochs=3, progress=False)
    assert result.steps == 3 * 8


def test_a_run_starts_from_the_values_it_is_given(caplog: pytest.LogCaptureFixture) -> None:
    """β₂, which would follow from the length of the run."""
    run = tuner(rule=st.rules.AdamW(), hparams={}, tune=("lr", "beta2"), probe=False)
    assert run.start_from({"beta2": 0.95, "weight_decay": 0.1}) == ["beta2"]
    result = run.fit(loader(), VAL, steps=20, progress=False)
    assert "beta2: given 0.95" in result.why


@pytest.mark.slow
def test_explanations_do_not_depend_on_the_log() -> None:
    found = [
        tuner(rule=st.rules.AdamW(), hparams={"weight_decay": 1e-6}, probe=False)
        .fit(loader(), VAL, steps=200, progress=False, recorder=recorder, log_every=every)
        .why
        for recorder, every in (
            (None, None),
            (st.monitor.InMemory(), 1),
            (st.monitor.InMemory(), 150),
        )
    ]
    assert "given 1e-06 → 0.1, its floor → " in found[0]
    assert found[1:] == found[:1] * 2


def test_metrics_are_means_over_the_validation_set() -> None:
    def accuracy(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).float().mean()

    model, seen = net(), []
    x, y = points(90, seed=1)

    def look(progress: st.tuner.Progress) -> None:
        seen.append(float(accuracy(model.eval()(x), y)))

    run = tuner(model, metrics={"accuracy": accuracy})
    result = run.fit(
        loader(), loader(90, seed=1, batch_size=40), epochs=3, progress=False, callbacks=[look]
    )
    assert len(seen) >= 3
    assert result.history["score/accuracy"] == pytest.approx(seen, abs=1e-6)


def test_callbacks_see_the_averaged_weights_and_can_end_the_run() -> None:
    model, seen = net(), []

    def look(progress: st.tuner.Progress) -> bool:
        seen.append((progress.step, progress.scores["loss"], loss_of(model, VAL[0])))
        assert progress.total == 100
        assert set(progress.hparams) == {"lr", "decay", "momentum", "weight_decay"}
        model.train()
        return progress.step == 50

    run = tuner(model)
    result = run.fit(loader(), VAL, steps=100, evaluate_every=25, callbacks=[look], progress=False)
    assert result.ended == "stopped"
    assert [step for step, _, _ in seen] == [25, 50]
    for _, told, found in seen:
        assert told == pytest.approx(found, rel=1e-5)


def test_patience_ends_a_run_that_gets_no_better() -> None:
    x, y = points(100, seed=1)
    shuffled = y[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    result = tuner(probe=False, guard=False).fit(
        loader(), [(x, shuffled)], epochs=40, patience=2, progress=False
    )
    assert result.ended == "stopped"
    assert len(result.history["score/loss"]) == np.argmin(result.history["score/loss"]) + 3


def test_a_folder_holds_the_log_and_both_checkpoints(tmp_path: Path) -> None:
    model = net()
    result = tuner(model).fit(loader(), VAL, epochs=10, log_dir=tmp_path, progress=False)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    fresh = net()
    fresh.load_state_dict(best["model"])
    assert loss_of(fresh, VAL[0]) == pytest.approx(result.best_loss, rel=1e-5)
    assert (tmp_path / "last.pt").exists()
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"Loss/train", "Loss/val", "hyper/lr", "hyper/momentum", "Loss/final"} <= tags
    steps = [e.step for e in events.Scalars("hyper/lr")]
    assert steps == sorted(set(steps))
    assert steps[-1] <= 100


def test_the_progress_bar_tells_losses_and_hyperparameters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuner().fit(loader(), VAL, steps=60)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("loss=", "val=", "lr=", "momentum=", "60/60"))


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    model = net().eval()
    tuner(model).fit(loader(), VAL, steps=10, progress=False)
    assert not model.training


def test_a_short_run_is_not_compiled_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "selftune"):
        tuner(compile="auto").fit(loader(), VAL, steps=60, progress=False)
    assert any("not compiled" in r.message for r in caplog.records)


class Waiting:
    """Batches that are waited for, as steps are on a machine that is busy with other things."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches:
            time.sleep(0.03)
            yield batch


def test_time_that_others_take_is_not_saved_by_compiling(caplog: pytest.LogCaptureFixture) -> None:
    """Closed form: in wall time 4,000 steps of 30 ms would save 48 s, in process time a few."""
    with caplog.at_level("INFO", "selftune"):
        tuner(compile="auto", probe=False).fit(
            Waiting(loader()), VAL, steps=4_000, evaluate_every=25, progress=False,
            callbacks=[lambda progress: True],
        )  # fmt: skip
    assert any("not compiled" in r.message for r in caplog.records)


class Temperature(nn.Module):
    """A float64 buffer without a dimension, which keeps a run from being compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net().double()
        self.register_buffer("log_scale", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double()) * self.log_scale.exp()


def test_what_cannot_be_compiled_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "selftune"):
        tuner(Temperature(), compile=True).fit(loader(), VAL, steps=60, progress=False)
    assert sum("not compiled" in r.message for r in caplog.records) == 1


@pytest.mark.slow
def test_a_compiled_run_agrees_with_an_eager_one_to_rounding() -> None:
    found = []
    for compiled in (False, True):
        run = tuner(net().double(), compile=compiled, probe=False, tangents=None)
        batches = [(x.double(), y) for x, y in loader(205)]
        val = [(VAL[0][0].double(), VAL[0][1])]
        found.append(run.fit(batches, val, epochs=6, progress=False).history)
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-5, err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_it_trains_on_a_gpu(compiled: bool, amp: bool) -> None:
    model = net()
    result = tuner(model, device="cuda", compile=compiled, amp=amp).fit(
        loader(205, shuffle=True, pin_memory=True), VAL, epochs=20, progress=False
    )
    assert next(model.parameters()).is_cuda
    assert result.best_loss < 0.6
    assert np.isfinite(result.history["train_loss"][-50:]).all()
