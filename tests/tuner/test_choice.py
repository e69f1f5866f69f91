"""A tuner that chooses its rule. Truths: the uninterrupted run, and the optimizer's choice."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Dying, Outage, loader, net, points, same, tuner

import selftune as st

THREE = [st.rules.SGD(), st.rules.AdamW(), st.rules.Lion()]
VAL = [points(100, seed=1)]


def run(folder: Path | None, train: Any = None, resume: Any = False, **given: float) -> Any:
    torch.manual_seed(3)
    batches = loader(200, shuffle=True) if train is None else train
    rule = st.rules.Mixture(THREE, mix_until=20, **given)
    made = tuner(net(dropout=0.3), rule=rule, hparams={"lr": 1e-2})
    return made.fit(
        batches, VAL, epochs=12, log_dir=folder, resume=resume, evaluate_every=15,
        checkpoint_every=4, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_the_result_names_a_plain_optimizer(name: str) -> None:
    result = run(None, **{f"mix_{name.lower()}": 50.0})
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


@pytest.mark.parametrize("died", [15, 22, 25, 70])
@pytest.mark.parametrize("given", [{}, {"mix_sgd": 50.0}])
def test_a_killed_run_resumes_bit_for_bit(
    died: int, given: dict[str, float], tmp_path: Path
) -> None:
    """The choice is made after step 20 of 120; a checkpoint is written at every fourth."""
    whole = run(None, **given)
    with pytest.raises(Outage):
        run(tmp_path, Dying(loader(200, shuffle=True), died), **given)
    again = run(tmp_path, resume=True, **given)
    assert same(whole.history, again.history)
    assert same(whole.best_weights, again.best_weights)
    assert str(whole.rule) == str(again.rule)
    assert whole.schedule == again.schedule


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
    """The optimizer in a loop of one's own, on the same batches."""
    train, val = list(loader(200)), VAL
    torch.manual_seed(0)
    made = tuner(torch.nn.Linear(2, 3), rule=st.rules.Mixture(THREE), hparams={}, guard=False)
    result = made.fit(train, val, steps=120, progress=False)
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3)
    opt = st.Mixture(model, THREE, total_steps=120, guard=False)
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
    with pytest.raises(ValueError, match="population=3 has one rule for all members"):
        tuner(rule=st.rules.Mixture(THREE), hparams={}, population=3)


@pytest.mark.slow
def test_a_compiled_run_chooses_too() -> None:
    """Truth: the eager run, up to rounding."""
    results = []
    for compiled in (False, True):
        made = tuner(rule=st.rules.Mixture(THREE), hparams={}, compile=compiled)
        results.append(made.fit(list(loader()), VAL, steps=60, progress=False))
    assert results[0].rule.name == results[1].rule.name
    assert results[1].best_loss == pytest.approx(results[0].best_loss, rel=0.05)
