"""Models and data that people have, where a loop of one's own is the truth."""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Batch, Outage, loader, net, points, same, tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import selftune as st

VAL = [points(100, seed=1)]
Pair = namedtuple("Pair", "points labels")


class FrozenNorm(nn.Module):
    """Keeps its BatchNorm in evaluation, as detection backbones do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(2), nn.Linear(2, 3)

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x))


class Remembering(nn.Module):
    """Keeps its last activation, and binds a buffer anew at each pass."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.net(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * self.seen.detach().mean(0)
        return self.seen


@pytest.mark.parametrize("rule", [st.rules.SGD(), st.rules.AdamW()], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_each_hyperparameter_can_be_tuned_alone(rule: st.rules.AbstractRule, name: str) -> None:
    run = tuner(rule=rule, tune=(name,), hparams={"lr": 0.01})
    result = run.fit(loader(), VAL, steps=60, progress=False)
    assert len(set(result.history[name])) > 3


def test_half_precision_models_train() -> None:
    x, y = points(100)
    model = nn.Linear(2, 3).bfloat16()
    result = tuner(model).fit([(x.bfloat16(), y)], [(x.bfloat16(), y)], steps=60, progress=False)
    assert result.best_loss < 0.6
    assert result.best_weights["weight"].dtype == torch.bfloat16


def test_activations_that_a_model_keeps_and_buffers_it_binds_anew() -> None:
    model = Remembering()
    model(points(10)[0])
    tuner(model).fit(loader(), VAL, steps=40, progress=False)
    seen = model.net(points(200)[0]).detach().mean(0)
    torch.testing.assert_close(model.mean, seen, atol=0.3, rtol=0)


def test_a_frozen_norm_stays_frozen() -> None:
    model = FrozenNorm()
    tuner(model).fit(loader(), VAL, steps=40, progress=False)
    assert int(model.norm.num_batches_tracked) == 0
    assert not bool(model.norm.running_mean.any())


def test_a_last_validation_batch_of_one_example_is_left_out_of_tuning() -> None:
    result = tuner().fit(loader(), loader(41, seed=1), steps=60, progress=False)
    assert result.steps == 60


def test_callbacks_may_put_the_model_into_evaluation() -> None:
    model, modes = net(), []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    tuner(model).fit(
        loader(), VAL, steps=40, evaluate_every=20, callbacks=[lambda p: model.eval() and None],
        progress=False,
    )  # fmt: skip
    assert modes.count(True) >= 40


def test_named_tuples_and_lists_of_any_length_reach_the_objective() -> None:
    def objective(model: nn.Module, batch: Any) -> Tensor:
        assert isinstance(batch["pair"], Pair)
        return F.cross_entropy(model(batch["pair"].points), batch["pair"].labels)

    batches = [
        {"pair": Pair(x, y), "names": ["a"] * len(y)}
        for x, y in loader(30)  # 20, then 10
    ]
    run = st.Tuner(net(), objective=objective, compile=False)
    assert run.fit(batches, batches, steps=40, progress=False).steps == 40


def test_numbers_may_be_numpys(tmp_path: Path) -> None:
    run = tuner(hparams={"lr": np.float64(0.01), "momentum": np.float32(0.9)})
    assert run.fit(loader(), VAL, epochs=4, log_dir=tmp_path, progress=False).steps == 40


def test_every_evaluation_of_a_generator_sees_the_same_batches() -> None:
    run = tuner(probe=False, tune=())
    val = iter([points(20, seed=s) for s in range(45)])
    result = run.fit(loader(), val, steps=100, evaluate_every=10, progress=False)
    assert len(result.history["score/loss"]) == 10


def test_persistent_workers_show_all_validation_batches() -> None:
    seen: set[int] = set()

    def objective(model: nn.Module, batch: Any) -> Tensor:
        if not model.training:
            seen.update(batch[2].tolist())
        return F.cross_entropy(model(batch[0]), batch[1])

    x, y = points(100, seed=1)
    val = DataLoader(TensorDataset(x, y, torch.arange(100)), 10, num_workers=1,
                     persistent_workers=True)  # fmt: skip
    batches = [(*b, b[1]) for b in loader()]
    st.Tuner(net(), objective=objective, compile=False, probe=False).fit(
        batches, val, steps=49, evaluate_every=10, progress=False
    )
    assert seen == set(range(100))


def own_generator() -> DataLoader[Any]:
    data = TensorDataset(*points(200))
    generator = torch.Generator().manual_seed(3)
    return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=generator),
                                                       20, drop_last=False))  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
