"""BatchNorm. Truths: the model's own statistics before, and a second pass written out by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import selftune as st

KEYS = ("running_mean", "running_var", "num_batches_tracked")


def batch(step: int) -> Tensor:
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(step)) + 2


def network(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU(), nn.Linear(4, 1)
    )


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {k: getattr(net[1], k).clone() for k in KEYS}


def weight_step(net: nn.Module, opt: st.SGD, step: int) -> None:
    net.train()
    opt.zero_grad()
    (net(batch(step)) - 1).square().mean().backward()
    opt.step()


def outer(net: nn.Module) -> Callable[[], Tensor]:
    return lambda: (net(batch(1000)) - 1).square().mean()


MAKES = {
    "parameters": lambda n: st.SGD(n.parameters(), lr=0.05, probe=False),
    "module": lambda n: st.SGD(n, lr=0.05, probe=False),
    "list": lambda n: st.SGD(list(n.parameters()), lr=0.05, probe=False),
    "groups": lambda n: st.SGD([{"params": m.parameters()} for m in n], lr=0.05, probe=False),
    "model": lambda n: st.SGD(n.parameters(), lr=0.05, probe=False, model=n),
}
every_make = pytest.mark.parametrize("kind", MAKES)


@every_make
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["", "cumulative"])
def test_hyper_step_leaves_the_statistics(kind: str, mode: bool, momentum: float | None) -> None:
    # pass stays in the running statistics of training.
    net = network(momentum)
    opt = MAKES[kind](net)
    for step in range(20):
        weight_step(net, opt, step)
        net.train(mode)
        before = statistics(net)
        opt.hyper_step(outer(net))
        torch.testing.assert_close(statistics(net), before, rtol=0, atol=0)


@every_make
@pytest.mark.parametrize("own", [True, False], ids=["train", "eval"])
def test_a_closure_may_leave_the_model_in_another_mode(kind: str, own: bool) -> None:
    """Truth: the same run whose closure leaves the mode that its pass was made in."""
    runs = []
    for left in (own, not own):
        net = network()
        opt = MAKES[kind](net)

        def closure(net: nn.Module = net, left: bool = left) -> Tensor:
            net.train(own)
            loss = outer(net)()
            net.train(left)
            return loss

        for step in range(60):
            weight_step(net, opt, step)
            opt.hyper_step(closure)
        with opt.averaged():
            runs.append(statistics(net))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@every_make
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_averaged_shows_fitting_statistics_and_restores(kind: str, mode: bool) -> None:
    """At the averaged weights, evaluation agrees with fresh statistics of those weights."""
    net = network()
    opt = MAKES[kind](net)
    for step in range(120):
        weight_step(net, opt, step)
        net.train(mode)
        opt.hyper_step(outer(net))
    before, weights = statistics(net), copy.deepcopy(net.state_dict())
    with opt.averaged():
        shown = statistics(net)
        net.eval()
        hidden = net[0](torch.cat([batch(s) for s in range(60, 120)]))
    assert not torch.equal(shown["running_mean"], before["running_mean"])
    # Loose: statistics are averages over some 30 hyper steps in which the weights moved.
    scale = hidden.std(0)
    assert ((shown["running_mean"] - hidden.mean(0)).abs() < 0.5 * scale).all()
    assert (shown["running_var"].sqrt() / scale).log().abs().max() < 0.5
    torch.testing.assert_close(net.state_dict(), weights, rtol=0, atol=0)


@every_make
def test_averaged_inside_averaged_shows_the_same(kind: str) -> None:
    net = network()
    opt = MAKES[kind](net)
    for step in range(20):
        weight_step(net, opt, step)
        opt.hyper_step(outer(net))
    with opt.averaged():
        shown = copy.deepcopy(net.state_dict())
        with opt.averaged():
            torch.testing.assert_close(net.state_dict(), shown, rtol=0, atol=0)
        torch.testing.assert_close(net.state_dict(), shown, rtol=0, atol=0)


@pytest.mark.parametrize("call", ["step", "hyper_step"])
def test_steps_inside_averaged_are_refused(call: str) -> None:
    """What they did would be overwritten on leaving; the refusal changes nothing."""
    net = network()
    opt = MAKES["module"](net)
    for step in range(20):
        weight_step(net, opt, step)
    before = copy.deepcopy(net.state_dict())
    with opt.averaged(), pytest.raises(RuntimeError, match=r"inside averaged\(\)"):
        opt.step() if call == "step" else opt.hyper_step(outer(net))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("rare", [0, 40])
def test_statistics_follow_without_validation_or_with_little(rare: int) -> None:
    """Truth: a pass over the data in evaluation mode, at the averaged weights."""
    net = network()
    opt = MAKES["module"](net)
    for step in range(300):
        weight_step(net, opt, step)
        if rare and step % rare == 0:
            net.eval()
            opt.hyper_step(outer(net))
    with opt.averaged():
        shown = statistics(net)
        net.eval()
        hidden = net[0](torch.cat([batch(s) for s in range(240, 300)]))
    assert ((shown["running_mean"] - hidden.mean(0)).abs() < 0.5 * hidden.std(0)).all()


def test_the_statistics_of_other_models_are_left_alone() -> None:
    """Two nets, two optimizers, each through the other's net. Truth: the passes of training."""
    nets = [network(), network()]
    opts = [st.SGD(n.parameters(), lr=0.05, total_steps=100) for n in nets]

    def loss(net: nn.Module, other: nn.Module, seed: int) -> Tensor:
        x = batch(seed)
        return (net(x) - 1).square().mean() + 0.1 * other(x + net(x)).sigmoid().mean()

    for step in range(60):
        for net, other, opt in zip(nets, reversed(nets), opts, strict=True):
            opt.zero_grad()
            loss(net, other, step).backward()
            before = statistics(other)
            opt.step()  # the sweep's end and rewinds among them
            opt.hyper_step(lambda n=net, o=other, s=step: loss(n, o, 500 + s))
            torch.testing.assert_close(statistics(other), before, rtol=0, atol=0)
            with opt.averaged():
                torch.testing.assert_close(statistics(other), before, rtol=0, atol=0)
        if step == 30:  # loaded runs know them, too
            states = [copy.deepcopy(o.state_dict()) for o in opts]
            opts = [st.SGD(n.parameters(), lr=0.05, total_steps=100) for n in nets]
            for opt, state in zip(opts, states, strict=True):
                opt.load_state_dict(state)


