"""Runs without a validation set. Truths: torch's own loop, and the examples that passes see."""

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Outage, loader, loss_of, net, points, same, tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

import selftune as st

STEPS, JOIN = 60, 36


def numbered(count: int = 100, **options: Any) -> DataLoader[Any]:
    column = torch.arange(float(count)).unsqueeze(1)
    options = {"batch_size": 10, "shuffle": True, **options}
    return DataLoader(TensorDataset(column, column), **options)


def test_with_nothing_tuned_it_is_torchs_own_loop_on_a_part_and_then_on_all() -> None:
    model, twin = net(), net()
    still = tuner(
        model, tune=(), probe=False, guard=False, schedule="constant", every=1,
        average=st.Average(0.0), estimator=st.Trace(stride=1),
    )  # fmt: skip
    whole = loader()
    result = still.fit(whole, None, steps=STEPS, progress=False)
    generator = torch.Generator().manual_seed(0)  # the default seed
    part, _ = random_split(whole.dataset, [180, 20], generator)
    batches = [*DataLoader(part, batch_size=20)] * 4 + [*whole] * 3
    opt = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for x, y in batches[:STEPS]:
        opt.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        opt.step()
    assert result.joined == JOIN
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_held_out_examples_validate_first_and_are_trained_on_last() -> None:
    seen: list[tuple[bool, list[int]]] = []

    def objective(model: nn.Module, batch: Any) -> Tensor:
        seen.append((model.training, batch[0].flatten().int().tolist()))
        return (model(batch[0]) - batch[1]).square().mean() * 1e-6

    def joins(progress: st.tuner.Progress) -> None:
        if progress.joined and not ends:
            ends.append(len(seen))

    ends: list[int] = []
    run = st.Tuner(nn.Linear(1, 1), objective=objective, compile=False)
    result = run.fit(numbered(), None, steps=100, callbacks=[joins], progress=False)
    before, after = seen[: ends[0]], seen[ends[0] :]
    trained = {i for training, batch in before if training for i in batch}
    judged = {i for training, batch in before if not training for i in batch}
    assert result.joined == 60
    assert (len(trained), len(judged)) == (90, 10)
    assert not trained & judged
    assert all(training for training, _ in after)  # no loss is validated any more
    assert len(after) == 40
    for epoch in range(4):  # of all examples, each once
        passes = after[10 * epoch : 10 * (epoch + 1)]
        assert sorted(i for _, batch in passes for i in batch) == list(range(100))


def test_the_result_has_the_last_honest_loss_and_hyperparameters_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, whole, found = net(), loader(shuffle=True), []
    _, held = random_split(whole.dataset, [180, 20], torch.Generator().manual_seed(0))

    def look(progress: st.tuner.Progress) -> None:
        if progress.joined:
            found.append((progress.scores["loss"], loss_of(model, default_collate(list(held)))))

    with caplog.at_level(logging.INFO, "selftune"):
        result = tuner(model).fit(whole, None, epochs=20, callbacks=[look], progress=False)
    assert "step 120: the held-out examples join the training data" in caplog.text
    assert "at the join, step 120" in str(result)
    assert result.joined == max(result.history["score_step"]) == 120
    assert max(result.history["hyper_step"]) <= 120
    assert len(result.history["train_loss"]) == 200
    assert result.best_loss == result.history["score/loss"][-1] == found[0][0]
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-5)
    assert {score for score, _ in found} == {result.best_loss}
    assert found[-1][1] != result.best_loss  # trained on in between, so not an honest one
    assert same(result.best_weights, model.state_dict())


def test_a_run_that_over_fits_returns_to_its_last_good_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Truths: the loss on held-out examples by hand, and a plain run, which over-fits."""
    x = torch.randn(1200, 100, generator=torch.Generator().manual_seed(0))
    y = ((x[:, 0] > 0) ^ (x[:, 1].abs() < 0.32)).long()  # a quarter is wrong to a linear model
    data, rest = TensorDataset(x[:200], y[:200]), (x[200:], y[200:])
    torch.manual_seed(0)
    model, twin = nn.Linear(100, 2), nn.Linear(100, 2)
    over = tuner(model, hparams={"lr": 0.02, "momentum": 0.9}, tune=("momentum",), probe=False)
    batches = DataLoader(data, batch_size=20, shuffle=True)
    result = over.fit(batches, st.HoldOut(share=0.3), epochs=40, progress=False)
    _, held = random_split(data, [140, 60], torch.Generator().manual_seed(0))
    assert "val=None: the run overfitted before the held-out examples join" in caplog.text
    assert result.joined == 240
    assert result.best_loss == pytest.approx(loss_of(model, default_collate(list(held))), rel=1e-5)
    opt = torch.optim.SGD(twin.parameters(), lr=0.02, momentum=0.9)
    for inputs, targets in [batch for _ in range(40) for batch in batches]:
        opt.zero_grad()
        F.cross_entropy(twin(inputs), targets).backward()
        opt.step()
    assert loss_of(model, rest) < 0.7 * loss_of(twin, rest)


def test_statistics_of_batchnorm_follow_the_final_weights() -> None:
    """Truth: torch's ``update_bn`` at the final weights, over the training data."""
    torch.manual_seed(0)
    model, whole = net(), loader(400, batch_size=400)
    tuner(model).fit(whole, None, steps=200, progress=False)
    found = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    torch.optim.swa_utils.update_bn(whole, model)
    for name, exact in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(found[name], exact, rtol=0.02, atol=0.02)