def test_a_resumed_run_is_the_same_with_generators_of_the_loaders_and_frozen_weights(
    frozen: bool, tmp_path: Path
) -> None:
    def start(seed: int = 0) -> st.Tuner:
        model = net()
        if frozen:
            torch.manual_seed(seed)
            nn.init.normal_(model[0].weight)
            model[0].requires_grad_(False)
        return tuner(model)

    options: dict[str, Any] = dict(steps=60, evaluate_every=10, progress=False)
    val = dict(seed=1, shuffle=True, generator=torch.Generator().manual_seed(5))
    whole = start().fit(own_generator(), loader(**val), log_dir=tmp_path / "a", **options)
    val["generator"] = torch.Generator().manual_seed(5)

    def fail(progress: st.tuner.Progress) -> None:
        if progress.step == 30:
            raise Outage

    with pytest.raises(Outage):
        start().fit(
            own_generator(), loader(**val), log_dir=tmp_path / "b", callbacks=[fail], **options
        )
    val["generator"] = torch.Generator().manual_seed(5)
    again = start(seed=9).fit(
        own_generator(), loader(**val), log_dir=tmp_path / "b", resume=True, **options
    )
    if frozen:
        assert same(whole.best_weights, again.best_weights)
    else:
        assert same(whole.history, again.history)


def test_other_options_are_refused_on_resume_and_change_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(steps=40, evaluate_every=10, progress=False, log_dir=tmp_path)
    adam = dict(rule=st.rules.Adam(), hparams={"lr": 0.01})
    tuner(**adam).fit(loader(), VAL, **options)
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = tuner(model, rule=st.rules.Adam(), hparams={"lr": 0.01, "amsgrad": True})
    with pytest.raises(ValueError, match="fixed hyperparameters is"):
        other.fit(loader(), VAL, resume=True, **options)
    assert same(before, model.state_dict())


def test_a_run_that_was_stopped_stays_stopped(tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        steps=100, evaluate_every=10, checkpoint_every=1000, progress=False, log_dir=tmp_path
    )
    first = tuner().fit(loader(), VAL, callbacks=[lambda p: p.step == 30], **options)
    again = tuner().fit(loader(), VAL, resume=True, **options)
    assert first.ended == again.ended == "stopped"
    assert again.steps == 30
    assert same(first.best_weights, again.best_weights)


def broken(kind: str, every: int) -> st.TuningResult:
    """A run with losses that are finite, of which one in so many has no gradient.

    Args:
        kind: ``"training"`` or ``"validation"``.
        every: How many.
    """

    def objective(model: nn.Module, batch: Any) -> Tensor:
        x, y, bad = batch
        loss = F.cross_entropy(model(x), y)
        return loss + (loss - loss).sqrt() if bool(bad[0]) else loss

    def batches(mine: bool) -> list[Any]:
        first = 10  # so many are sound in any case
        return [
            (x, y, torch.full_like(y, mine and step >= first and step % every == 0))
            for step, (x, y) in enumerate(loader(1200))
        ]

    run = st.Tuner(
        net(),
        objective=objective,
        compile=False,
        probe=False,
        hparams={"lr": 0.01},
        every=1,
        hyper_rate=0.02,
    )
    result = run.fit(
        batches(kind == "training"), batches(kind == "validation"), steps=60, evaluate_every=60,
        progress=False,
    )  # fmt: skip
    assert all(bool(t.isfinite().all()) for t in result.best_weights.values())
    return result


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "validation"])
def test_what_has_no_gradient_is_left_out_and_three_in_a_row_bring_the_run_back(kind: str) -> None:
    """Law: a third of the gradients, or hypergradients, leads nowhere; three in a row do."""
    sound = broken(kind, every=3)
    assert len(sound.history["rewinds"]) == 0
    assert sound.history["lr"][-1] != sound.history["lr"][0]
    assert len(broken(kind, every=1).history["rewinds"]) > 0


CADENCES = [(60, 5), (300, 10), (660, 20)]


@pytest.mark.parametrize(("steps", "every"), CADENCES)
def test_hyperparameters_step_thirty_times_or_every_fifth_to_twentieth_step(
    steps: int, every: int
) -> None:
    """Closed form, of the optimizers too: a thirtieth of the run, from 5 to 20."""
    run = tuner(nn.Linear(2, 3), probe=False, guard=False)
    result = run.fit(loader(), VAL, steps=steps, evaluate_every=steps, progress=False)
    assert result.history["hyper_step"].tolist() == [0, *range(every, steps + 1, every)]


