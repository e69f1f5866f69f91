"""Estimators of whole steps in the optimizers. Truths: autograd through a plain loop, torch."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from selftune.estimators import AbstractEstimator
from selftune.optim._closures import ClosureSteps  # private: hypergradients are kept inside

SEEING: dict[str, AbstractEstimator] = {
    "Forward": st.Forward(),
    "Unrolled": st.Unrolled(50),
    "Unrolled, checkpoints": st.Unrolled(50, checkpoint=3),
}


def net(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 2)
    ).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    return [(draw(12, 3), draw(12, 2)) for _ in range(count)]


def trained(model: nn.Module, opt: Any, train: list[Any]) -> None:
    def closure(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for x, y in train:
        opt.step(functools.partial(closure, x, y))


@pytest.mark.parametrize("per", ["run", "tensor"])
@pytest.mark.parametrize("name", SEEING)
def test_hypergradients_are_those_of_a_plain_loop(
    name: str, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    before = ClosureSteps.signal

    def signal(self: ClosureSteps, block: Any, values: Any, grads: Tensor) -> Tensor:
        found = before(self, block, values, grads)
        seen.append((grads.clone(), found))
        return found

    monkeypatch.setattr(ClosureSteps, "signal", signal)
    model, train = net(), batches(9)
    opt = st.SGD(
        model, lr=0.05, momentum=0.7, weight_decay=0.02, tune=("lr", "weight_decay"), every=8,
        estimator=SEEING[name], probe=False, per=per,
    )  # fmt: skip
    trained(model, opt, train[:8])
    opt.hyper_step(lambda: F.mse_loss(model(train[8][0]), train[8][1]))
    (grads, found), plain = seen[0], net()
    sizes = [p.numel() for p in plain.parameters()]
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    values = {"lr": 0.05, "weight_decay": 0.02}
    shape = () if per == "run" else (len(sizes),)
    logs = {n: torch.full(shape, v, dtype=torch.float64).log() for n, v in values.items()}

    def end(logs: dict[str, Tensor]) -> Tensor:
        h = {n: v.exp() if per == "run" else v.exp()[index] for n, v in logs.items()}
        named = dict(plain.named_parameters())
        w = torch.cat([p.detach().flatten() for p in named.values()])
        momentum = torch.zeros_like(w)
        for x, y in train[:8]:

            def loss(w: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
                parts = [
                    part.view_as(p) for part, p in zip(w.split(sizes), named.values(), strict=True)
                ]
                held = {n: b.clone() for n, b in plain.named_buffers()}
                tensors = dict(zip(named, parts, strict=True)) | held
                return F.mse_loss(torch.func.functional_call(plain, tensors, (x,)), y)

            momentum = 0.7 * momentum + torch.func.grad(loss)(w) + h["weight_decay"] * w
            w = w - h["lr"] * momentum
        return w @ (grads / grads.norm())

    truth = torch.func.grad(end)(logs)
    size = max(float(t.abs().max()) for t in truth.values())
    for row, value in zip(found, truth.values(), strict=True):
        torch.testing.assert_close(row, value.reshape(-1), rtol=1e-5, atol=1e-7 * size)


@pytest.mark.parametrize(
    "estimator",
    [st.Forward(), st.Unrolled(4), st.Implicit(through="update"), st.BestResponse()],
)
def test_what_is_looked_at_in_passing_is_put_back(estimator: AbstractEstimator) -> None:
    """Weights, statistics and random numbers are those of torch's own optimizer."""
    one, other, train = net(dropout=0.5), net(dropout=0.5), batches(20)
    common = dict(lr=0.05, momentum=0.9, weight_decay=1e-3)
    torch.manual_seed(5)
    trained(other, torch.optim.SGD(other.parameters(), **common), train)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    opt = st.SGD(
        one, **common, tune=("lr", "weight_decay"), estimator=estimator, probe=False,
        every=10**6, guard=False,
    )  # fmt: skip
    trained(one, opt, train)
    assert torch.equal(torch.get_rng_state(), after)
    for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_closures_that_forget_their_batch_are_noticed() -> None:
    model, train = net(), batches(9)
    opt = st.SGD(model, lr=0.05, estimator=st.Unrolled(8), probe=False, every=8)
    for x, y in train[:8]:

        def closure() -> Tensor:
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)  # noqa: B023 - the mistake
            loss.backward()
            return loss

        opt.step(closure)
    with pytest.raises(RuntimeError, match="must keep its own batch"):
        opt.hyper_step(lambda: F.mse_loss(model(train[8][0]), train[8][1]))