class Failing(TensorDataset):
    """A data set that fails once, after some examples were read."""

    left = 10**9

    def __getitem__(self, index: Any) -> Any:
        Failing.left -= 1
        if Failing.left < 0:
            raise Outage
        return super().__getitem__(index)


def run(folder: Path, *, resume: bool = False, after: int = 10**9, **options: Any) -> Any:
    Failing.left = after
    torch.manual_seed(3)
    model = net(dropout=0.3)
    batches = DataLoader(Failing(*points(205)), batch_size=20, shuffle=True)
    val, steps = options.pop("val", None), options.pop("steps", STEPS)
    fit: dict[str, Any] = dict(evaluate_every=11, checkpoint_every=4, progress=False)
    return tuner(model, **options).fit(
        batches, val, steps=steps, log_dir=folder, resume=resume, **fit
    )


def assert_same(one: Any, other: Any) -> None:
    assert same(one.history, other.history)
    assert same(one.best_weights, other.best_weights)
    assert (one.schedule, one.best_loss, one.joined) == (
        other.schedule, other.best_loss, other.joined,
    )  # fmt: skip


EXAMPLES = (300, 900, 1075, 1200)


@pytest.mark.parametrize("population", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_before_or_after_the_join_resumes_bit_for_bit(
    population: int, tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", population=population)
    steps = []
    for after in EXAMPLES if population == 1 else EXAMPLES[1::2]:
        folder = tmp_path / str(after)
        with pytest.raises(Outage):
            run(folder, after=after, population=population)
        steps.append(torch.load(folder / "last.pt", weights_only=True)["numbers"][0])
        torch.rand(7)
        assert_same(run(folder, resume=True, population=population), whole)
    assert min(steps) < JOIN < max(steps)


def test_a_finished_run_is_made_longer_on_all_examples(tmp_path: Path) -> None:
    run(tmp_path)
    longer = run(tmp_path, resume=True, steps=2 * STEPS)
    assert longer.steps == 2 * STEPS
    assert longer.joined == JOIN
    assert max(longer.history["score_step"]) == JOIN


def test_it_is_no_other_runs_continuation(tmp_path: Path) -> None:
    with pytest.raises(Outage):
        run(tmp_path, after=900)
    with pytest.raises(ValueError, match="step of the join is 36 there and none here"):
        run(tmp_path, resume=True, val=0.1)


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "population": lambda: dict(population=3, exploit_every=10),
    "mixture": lambda: dict(rule=st.rules.Mixture([st.rules.SGD(), st.rules.AdamW()]), hparams={}),
    "unrolled": lambda: dict(estimator=st.Unrolled(7)),
    "best response": lambda: dict(estimator=st.BestResponse(update=True)),
    "no guard": lambda: dict(guard=False),
}


@pytest.mark.parametrize("case", list(OPTIONS))
def test_every_kind_of_run_trains_on_all(case: str) -> None:
    """Truth: points of other seeds, on which the loss must fall."""
    model = net()
    before = loss_of(model, points(200, seed=1))
    given = OPTIONS[case]()
    result = tuner(model, **given).fit(
        loader(shuffle=True), st.HoldOut(share=0.2, until=0.5), epochs=8, progress=False
    )
    assert result.joined == 40
    assert loss_of(model, points(200, seed=1)) < 0.7 * before


def test_patience_may_end_a_run_before_the_join() -> None:
    still = tuner(nn.Linear(2, 3), tune=(), hparams={"lr": 1e-12}, probe=False)
    result = still.fit(loader(), None, epochs=30, patience=2, progress=False)
    assert result.ended == "stopped"
    assert result.joined is None


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(*points(100), strict=True))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a list": (lambda: list(loader()), r"not train \(list\): pass such a DataLoader"),
    "no length": (
        lambda: DataLoader(Rows(), batch_size=20), "needs a dataset with a length: pass valid",
    ),
    "too few": (lambda: loader(4, batch_size=2), "of 4 examples leaves 0 for validation"),
    "an order of its own": (
        lambda: loader(sampler=WeightedRandomSampler(torch.ones(200), 200)),
        "cannot keep the order of sampler=WeightedRandomSampler",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_data_that_cannot_be_divided_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"val=None .*{message}"):
        tuner().fit(make(), None, steps=STEPS, progress=False)


def test_predictions_need_examples_that_are_held_out() -> None:
    model = nn.Sequential(st.nn.Dropout(0.1), net())
    run = tuner(model)
    run.fit(loader(), None, epochs=3, progress=False)
    with pytest.raises(RuntimeError, match="predict needs validation data, and val=None"):
        run.predict(dropout=[0.1])


@pytest.mark.parametrize("fit", [dict(epochs=40), dict(steps=200, evaluate_every=50)])
@pytest.mark.parametrize("val", [None, 0.1])
def test_callbacks_get_the_mean_training_loss_since_the_last_one(val: Any, fit: Any) -> None:
    """Truth: the losses in the history."""
    torch.manual_seed(1)
    x, seen = torch.randn(500, 8), []
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    result = st.Tuner(model, nn.MSELoss(), compile=False).fit(
        DataLoader(TensorDataset(x, x[:, :3].square()), 100, shuffle=True), val, progress=False,
        callbacks=[lambda p: seen.append((p.step, p.train_loss))], **fit,
    )  # fmt: skip
    ends = [0, *(step for step, _ in seen)]
    losses = result.history["train_loss"]
    means = [np.nanmean(losses[first:end]) for first, end in pairwise(ends)]
    assert [loss for _, loss in seen] == pytest.approx(means, nan_ok=True)