class WithHead(nn.Module):
    """An objective with weights of its own, as a projection head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(3, 3)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.head(model(batch[0])), batch[1])


@pytest.mark.parametrize("saved", [False, True])
def test_an_objective_with_weights_ends_with_its_best_ones_too(saved: bool, tmp_path: Path) -> None:
    """Truth: the loss computed anew; the run overfits, so that earlier weights are the best."""
    model, objective = net(), WithHead()
    run = tuner(model, loss_fn=None, objective=objective, guard=False, probe=False)
    val = [points(30, seed=5)]
    result = run.fit(
        [points(20)], val, steps=300, evaluate_every=10, progress=False,
        log_dir=tmp_path if saved else None,
    )  # fmt: skip
    assert np.argmin(result.history["score/loss"]) < 25
    model.eval()
    with torch.no_grad():
        assert float(objective(model, val[0])) == pytest.approx(result.best_loss, rel=1e-6)


class Hooked(nn.Module):
    """Keeps the activations of a layer, by a function that refers to the module, or a method."""

    def __init__(self, method: bool) -> None:
        super().__init__()
        self.body, self.kept = net(), {}
        hook = self.keep if method else lambda _, args, out: self.kept.update(x=out)
        self.body[0].register_forward_hook(hook)

    def keep(self, layer: nn.Module, args: Any, out: Tensor) -> None:
        self.kept["x"] = out

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + 0 * self.kept["x"].sum()


def test_functions_that_refer_to_the_model_itself_are_named() -> None:
    """Law: in validation they would read training weights."""
    model = net()

    def shrunk(out: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(out, target) + sum(p.abs().sum() for p in model.parameters())

    def norm(net: nn.Module, out: Tensor, target: Tensor) -> Tensor:
        return net[0].weight.norm()

    bound = partial(norm, model)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("loss_fn refers", dict(model=model, loss_fn=shrunk)),
        ("objective refers", dict(model=model, loss_fn=None,
                                  objective=lambda _, b: F.cross_entropy(model(b[0]), b[1]))),
        (r"metrics\['norm'\] refers", dict(model=model, metrics={"norm": bound})),
        ("a hook of body.0 refers", dict(model=Hooked(method=False))),
    ]  # fmt: skip
    for message, given in wrong:
        with pytest.raises(ValueError, match=message):
            tuner(**given).fit(loader(), VAL, steps=5, progress=False)
    result = tuner(Hooked(method=True)).fit(loader(), VAL, steps=40, progress=False)
    plain = tuner().fit(loader(), VAL, steps=40, progress=False)
    assert result.best_loss == pytest.approx(plain.best_loss)


def test_callbacks_see_the_training_loss_since_the_last_evaluation() -> None:
    seen: list[tuple[int, float]] = []
    result = tuner(probe=False).fit(
        loader(), VAL, steps=50, evaluate_every=20, progress=False,
        callbacks=[lambda p: seen.append((p.step, p.train_loss))],
    )  # fmt: skip
    losses = result.history["train_loss"]
    ends = [0, *(step for step, _ in seen)]
    assert ends == [0, 20, 40, 50]
    for (_, loss), (first, last) in zip(seen, pairwise(ends), strict=True):
        assert loss == pytest.approx(np.mean(losses[first:last]))


def _residual(net: nn.Module, x: Tensor) -> Tensor:
    """Of u' = cos x with u(0) = 0."""
    x = x.clone().requires_grad_()
    slope = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
    return (slope - x.cos()).square().mean() + net(torch.zeros(1, 1)).square().mean()


def test_losses_with_derivatives_by_inputs_are_evaluated() -> None:
    """Closed form: the solution is sin x."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
    batches = [torch.rand(64, 1) * 2 - 1 for _ in range(20)]
    tuner = st.Tuner(net, objective=_residual, rule=st.rules.Adam())
    result = tuner.fit(batches, [torch.rand(128, 1) * 2 - 1], epochs=15, progress=False)
    assert result.best_loss < 0.01
    x = torch.linspace(-1, 1, 9)[:, None]
    assert (net(x) - x.sin()).abs().max() < 0.05


class _Force(nn.Module):
    """The derivative of an energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_metrics_of_models_that_differentiate_may_convert_to_numpy() -> None:
    torch.manual_seed(0)
    batches = [(x, x.cos()) for x in (torch.rand(64, 1) * 2 - 1 for _ in range(10))]

    def error(output: Tensor, target: Tensor) -> float:
        return float(np.abs(output.numpy() - target.numpy()).mean())

    tuner = st.Tuner(_Force(), F.mse_loss, metrics={"error": error})
    result = tuner.fit(batches, batches[:2], epochs=10, progress=False)
    assert result.best_scores["error"] < 0.2


@dataclass
class _Output:
    values: Tensor


class _Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> _Output:
        return _Output(self.line(x))


def test_metrics_read_outputs_of_any_class_and_keep_their_precision() -> None:
    batches = [(x, x.cos()) for x in (torch.rand(64, 1) * 2 - 1 for _ in range(10))]
    metrics = {
        "error": lambda output, target: np.abs(output.values.numpy() - target.numpy()).mean(),
        "tenth": lambda *_: 0.1,
    }

    def loss_fn(output: _Output, target: Tensor) -> Tensor:
        return F.mse_loss(output.values, target)

    tuner = st.Tuner(_Wrapped(), loss_fn, metrics=metrics)
    result = tuner.fit(batches, batches[:1], epochs=2, progress=False)
    assert result.best_scores["tenth"] == 0.1