@pytest.mark.parametrize("affine", [True, False])
def test_layers_of_the_model_count_as_its_own(affine: bool) -> None:
    """Frozen ones and ones without weights, too; their averages are of averaged weights."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 1))
    opt = st.SGD([*net[0].parameters(), *net[2].parameters()], lr=0.05, probe=False)
    for step in range(40):
        weight_step(net, opt, step)
        opt.hyper_step(outer(net))
    training = statistics(net)
    with opt.averaged():
        assert not torch.equal(statistics(net)["running_mean"], training["running_mean"])


@every_make
def test_weights_may_be_loaded_after_the_optimizer_is_made_and_looked_at(kind: str) -> None:
    """Truth: the run of an optimizer that is made after them."""
    loaded = network()
    with torch.no_grad():
        for param in loaded.parameters():
            param.add_(1)
    weight_step(loaded, MAKES[kind](loaded), 0)  # statistics
    runs = []
    for late in (True, False):
        net = nn.Sequential(*(copy.deepcopy(m) for m in network()))
        if not late:
            net.load_state_dict(loaded.state_dict())
        opt = MAKES[kind](net)
        if late:
            assert opt.hparams["lr"] == pytest.approx(0.05)
            opt.state_dict()
            net.load_state_dict(loaded.state_dict())
        with opt.averaged():
            torch.testing.assert_close(net.state_dict(), loaded.state_dict(), rtol=0, atol=0)
        for step in range(10):
            weight_step(net, opt, step)
            opt.hyper_step(outer(net))
        with opt.averaged():
            runs.append(copy.deepcopy(net.state_dict()))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_a_momentum_that_a_schedule_sets_is_kept() -> None:
    """Truth: the number that was set."""
    net = network()
    opt = MAKES["module"](net)
    for step in range(4):
        weight_step(net, opt, step)
        opt.hyper_step(outer(net))
    net[1].momentum = 0.01
    weight_step(net, opt, 4)
    for step in range(5, 12):
        opt.hyper_step(outer(net))
        with opt.averaged():
            pass
        weight_step(net, opt, step)
    assert net[1].momentum == 0.01


def test_averaged_weights_have_the_usual_momentum() -> None:
    """A copy or file made there trains as the model itself does."""
    net, seen = network(), []
    opt = MAKES["module"](net)

    def closure() -> Tensor:
        seen.append(net[1].momentum)
        return outer(net)()

    for step in range(40):
        weight_step(net, opt, step)
        opt.hyper_step(closure)
    assert max(seen) > 0.1  # validation passes are rare
    with opt.averaged():
        assert copy.deepcopy(net)[1].momentum == 0.1
    opt.eval()
    assert net[1].momentum == 0.1


def test_two_optimizers_of_a_layer_give_its_momentum_back() -> None:
    net = network()
    one, other = (st.SGD(net[i].parameters(), lr=0.05, probe=False, model=net) for i in (0, 3))
    for step in range(3):
        net.train()
        (net(batch(step)) - 1).square().mean().backward()
        for opt in (one, other):
            opt.step()
            opt.zero_grad()
            opt.hyper_step(outer(net))
        for opt in (one, other):
            opt.eval()
        for opt in (one, other):
            opt.train()
        assert net[1].momentum == 0.1


def two_optimizers(steps: int) -> tuple[nn.Module, list[st.SGD]]:
    net = network()
    opts = [st.SGD(net[i].parameters(), lr=0.05, probe=False, model=net) for i in (0, 3)]
    train_both(net, opts, range(steps))
    return net, opts


def train_both(net: nn.Module, opts: list[st.SGD], steps: range) -> None:
    for step in steps:
        (net(batch(step)) - 1).square().mean().backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        for opt in opts:
            opt.hyper_step(outer(net))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_optimizers_of_a_layer_give_its_statistics_back(order: tuple[int, int]) -> None:
    """In whatever order they leave; then the run goes on as one that was never evaluated."""
    net, opts = two_optimizers(12)
    before = statistics(net)
    for opt in opts:
        opt.eval()
    assert not torch.equal(statistics(net)["running_mean"], before["running_mean"])
    for at in order:
        opts[at].train()
    for key, value in statistics(net).items():
        assert torch.equal(value, before[key])
    train_both(net, opts, range(12, 24))
    never, others = two_optimizers(24)
    for key, value in net.state_dict().items():
        assert torch.equal(value, never.state_dict()[key])
    assert [o.hparams for o in opts] == [o.hparams for o in others]


def test_two_optimizers_of_a_layer_save_its_statistics() -> None:
    """Saved while both show averages. Truth: the uninterrupted run."""
    net, opts = two_optimizers(12)
    with opts[0].averaged(), opts[1].averaged():
        saved = copy.deepcopy((net.state_dict(), [opt.state_dict() for opt in opts]))
    again, resumed = two_optimizers(0)
    again.load_state_dict(saved[0])
    for opt, state in zip(resumed, saved[1], strict=True):
        opt.load_state_dict(state)
    train_both(net, opts, range(12, 24))
    train_both(again, resumed, range(12, 24))
    for key, value in again.state_dict().items():
        assert torch.equal(value, net.state_dict()[key])


def test_an_optimizer_left_at_averaged_weights_does_not_disturb_the_next() -> None:
    """Truth: the same run in a network that no optimizer has trained before."""
    net = network()
    left = st.SGD(net, lr=0.05, probe=False)
    for step in range(12):
        weight_step(net, left, step)
        left.hyper_step(outer(net))
    left.eval()
    fresh = copy.deepcopy(net)
    ends = []
    for one in (net, fresh):
        opt = st.SGD(one, lr=0.05, probe=False)
        for step in range(12, 24):
            weight_step(one, opt, step)
            opt.hyper_step(outer(one))
        opt.eval()
        again = network()
        again.load_state_dict(one.state_dict())
        resumed = st.SGD(again, lr=0.05, probe=False)
        resumed.load_state_dict(opt.state_dict())
        opt.train()
        for each in (one, again):
            assert each[1].momentum == 0.1
            ends.append({**statistics(each), "weight": each[0].weight.detach().clone()})
    for end in ends[1:]:
        for key, value in end.items():
            assert torch.equal(value, ends[0][key])


@pytest.mark.parametrize("shell", [st.AdamW, st.SGD])
def test_a_model_may_be_converted_after_its_optimizer_is_made(shell: type) -> None:
    """Twin: converted before; as of accelerators that take both."""
    ends = []
    for early in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        net = net.double() if early else net
        opt = shell(net, lr=0.01, total_steps=40)
        net.double()
        x = torch.randn(40, 16, 4, generator=torch.Generator().manual_seed(1)).double()
        for batch in x:
            opt.zero_grad()
            net(batch).square().mean().backward()
            opt.step()
            net.eval()
            opt.hyper_step(lambda net=net, x=x: net(x[0]).square().mean())
            net.train()
        with opt.averaged():
            ends.append({n: t.clone() for n, t in net.state_dict().items()})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-6, atol=1e-7)


def _product(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    noise = 0.1 * torch.randn(size, 1, generator=generator)
    return x, x[:, :1] * x[:, 1:2] + x.sum(1, keepdim=True) + noise


def test_final_weights_have_statistics_of_their_own() -> None:
    """Truth: torch's ``update_bn`` over the training data; rare passes lag behind the weights."""
    (x, y), (xv, yv), (xt, yt) = _product(900, 1), _product(300, 2), _product(4000, 3)
    ratios = []
    for seed in (2, 3, 4):
        torch.manual_seed(seed)
        layers = [nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU()]
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1)]
        net = nn.Sequential(*layers)
        opt = st.AdamW(net, lr=3e-3, total_steps=600)
        drawn, drawn_val = (torch.Generator().manual_seed(seed + s) for s in (100, 0))

        def loss_of(x: Tensor, y: Tensor, net: nn.Module = net) -> Tensor:
            return (net(x) - y).square().mean()

        def closure(drawn: torch.Generator = drawn_val, loss_of: Callable = loss_of) -> Tensor:
            some = torch.randperm(300, generator=drawn)[:100]
            return loss_of(xv[some], yv[some])

        for _ in range(600):
            some = torch.randint(900, (50,), generator=drawn)
            opt.zero_grad()
            loss_of(x[some], y[some]).backward()
            opt.step()
            opt.hyper_step(closure)
        losses = []
        with opt.averaged(), torch.no_grad():
            for exact in (False, True):
                if exact:
                    torch.optim.swa_utils.update_bn([(x,)], net)
                net.eval()
                losses.append(float(loss_of(xt, yt)))
                net.train()
        ratios.append(losses[0] / losses[1])
    assert max(ratios) < 2, ratios