def test_a_step_without_closure_is_refused() -> None:
    model = net()
    opt = st.SGD(model, lr=0.05, estimator=st.Forward())
    model(torch.ones(4, 3).double()).sum().backward()
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        opt.step()


def test_several_groups_are_refused() -> None:
    model = net()
    groups = [{"params": [p]} for p in model.parameters()]
    opt = st.SGD(groups, lr=0.05, estimator=st.Forward())
    with pytest.raises(ValueError, match="6 parameter groups"):
        trained(model, opt, batches(1))


def test_optimizers_from_outside_are_refused() -> None:
    inner = torch.optim.NAdam(net().parameters())
    with pytest.raises(ValueError, match="needs a rule of the library"):
        st.SelfTuning(inner, estimator=st.Forward())


def test_copies_and_saved_states_go_on() -> None:
    """Unrolled observes anew, as closures are not saved; weights move as before."""
    model, train = net(), batches(12)
    opt = st.SGD(model, lr=0.05, estimator=st.Unrolled(4), probe=False, every=10**6)
    trained(model, opt, train[:6])
    again, other = net(), copy.deepcopy(opt)
    again.load_state_dict(model.state_dict())
    loaded = st.SGD(again, lr=0.05, estimator=st.Unrolled(4), probe=False, every=10**6)
    loaded.load_state_dict(opt.state_dict())
    trained(model, opt, train[6:])
    trained(again, loaded, train[6:])
    assert other.hparams == opt.hparams
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def signal(opt: Any) -> Tensor:
    """Hypergradients along an outer gradient of ones: private, since none can be asked for."""
    block, values = opt._blocks()[0], opt._groups.values(opt.param_groups)[0]
    return opt._engine.whole.signal(block, values, torch.ones_like(block.part.average))


