"""Choices among modules. Truths: sums by hand, finite differences, the branch of the data."""

from functools import partial
from typing import Any

import pytest
import torch
from sine import job, loss, wide_job
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.structure import Choice, Chooser, prune


def convolutions() -> Choice:
    return Choice([nn.Conv2d(1, 2, k, padding=k // 2) for k in (3, 5, 7)])


def test_the_sum_by_hand() -> None:
    """Truth: Σ softmax(s)_k branch_k(x)."""
    torch.manual_seed(0)
    choice, x = convolutions(), torch.randn(2, 1, 8, 8)
    choice.scores.copy_(torch.tensor([1.0, 0.0, -1.0]))
    weights = torch.tensor([1.0, 0.0, -1.0]).exp()
    want = sum(w * b(x) for w, b in zip(weights / weights.sum(), choice.branches, strict=True))
    torch.testing.assert_close(choice(x), want)
    assert [n for n, _ in choice.named_parameters() if "scores" in n] == []


def test_different_shapes_are_named() -> None:
    choice = Choice([nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 5)])
    with pytest.raises(ValueError, match=r"shapes \(1, 2, 6, 6\), \(1, 2, 4, 4\)"):
        choice(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"len\(branches\)=1 must be at least 2"):
        Choice([nn.ReLU()])


def test_the_first_step_goes_down_the_validation_loss() -> None:
    """Truth: signs of finite differences of the validation loss, which Adam's first step has."""
    torch.manual_seed(0)
    model = nn.Sequential(Choice([nn.ReLU(), nn.Tanh(), nn.Identity()]), nn.Linear(4, 1)).double()
    x, y = torch.randn(32, 4).double(), torch.randn(32, 1).double()

    def loss() -> Tensor:
        return F.mse_loss(model(x), y)

    slopes = []
    with torch.no_grad():
        for k in range(3):
            model[0].scores[k] = 1e-5
            high = float(loss())
            model[0].scores[k] = -1e-5
            slopes.append(high - float(loss()))
            model[0].scores[k] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    chooser = Chooser(model, total_steps=100, every=10, rate=0.3)
    assert [chooser.step(loss) for _ in range(10)] == [False] * 9 + [True]
    want = [-0.3 if s > 0 else 0.3 for s in slopes]
    torch.testing.assert_close(model[0].scores, torch.tensor(want).double(), rtol=1e-4, atol=0)
    for p, held in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, held)
        assert p.grad is None


def test_the_branch_that_made_the_data_is_chosen() -> None:
    """Convergence, the loss before and after, and a smaller plain model."""
    model, x, y = job()
    opt = st.AdamW(model, lr=1e-2, total_steps=300)
    rows: dict[str, Any] = {}
    chooser = Chooser(model, 300, recorder=lambda values, step: rows.update(values))

    def closure() -> Tensor:
        return F.mse_loss(model(x[300:]), y[300:])

    for step in range(300):
        at = slice(step % 12 * 25, step % 12 * 25 + 25)
        opt.zero_grad()
        F.mse_loss(model(x[at]), y[at]).backward()
        opt.step()
        opt.hyper_step(closure)
        chooser.step(closure)
    assert model[1].weights().tolist() == [0.0, 1.0, 0.0]
    assert rows["structure/choice/1/1"] == 1.0

    def loss(m: nn.Module) -> Tensor:
        return F.mse_loss(m(x[300:]), y[300:]).detach()

    with opt.averaged():
        before = float(loss(model))
        pruned = prune(model, x[:1], loss=loss, tolerance=1e-6)
    assert type(pruned[1]).__name__ == "Sine"
    assert float(loss(pruned)) == pytest.approx(before, rel=1e-5)


@pytest.mark.slow
def test_units_of_other_branches_are_closed_and_not_dead(caplog: pytest.LogCaptureFixture) -> None:
    """Law: three of four branches lose their gradients at a raised rate, without a rewind."""
    model, x, y = wide_job()
    opt, chooser = st.AdamW(model, lr=1e-4, total_steps=600), Chooser(model, 600)
    validation = partial(loss, model, x[300:], y[300:])
    made = []
    for step in range(600):
        at = slice(step * 25 % 300, step * 25 % 300 + 25)
        opt.zero_grad()
        loss(model, x[at], y[at]).backward()
        opt.step()
        opt.hyper_step(validation)
        if chooser.step(validation) and chooser.made:
            opt.sync(weights=False)
            made.append(step)
    assert made == [479]  # 80 % of the run, once
    assert opt.hparams["lr"] > 1e-3
    assert "last good weights" not in caplog.text


def test_a_loss_that_rises_is_named() -> None:
    """Truth: with equal weights one branch is another function."""
    model, x, _ = job()
    with pytest.raises(ValueError, match="loss=None: '1' become one branch each"):
        prune(model, x[:1])
    with pytest.raises(RuntimeError, match=r"above tolerance=0\.0"):
        prune(model, x[:1], loss=lambda m: (m(x) - model(x)).square().mean(), tolerance=0.0)


def test_bad_choosers_are_named() -> None:
    model, x, _ = job()
    with pytest.raises(ValueError, match="no choices"):
        Chooser(nn.Linear(1, 1), 10)
    with pytest.raises(ValueError, match="total_steps=0"):
        Chooser(model, 0)
    with pytest.raises(ValueError, match="every=0"):
        Chooser(model, 10, every=0)
    with pytest.raises(ValueError, match="total_steps=None"):
        Chooser(model).step(lambda: model(x).mean())
    other = job()[0]
    with pytest.raises(ValueError, match="does not depend on the choices '1'"):
        Chooser(model, 1, every=1).step(lambda: other(x).mean())


def test_choosers_go_on_from_a_saved_state() -> None:
    """Truth: the run that was not interrupted."""
    ends = []
    for cut in (False, True):
        model, x, y = job()
        chooser = Chooser(model, 40, every=2)
        for step in range(40):
            if cut and step == 21:
                saved, weights = chooser.state_dict(), model.state_dict()
                model = job()[0]
                model.load_state_dict(weights)
                chooser = Chooser(model, 40, every=2)
                chooser.load_state_dict(saved)
            chooser.step(partial(loss, model, x, y))
        ends.append(model[1].scores.clone())
    assert torch.equal(ends[0], ends[1])


def scaled_loss(model: nn.Module, x: Tensor, y: Tensor, factor: float) -> Tensor:
    return factor * loss(model, x, y)


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    """Truth: the run without that step of the scores; the choice is made in the end."""
    ends = []
    for bad in (False, True):
        model, x, y = job()
        chooser = Chooser(model, 60, every=2)
        for step in range(1, 61):
            if step == 20 and not bad:
                state = chooser.state_dict()["adam"]
                held = [v.clone() for v in state["state"][0].values()]
                scores = model[1].scores.clone()
            wrong = float("nan") if bad and step in (20, 48) else 1.0
            moved = chooser.step(partial(scaled_loss, model, x, y, wrong))
            if bad and step == 20:
                state = chooser.state_dict()["adam"]
                torch.testing.assert_close(list(state["state"][0].values()), held)
                torch.testing.assert_close(model[1].scores, scores)
                assert not moved
        ends.append(int(model[1].weights().argmax()))
        assert float(model[1].weights().max()) == 1.0
        assert torch.isfinite(model[1].scores).all()
    assert ends[0] == ends[1]


@pytest.mark.parametrize(("total", "every", "most"), [(60, 40, 12), (10, 7, 2), (3, 2, 1)])
def test_intervals_without_a_choice_are_named(total: int, every: int, most: int) -> None:
    """Truth: multiples of the interval in the last fifth of the run, counted."""
    model = job()[0]
    with pytest.raises(ValueError, match=rf"every={every}\b.* pass at most {most}"):
        Chooser(model, total, every=every)
    for fine in range(1, total + 1):
        if any(0.8 * total <= at <= total for at in range(fine, total + 1, fine)):
            Chooser(model, total, every=fine)


def test_a_model_that_moves_is_followed() -> None:
    """Truth: a chooser made after the move."""
    ends = []
    for late in (False, True):
        model, x, y = job()
        model = model.double() if late else model
        chooser = Chooser(model, 20, every=2)
        if not late:
            model.double()
        for _ in range(20):
            chooser.step(partial(loss, model, x.double(), y.double()))
        ends.append(model[1].scores.clone())
    assert torch.equal(ends[0], ends[1])
    assert ends[0].abs().max() == 100


def test_sharpened_weights_by_hand() -> None:
    """Closed form: without a gradient the largest of 3 weights is (1 + 2 (2.5 t − 1)) / 3."""
    choice = Choice([nn.Identity(), nn.ReLU(), nn.Tanh()])
    chooser, x = Chooser(choice, 20, every=1), torch.ones(4)
    for step in range(1, 16):
        chooser.step(lambda: 0 * choice(x).sum())
        largest = max(1 / 3, (1 + 2 * (2.5 * step / 20 - 1)) / 3)
        rest = (1 - largest) / 2
        torch.testing.assert_close(choice.weights(), torch.tensor([largest, rest, rest]))


def test_branches_that_take_turns_keep_finite_scores() -> None:
    """Law: scores stay of the size of log-odds while the sign of the loss changes."""
    choice = Choice([nn.Identity(), nn.Tanh(), nn.ReLU()])
    chooser, x = Chooser(choice, 2000, every=1), torch.tensor([1.0, 2.0, -1.0])
    for step in range(1599):
        sign = 1.0 if step % 40 < 20 else -1.0
        chooser.step(lambda sign=sign: sign * choice(x).sum())
        assert choice.scores.abs().max() < 50
