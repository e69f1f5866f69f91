"""A tuner that chooses its rule. Truths: the uninterrupted run, and the optimizer's choice."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Dying, Outage, loader, net, points, same, tuner

import selftune as st
from selftune.control import SweepSettings

THREE = [st.rules.SGD(), st.rules.AdamW(), st.rules.Lion()]
VAL = [points(100, seed=1)]


def run(folder: Path | None, train: Any = None, resume: Any = False, **given: float) -> Any:
    torch.manual_seed(3)
    batches = loader(200, shuffle=True) if train is None else train
    rule = st.rules.Mixture(THREE, mix_until=20, **given)
    made = tuner(net(dropout=0.3), rule=rule, hparams={"lr": 1e-2})
    return made.fit(
        batches, VAL, epochs=6, log_dir=folder, resume=resume, evaluate_every=15,
        checkpoint_every=4, progress=False,
    )  # fmt: skip


@cache
def uninterrupted(**given: float) -> Any:
    return run(None, **given)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_the_result_names_a_plain_optimizer(name: str) -> None:
    result = uninterrupted(**{f"mix_{name.lower()}": 50.0})
    assert result.rule.name == name
    made = result.rule.make([torch.nn.Parameter(torch.ones(1))])
    assert made.param_groups[0]["lr"] == result.hparams["lr"]
    assert result.schedule.rule == name
    st.replay(made, result.schedule)  # knows all of its hyperparameters


def test_another_rule_is_named_as_well() -> None:
    result = tuner().fit(loader(), VAL, steps=20, progress=False)
    assert result.rule.name == "SGD"
    assert result.rule.settings["momentum"] == result.hparams["momentum"]


def test_a_run_that_ends_before_the_choice_names_none() -> None:
    made = tuner(rule=st.rules.Mixture(THREE, mix_until=500), hparams={})
    assert made.fit(loader(), VAL, steps=30, progress=False).rule is None


@pytest.mark.parametrize("bad", [20, 21])
def test_a_bad_batch_at_the_choice_postpones_it(bad: int) -> None:
    """The choice is due at step 21: of its own gradient, or of the next that is finite."""
    batches = list(loader(200)) * 6
    batches[bad - 1] = (batches[bad - 1][0] * torch.nan, batches[bad - 1][1])
    torch.manual_seed(3)
    rule = st.rules.Mixture(THREE, mix_until=20, mix_sgd=50.0)
    made = tuner(rule=rule, hparams={"lr": 1e-2}, probe=False)
    result = made.fit(batches, VAL, steps=60, progress=False)
    assert result.rule.name == "SGD"
    assert result.hparams["lr"] > 0
    assert math.isfinite(result.best_loss)
    finite = torch.tensor(result.history["train_loss"]).isfinite()
    assert (~finite).nonzero().flatten().tolist() == [bad - 1]  # no other step is lost


@pytest.mark.parametrize("died", [15, 22, 25, 45])
@pytest.mark.parametrize("given", [{}, {"mix_sgd": 50.0}])
def test_a_killed_run_resumes_bit_for_bit(
    died: int, given: dict[str, float], tmp_path: Path
) -> None:
    """The choice is made after step 20 of 60; a checkpoint is written at every fourth."""
    whole = uninterrupted(**given)
    cut_off(tmp_path, died, **given)
    again = run(tmp_path, resume=True, **given)
    assert same(whole.history, again.history)
    assert same(whole.best_weights, again.best_weights)
    assert str(whole.rule) == str(again.rule)
    assert whole.schedule == again.schedule


def cut_off(folder: Path, died: int = 25, **given: float) -> None:
    with pytest.raises(Outage):
        run(folder, Dying(loader(200, shuffle=True), died), **given)


@pytest.mark.parametrize(
    ("members", "until", "words"),
    [
        (THREE[:2], 20, "members of the rule is sgd, adamw, lion there and sgd, adamw here"),
        (THREE[1:], 20, "members of the rule is sgd, adamw, lion there and adamw, lion here"),
        (THREE, 30, "mix_until is 20 there and 30 here"),
    ],
)
def test_another_mixture_is_refused_by_name(
    members: list[Any], until: int, words: str, tmp_path: Path
) -> None:
    for rule, error in (
        (st.rules.Mixture(THREE, mix_until=20), Outage),
        (st.rules.Mixture(members, mix_until=until), ValueError),
    ):
        made = tuner(rule=rule, hparams={"lr": 1e-2}, tune=("lr",), probe=False)
        batches = Dying(loader(200), 25) if error is Outage else loader(200)
        with pytest.raises(error, match=words if error is ValueError else None):
            made.fit(
                batches, VAL, steps=60, log_dir=tmp_path, resume=error is ValueError,
                checkpoint_every=4, progress=False,
            )  # fmt: skip


def test_a_refused_checkpoint_changes_nothing(tmp_path: Path) -> None:
    """One of a chosen rule that lacks a tensor. Truth: a tuner that never saw it."""
    cut_off(tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    state["leaves"].pop()
    torch.save(state, tmp_path / "last.pt")
    results = []
    for refused in (True, False):
        torch.manual_seed(3)
        rule = st.rules.Mixture(THREE, mix_until=20)
        made = tuner(net(dropout=0.3), rule=rule, hparams={"lr": 1e-2})
        batches = loader(200, shuffle=True)
        if refused:
            with pytest.raises(ValueError, match="tensors do not match this run's"):
                made.fit(batches, VAL, epochs=6, log_dir=tmp_path, resume=True, progress=False)
        torch.manual_seed(4)
        results.append(made.fit(batches, VAL, epochs=6, progress=False))
    assert same(results[0].history, results[1].history)
    assert str(results[0].rule) == str(results[1].rule)


def test_a_finished_run_is_extended_with_its_rule(tmp_path: Path) -> None:
    """Although a quarter of the longer run is later than the choice was."""
    results = []
    for steps in (40, 80):
        made = tuner(rule=st.rules.Mixture(THREE), hparams={"lr": 1e-2})
        results.append(
            made.fit(loader(), VAL, steps=steps, log_dir=tmp_path, resume=steps > 40,
                     progress=False)
        )  # fmt: skip
    assert results[0].rule.name == results[1].rule.name
    assert len(results[1].history["train_loss"]) == 80


def test_the_choice_is_at_a_quarter_also_of_a_fixed_rate() -> None:
    made = tuner(rule=st.rules.Mixture(THREE), hparams={"lr": 1e-2}, tune=("weight_decay",))
    assert made.fit(loader(), VAL, steps=40, progress=False).rule is not None


def test_tensors_apart_take_the_steps_of_one_vector() -> None:
    """What is compiled keeps every tensor for itself; lengths are of all of them together."""
    found = {}
    for joined in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        if not joined:  # parameters of two dtypes are not joined
            model[2].double()
            model.insert(2, Cast())
        rule = st.rules.Mixture(THREE, mix_until=500)
        made = tuner(model, rule=rule, hparams={}, tune=(), guard=False)
        result = made.fit(loader(60), VAL, steps=12, progress=False)
        found[joined] = result.history["train_loss"]
    torch.testing.assert_close(
        torch.as_tensor(found[True]), torch.as_tensor(found[False]), rtol=1e-4, atol=1e-5
    )


class Cast(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def test_both_faces_choose_alike() -> None:
    """The optimizer in a loop, on the same batches, at a rate at which rounding does not grow."""
    lower = SweepSettings(margin=20.0)
    train, val = list(loader(200)), VAL
    torch.manual_seed(0)
    made = tuner(
        torch.nn.Linear(2, 3), rule=st.rules.Mixture(THREE), hparams={}, guard=False, probe=lower
    )
    result = made.fit(train, val, steps=120, progress=False)
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3)
    opt = st.Mixture(model, THREE, total_steps=120, guard=False, probe=lower)
    loss = torch.nn.functional.cross_entropy
    for step in range(120):
        x, y = train[step % len(train)]
        opt.zero_grad()
        loss(model(x), y).backward()
        opt.step()
        opt.hyper_step(lambda: loss(model(val[0][0]), val[0][1]))
    assert opt.rule is not None
    assert opt.rule.name == result.rule.name
    assert opt.rule.settings["lr"] == pytest.approx(result.rule.settings["lr"], rel=1e-3)


def test_a_population_is_refused() -> None:
    with pytest.raises(ValueError, match="population=3 needs one rule for all members"):
        tuner(rule=st.rules.Mixture(THREE), hparams={}, population=3)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_a_compiled_run_chooses_too() -> None:
    """Truth: the eager run, up to rounding."""
    results = []
    for compiled in (False, True):
        made = tuner(rule=st.rules.Mixture(THREE), hparams={}, compile=compiled)
        results.append(made.fit(list(loader()), VAL, steps=60, progress=False))
    assert results[0].rule.name == results[1].rule.name
    assert results[1].best_loss == pytest.approx(results[0].best_loss, rel=0.05)
