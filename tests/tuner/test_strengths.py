"""Strengths of layers in the tuner. Truths: the eager path, the plain run, laws."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Dying, Outage, loader, loss_of, points, same
from torch import nn
from torch.nn import functional as F

import selftune as st
from selftune.tuner._steps import Steps  # private: gradients come from inside a run

X, Y = points(16)


def net(p: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), st.nn.Dropout(p, name="hidden"),
        nn.Linear(16, 3),
    )  # fmt: skip


def tuner(model: nn.Module | None = None, loss_fn: Any = F.cross_entropy, **options: Any) -> Any:
    given = {"rule": st.rules.SGD(), "hparams": {"lr": 0.01, "momentum": 0.9}, "compile": False}
    return st.Tuner(model or net(), loss_fn, **given | options)


def fit(tuned: st.Tuner, steps: int = 60, **options: Any) -> st.TuningResult:
    torch.manual_seed(1)
    return tuned.fit(loader(), loader(60, seed=1), steps=steps, progress=False, **options)


ESTIMATORS = {
    "default": None,
    "Gauss-Newton": st.BestResponse("gauss-newton"),
    "all in the hypernetwork": st.BestResponse(update=True),
    "every other step": st.BestResponse(every=2),
    "Trace given": st.Trace(stride=5),
    "Unrolled": st.Unrolled(5),
    "Implicit": st.Implicit(through="update", together=3),
    "Forward": st.Forward(discount=0.9),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_strengths_are_tuned_beside_the_update(name: str) -> None:
    model = net()
    loss_fn = st.nn.LabelSmoothing(0.1)
    result = fit(tuner(model, loss_fn, estimator=ESTIMATORS[name]))
    assert result.hparams["hidden"] != pytest.approx(0.2)
    assert result.hparams["label_smoothing"] != pytest.approx(0.1)
    assert result.hparams["lr"] != 0.01
    assert len(result.history["hidden"]) == len(result.history["hyper_step"])
    assert loss_of(model, points(100, seed=2)) < 0.7 < loss_of(net(), points(100, seed=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "Gauss-Newton", "all in the hypernetwork", "Unrolled"])
def test_half_precision_ends_where_float32_does(name: str) -> None:
    """Autocast, and a bfloat16 model, tune to the strengths of the float32 run, from 0.2 and 0.1.

    The rate of dropout is led by noisy hypergradients, which rounding makes others: within 15 %,
    less than what any of them has changed.
    """

    def ends(kind: str) -> dict[str, float]:
        model = net().bfloat16() if kind == "bfloat16" else net()
        made = tuner(model, st.nn.LabelSmoothing(0.1), estimator=ESTIMATORS[name],
                     amp=kind == "autocast", hyper_rate=0.05)  # fmt: skip
        dtype = next(model.parameters()).dtype
        batches = ([(x.to(dtype), y) for x, y in b] for b in (loader(), loader(60, seed=1)))
        torch.manual_seed(1)
        result = made.fit(*batches, steps=60, progress=False)
        assert all(p.dtype == dtype for p in model.parameters())
        assert loss_of(model.float(), points(100, seed=2)) < 0.7
        return result.hparams

    exact = ends("float32")
    for kind in ("autocast", "bfloat16"):
        assert ends(kind) == pytest.approx(exact, rel=0.15), kind


def test_what_a_run_ends_with_is_in_the_layers() -> None:
    model, loss_fn = net(), st.nn.LabelSmoothing(0.1)
    result = fit(tuner(model, loss_fn), evaluate_every=60)
    seen = result.history["hidden"].tolist()
    assert float(model[3].strength) == pytest.approx(seen[-1], rel=1e-5) or any(
        float(model[3].strength) == pytest.approx(v, rel=1e-5) for v in seen
    )
    assert 0 < float(loss_fn.strength) < 1
    assert "3.strength" in result.best_weights


def test_strengths_that_are_not_tuned_stay_as_given() -> None:
    model = net()
    result = fit(tuner(model, hparams={"lr": 0.01, "hidden": 0.4}, tune=("lr",)))
    assert float(model[3].strength) == pytest.approx(0.4)
    assert "hidden" not in result.history


def test_at_fixed_strengths_a_run_is_that_of_plain_dropout_at_rate_zero() -> None:
    plain = nn.Sequential(*(m for m in net() if not isinstance(m, st.nn.Dropout)))
    options: dict[str, Any] = {"tune": ("lr", "momentum")}
    first = fit(tuner(net(0.0), **options))
    second = fit(tuner(plain, **options))
    losses = [run.history["train_loss"] for run in (first, second)]
    assert np.array_equal(*losses, equal_nan=True)  # NaN in the sweep
    assert np.isfinite(losses[0]).any()


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: Path, train: Any, **options: Any) -> st.TuningResult:
        torch.manual_seed(1)
        made = tuner(net(), st.nn.LabelSmoothing(0.05))
        return made.fit(train, loader(60, seed=1), steps=40, progress=False, log_dir=folder,
                        checkpoint_every=5, **options)  # fmt: skip

    whole = run(tmp_path / "whole", loader())
    with pytest.raises(Outage):
        run(tmp_path / "cut", Dying(loader(), 23))
    again = run(tmp_path / "cut", loader(), resume=True)
    assert same(again.best_weights, whole.best_weights)
    assert same(again.history, whole.history)


def test_the_length_of_outer_gradients_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they grow or shrink along a run, by a law of our own."""
    plain = fit(tuner(tune=("hidden",)))
    before, count = Steps.outer_gradient, iter(range(1000))

    def scaled(self: Steps, run: Any, batch: Any) -> Any:
        loss, grads, buffers = before(self, run, batch)
        factor = 10.0 ** (next(count) % 5)
        return loss, [factor * g for g in grads], buffers

    monkeypatch.setattr(Steps, "outer_gradient", scaled)
    found = fit(tuner(tune=("hidden",)))
    assert next(count) == len(plain.history["hyper_step"]) > 5
    assert found.history["hidden"] == pytest.approx(plain.history["hidden"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "Gauss-Newton"])