def test_options_that_change_are_those_of_their_step() -> None:
    """A scheduler on a rate that is not tuned. Law: Unrolled over all steps equals Forward."""
    found = []
    for estimator in (st.Forward(), st.Unrolled(8), st.Unrolled(8, checkpoint=5)):
        model, train = net(), batches(7)
        opt = st.SGD(
            model, lr=0.2, momentum=0.5, weight_decay=0.1, tune=("weight_decay",), every=6,
            estimator=estimator, probe=False, guard=False,
        )  # fmt: skip
        plan = torch.optim.lr_scheduler.StepLR(opt, 4, gamma=0.01)
        for batch in train[:6]:
            trained(model, opt, [batch])
            plan.step()
        found.append(signal(opt))
    for reverse in found[1:]:
        torch.testing.assert_close(reverse, found[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("estimator", [st.Forward(), st.Unrolled(5), st.Implicit(through="update")])
def test_a_run_that_has_converged_goes_on(estimator: AbstractEstimator) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(40, 4)
    train = [(x, x.sum(1, keepdim=True))] * 120
    opt = st.SGD(model, lr=0.2, tune=("lr",), estimator=estimator, probe=False)
    for batch in train:
        trained(model, opt, [batch])
        opt.hyper_step(lambda: F.mse_loss(model(x), x.sum(1, keepdim=True)))
    assert float(F.mse_loss(model(x), x.sum(1, keepdim=True)).detach()) < 1e-4


@pytest.mark.parametrize("estimator", [st.Forward(), st.Unrolled(5), st.Implicit(through="update")])
def test_gradients_are_left_alone(estimator: AbstractEstimator) -> None:
    """Closures that clear them in place, and closures that do not clear them at all."""
    for clears in (True, False):
        model, train = net(), batches(6)
        opt = st.SGD(model, lr=0.05, estimator=estimator, probe=False, every=5, guard=False)

        def closure(x: Tensor, y: Tensor, clears: bool, model: Any, opt: Any) -> Tensor:
            if clears:
                opt.zero_grad(set_to_none=False)
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        for x, y in train[:5]:
            opt.zero_grad()
            opt.step(functools.partial(closure, x, y, clears, model, opt))
        kept = [p.grad.clone() for p in model.parameters()]
        opt.hyper_step(lambda m=model, last=train[5]: F.mse_loss(m(last[0]), last[1]))
        assert all(torch.equal(p.grad, k) for p, k in zip(model.parameters(), kept, strict=True))


def test_implicit_notices_a_closure_that_has_lost_its_batch() -> None:
    model, train = net(), batches(9)
    opt = st.SGD(model, lr=0.05, estimator=st.Implicit(through="update"), probe=False, every=8)
    held: list[Any] = []

    def closure() -> Tensor:
        opt.zero_grad()
        loss = F.mse_loss(model(held[0][0]), held[0][1])
        loss.backward()
        return loss

    for batch in train[:8]:
        held[:] = [batch]
        opt.step(closure)
    held[:] = [(train[8][0], 5 + train[8][1])]
    with pytest.raises(RuntimeError, match="must keep its own batch"):
        opt.hyper_step(lambda: F.mse_loss(model(train[8][0]), train[8][1]))


def test_implicit_knows_the_step_it_is_at() -> None:
    """The decay of the rate acts through the number of steps taken."""
    model, train = net(), batches(7)
    opt = st.SGD(
        model, lr=0.05, momentum=0.5, decay=0.05, tune=("lr", "decay"), probe=False, every=6,
        estimator=st.Implicit(through="update"), guard=False,
    )  # fmt: skip
    trained(model, opt, train[:6])
    lr, decay = signal(opt).flatten()
    assert float(decay / lr) == pytest.approx(-0.05 * 6 / (1 + 0.05 * 6), rel=0.05)


@pytest.mark.parametrize("per", ["run", "tensor"])
def test_loading_and_unfreezing_begin_anew(per: str) -> None:
    model, train = net(), batches(12)
    model[0].requires_grad_(False)
    options: dict[str, Any] = dict(lr=0.05, estimator=st.Unrolled(5), probe=False, every=3, per=per)
    opt = st.SGD(model, **options, tune=("lr",))
    trained(model, opt, train[:4])
    opt.load_state_dict(opt.state_dict())
    before = opt.hparams["lr"]
    opt.hyper_step(lambda: F.mse_loss(model(train[8][0]), train[8][1]))
    assert opt.hparams["lr"] == before  # nothing has been seen since: no step on a false 0
    trained(model, opt, train[4:8])
    model[0].requires_grad_(True)
    trained(model, opt, train[8:])
    opt.hyper_step(lambda: F.mse_loss(model(train[8][0]), train[8][1]))
    assert opt.hparams["lr"] != before


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (st.Unrolled(), "horizon=None"),
        (st.Forward(curvature="gauss-newton"), "gauss-newton"),
        (st.Implicit(), "do not enter the training loss"),
    ],
)
def test_what_cannot_observe_a_run_is_refused_at_once(
    estimator: AbstractEstimator, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        st.SGD(net(), lr=0.1, estimator=estimator)
    with pytest.raises(ValueError, match=message):
        st.Tuner(net(), F.mse_loss, estimator=estimator)


def test_embeddings_raise_no_false_alarm() -> None:
    """Many weights, of which each batch uses few."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(5000, 32), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    opt = st.SGD(model, lr=0.1, estimator=st.Unrolled(5), probe=False, every=5)

    def closure(x: Tensor, y: Tensor) -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(20):
        x, y = torch.randint(5000, (16, 4)), torch.randint(4, (16,))
        opt.step(functools.partial(closure, x, y))
        opt.hyper_step(lambda x=x, y=y: F.cross_entropy(model(x), y))


def test_a_closure_that_fails_in_passing_leaves_the_weights_as_they_were() -> None:
    model, train = net(), batches(7)
    opt = st.SGD(model, lr=0.05, estimator=st.Unrolled(5), probe=False, every=6)
    calls: list[int] = []

    def closure(x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for x, y in train[:6]:
        opt.step(functools.partial(closure, x, y))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        opt.hyper_step(lambda: F.mse_loss(model(train[6][0]), train[6][1]))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("shell", [st.SGD, st.AdamW])
@pytest.mark.parametrize("estimator", [st.Unrolled(4), st.Implicit(through="update")])
def test_clipped_closures_need_forward(shell: type, estimator: AbstractEstimator) -> None:
    """Law: the derivative of a clipped gradient is not symmetric, which reverse passes need."""

    def tune(estimator: AbstractEstimator, norm: float) -> None:
        model = net()
        opt = shell(model, lr=0.01, estimator=estimator, probe=False, every=4)

        def closure(x: Tensor, y: Tensor) -> Tensor:
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), norm)
            return loss

        for x, y in batches(4):
            opt.step(functools.partial(closure, x, y))
        opt.hyper_step(lambda: F.mse_loss(model(batches(5)[4][0]), batches(5)[4][1]))

    tune(estimator, 1e3)
    tune(st.Forward(), 0.01)
    with pytest.raises(RuntimeError, match="clips the norm of its gradient"):
        tune(estimator, 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curved", [False, True])
def test_kinks_and_straight_losses_are_not_taken_for_clipping(
    dtype: torch.dtype, curved: bool
) -> None:
    """Law: these gradients are those of a loss, though differences of them are rough, or noise."""
    for seed in range(10):
        torch.manual_seed(seed)
        layers = [nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)] if curved else [nn.Linear(3, 2)]
        model = nn.Sequential(*layers).to(dtype)
        opt = st.SGD(model, lr=0.05, estimator=st.Unrolled(4), probe=False, every=4)

        def loss(x: Tensor, model: nn.Module = model) -> Tensor:
            return model(x).abs().mean() if curved else model(x).mean()

        def closure(x: Tensor, opt: Any = opt, loss: Any = loss) -> Tensor:
            opt.zero_grad()
            value = loss(x)
            value.backward()
            return value

        for _ in range(4):
            opt.step(functools.partial(closure, torch.randn(6, 3, dtype=dtype)))
        opt.hyper_step(functools.partial(loss, torch.randn(6, 3, dtype=dtype)))


def test_gradients_that_are_not_finite_nearby_are_not_taken_for_clipping() -> None:
    """The guard judges them: they are finite at the weights of the steps, and not beside them."""
    model = nn.Linear(3, 1).double()
    opt = st.SGD(
        model, lr=1e-9, bounds={"lr": (1e-12, 1)}, estimator=st.Unrolled(2), probe=False, every=2
    )
    start = model.weight.detach().clone()

    def closure(x: Tensor) -> Tensor:
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if bool((model.weight.detach() - start).abs().max() > 1e-7):
            for p in model.parameters():
                p.grad = torch.full_like(p, torch.inf)
        return loss

    for _ in range(2):
        opt.step(functools.partial(closure, torch.randn(8, 3).double()))
    opt.hyper_step(lambda: model(torch.ones(1, 3).double()).square().mean())


KEPT: dict[str, AbstractEstimator] = {
    "Forward": st.Forward(),
    "projections": st.Forward(projections=2, curvature="diagonal"),
    "Implicit": st.Implicit(through="update", warm=True),
    "BestResponse": st.BestResponse(),
}


@pytest.mark.parametrize("how", ["saved", "copied"])
@pytest.mark.parametrize("name", KEPT)
def test_what_was_observed_is_kept(name: str, how: str) -> None:
    """Truth: the run that went on, bit for bit (they observed anew)."""
    options: dict[str, Any] = dict(
        lr=0.05, momentum=0.5, total_steps=60, estimator=KEPT[name], probe=False, every=3
    )

    def train(model: nn.Module, opt: Any, some: list[Any]) -> None:
        for number, batch in enumerate(some):
            torch.manual_seed(number)  # of random directions
            trained(model, opt, [batch])
            opt.hyper_step(lambda: F.mse_loss(model(held[0]), held[1]))

    *some, held = batches(25)
    model = net()
    opt = st.SGD(model, **options)
    train(model, opt, some[:13])
    if how == "copied":
        again, other = copy.deepcopy((model, opt))
    else:
        again = net()
        other = st.SGD(again, **options)
        again.load_state_dict(model.state_dict())
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    before = opt.hparams
    train(model, opt, some[13:])
    train(again, other, some[13:])
    assert other.hparams == opt.hparams != before
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Prompted(nn.Module):
    """With a prompt of length 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.prompt = net(), nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(torch.cat([self.prompt, x]))
        return out


def test_parameters_without_elements_have_no_response() -> None:
    """Truth: the run without it, which was an IndexError with it."""

    def run(model: nn.Module) -> tuple[dict[str, Any], list[Tensor]]:
        opt = st.AdamW(model, estimator=st.BestResponse(), total_steps=12, probe=False)
        for (x, y), other in zip(batches(12), batches(12), strict=True):
            trained(model, opt, [(x, y)])
            opt.hyper_step(lambda other=other: F.mse_loss(model(other[0]), other[1]))
        return opt.hparams, [p.detach() for p in model.parameters() if p.numel()]

    hparams, weights = run(net())
    others, found = run(Prompted())
    assert hparams == others
    assert hparams["lr"] != 1e-3
    assert all(torch.equal(a, b) for a, b in zip(weights, found, strict=True))