def test_compiled_steps_are_the_eager_ones(name: str, request: pytest.FixtureRequest) -> None:
    if name == "default":  # the other one is compiled to C++
        request.getfixturevalue("traced")
    results = []
    for compiled in (False, True):
        made = tuner(
            net().double(), estimator=ESTIMATORS[name], tune=("lr", "hidden"), compile=compiled,
            probe=False,
        )  # fmt: skip
        batches = [(x.double(), y) for x, y in loader()]
        torch.manual_seed(1)
        results.append(made.fit(batches, batches[:3], steps=30, progress=False))
    eager, fast = (r.history["train_loss"] for r in results)
    assert fast == pytest.approx(eager, rel=1e-6)


def test_augmentation_runs_in_training_alone() -> None:
    seen: list[tuple[bool, Any]] = []

    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, x.detach().clone()))
            return x

    model = nn.Sequential(Spy(), net())
    augment = st.nn.Augment(st.nn.Noise(0.5), st.nn.Mixup(classes=3, value=0.3))
    result = fit(tuner(model, augment=augment), steps=20)
    known = torch.cat([points(200)[0], points(60, seed=1)[0]])
    for training, x in seen:
        given = (x[:, None] == known).all(-1).any(1)
        assert not given.any() if training else given.all()
    assert {"noise", "mixup"} <= set(result.hparams)


class ByName(nn.Module):
    """The network on a dictionary; with labels it returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, inputs: Any, mask: Any = None, labels: Any = None) -> Any:
        output = self.net(inputs)
        return output if labels is None else {"loss": F.cross_entropy(output, labels)}


@pytest.mark.parametrize(
    ("loss_fn", "name"),
    [(F.cross_entropy, "default"), (None, "default"), (F.cross_entropy, "Gauss-Newton")],
)
def test_augmentation_of_dictionaries_is_that_of_tuples(loss_fn: Any, name: str) -> None:
    """The run on tuples, which was without augmentation for dictionaries."""
    torch.manual_seed(1)
    tuples = list(loader())
    augment = st.nn.Augment(st.nn.Noise(0.5), st.nn.Mixup(classes=3, value=0.3))
    named = [{"labels": y, "mask": y, "inputs": x} for x, y in tuples]
    runs = [
        tuner(model, loss, augment=copy.deepcopy(augment), estimator=ESTIMATORS[name])
        .fit(batches, batches[:2], steps=10, progress=False)
        for model, loss, batches in ((net(), F.cross_entropy, tuples), (ByName(), loss_fn, named))
    ]  # fmt: skip
    assert same(runs[0].history, runs[1].history)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"inputs": X, "mask": X, "labels": Y}, r"augment= .*\['inputs', 'mask'\].*tuples"),
        ({"mask": Y, "labels": Y}, r"augment= .*\['mask'\] these are \[\].*forward"),
        ({"inputs": X, "mask": Y}, "target=None.*leave Mixup out"),
    ],
)
def test_dictionaries_without_one_input_to_augment_are_refused(batch: Any, match: str) -> None:
    augment = st.nn.Augment(st.nn.Noise(), st.nn.Mixup(classes=3))
    with pytest.raises((TypeError, ValueError), match=match):
        tuner(ByName(), None, augment=augment).fit([batch] * 2, [batch], steps=2, progress=False)


def test_penalties_of_activations_are_part_of_the_training_loss() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.penalty = net(), st.nn.ActivationPenalty(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.penalty(self.net(x))

    large = fit(tuner(Penalised(), tune=("lr",), hparams={"lr": 0.01, "ar": 5.0}))
    small = fit(tuner(Penalised(), tune=("lr",), hparams={"lr": 0.01, "ar": 1e-6}))
    assert large.history["train_loss"][-1] > small.history["train_loss"][-1] + 0.1
    tuned = fit(tuner(Penalised()))
    assert tuned.hparams["ar"] != 0.5


class Sharing(nn.Module):
    """Calls one penalty for each element of a list."""

    def __init__(self, penalties: list[nn.Module]) -> None:
        super().__init__()
        self.net, self.penalties = net(), nn.ModuleList(penalties)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.penalties[0](self.net[0](x))
        return self.penalties[-1](self.net[1:](x))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("traced")
def test_a_shared_penalty_is_two_of_one_name(compiled: bool) -> None:
    results = []
    for count in (1, 2):
        model = Sharing([st.nn.ActivationPenalty(0.5) for _ in range(count)])
        made = tuner(model, probe=False, compile=compiled and count == 1)
        results.append(fit(made, steps=20))
    one, two = (r.history["train_loss"] for r in results)
    assert one == pytest.approx(two, rel=1e-4 if compiled else 1e-5)


@pytest.mark.parametrize("start", [0.0, 0.9])
def test_a_rate_may_start_anywhere(start: float) -> None:
    result = fit(tuner(net(start)))
    assert 0 < result.hparams["hidden"] < 0.95
    assert bool(torch.isfinite(torch.tensor(result.history["hidden"])).all())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hparams": {"hiden": 0.1}}, "hparams='hiden' is not one of"),
        ({"hparams": {"hidden": 0.99}}, r"hparams\['hidden'\]=0.99 must be 0 or between"),
        ({"tune": ("hiden",)}, "tune='hiden' is unknown"),
        ({"bounds": {"hidden": (0.5, 1.5)}}, "do not fit its scale"),
        ({"population": 2}, r"\['hidden'\] need BestResponse"),
        ({"model": nn.Sequential(net(), st.nn.Dropout(0.1, name="lr"))}, "names of hyperparam"),
        ({"model": nn.Sequential(net(), st.nn.Dropout(0.1, name="hidden"))}, "share the name"),
        (
            {"objective": lambda m, b: F.cross_entropy(m(b[0]), b[1]), "augment": st.nn.Noise()},
            "augment= changes batches for loss_fn=",
        ),
        (
            {"objective": lambda m, b: F.cross_entropy(m(b[0]), b[1]),
             "estimator": st.BestResponse("gauss-newton")},
            "needs the model's output and a loss of it",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tuner(**options)


@pytest.mark.parametrize("name", ["train_loss", "val_loss", "hyper_step"])
def test_layers_named_like_entries_of_the_history_are_refused(name: str) -> None:
    """They would replace the entry."""
    with pytest.raises(ValueError, match=f"'{name}'.*entries of result.history: give them other"):
        tuner(nn.Sequential(nn.Linear(2, 3), st.nn.Dropout(0.1, name=name)))


def test_a_population_trains_with_strengths_that_are_not_tuned() -> None:
    """The remedy that the error names."""
    options: dict[str, Any] = {"population": 3, "augment": st.nn.Noise(0.1), "probe": False}
    with pytest.raises(ValueError, match=r"\['hidden', 'noise'\] need .*leave them out of tune="):
        tuner(**options)
    assert fit(tuner(tune=("lr",), **options), steps=10).ended == "finished"


def test_a_schedule_replays_strengths_too() -> None:
    result = fit(tuner())
    model = net()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"schedule tunes 'hidden'.*pass model="):
        st.replay(plain, result.schedule)
    follow = st.replay(plain, result.schedule, model=model)
    for step in range(result.schedule.steps):
        assert float(model[3].strength) == pytest.approx(result.schedule.at(step)["hidden"])
        follow.step()


def test_losses_at_other_strengths_are_predicted() -> None:
    made = tuner(estimator=st.BestResponse(update=True))
    with pytest.raises(RuntimeError, match="call fit first"):
        made.predict(hidden=[0.1])
    result = fit(made, evaluate_every=60)
    now, rate = result.hparams["hidden"], result.hparams["lr"]
    here = result.history["score/loss"][-1]
    line = made.predict(hidden=[now, min(2 * now, 0.9)])
    assert line[0] == pytest.approx(here, rel=1e-5)
    assert line[1] != line[0]
    plane = made.predict(hidden=[now, 0.5], lr=[rate, 2 * rate, 3 * rate])
    assert plane.shape == (2, 3)
    assert plane[0, 0] == pytest.approx(here, rel=1e-5)
    for values, match in (
        ({"hiden": [0.1]}, "its sensitivity was not learned"),
        ({"hidden": [1.5]}, "values must be between"),
        ({}, "name one or two"),
    ):
        with pytest.raises(ValueError, match=match):
            made.predict(**values)


def test_a_predicted_slope_is_the_hypergradient() -> None:
    """Law: the prediction's derivative at the present value is Jᵀ times the outer gradient."""
    made = tuner(net().double(), probe=False)
    batches = [(x.double(), y) for x, y in loader()]
    torch.manual_seed(1)
    result = made.fit(batches, batches[:1], steps=40, evaluate_every=40, progress=False)
    training = made._ended  # private: a response cannot be asked for by itself
    steps, run, whole = training.steps, training.fused.run, training.fused.whole
    now, step = result.hparams["hidden"], 1e-5
    odds = torch.logit(torch.tensor(now, dtype=torch.float64))
    up, down = made.predict(hidden=[float(torch.sigmoid(odds + s)) for s in (step, -step)])
    held = [p.clone().requires_grad_() for p in steps.views(run.averages)]
    buffers = dict(zip(steps.buffers, run.average_buffers, strict=True))
    objective = steps.inner.eval()
    loss = torch.func.functional_call(
        objective, buffers | dict(zip(steps.params, held, strict=True)), (batches[0],)
    )
    grads = torch.autograd.grad(loss, held)
    shift = steps.views(whole.shift(run, torch.ones(1, dtype=torch.float64)))
    slope = sum(float((g * s).sum()) for g, s in zip(grads, shift, strict=True))
    assert (up - down) / (2 * step) == pytest.approx(slope, rel=1e-4)


def test_a_model_may_extend_its_own_run(tmp_path: Path) -> None:
    """Twin: a new model, as in another process; tuned strengths make no other model."""
    ends = []
    for again in (True, False):
        model, smoothing = net(), st.nn.LabelSmoothing(0.05)
        options = dict(progress=False, log_dir=tmp_path / str(again), resume=True)
        tuner(model, smoothing).fit(loader(), loader(60, seed=1), steps=30, **options)
        if not again:
            model, smoothing = net(), st.nn.LabelSmoothing(0.05)
        more = tuner(model, smoothing).fit(loader(), loader(60, seed=1), steps=40, **options)
        ends.append(more)
    assert same(ends[0].best_weights, ends[1].best_weights)
    assert same(ends[0].history, ends[1].history)
