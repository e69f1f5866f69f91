"""torch's LR schedulers. Truths: torch's own run where nothing is tuned, and a step by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import selftune as st


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 1)).double()


def loss_of(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def gradients(net: nn.Module, step: int, sign: int = 1) -> Tensor:
    loss = loss_of(net, step)
    (sign * loss).backward()
    return loss.detach()


def weights(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def same(run: Callable[[bool], nn.Module]) -> None:
    torch.testing.assert_close(weights(run(True)), weights(run(False)), rtol=1e-11, atol=1e-12)


def sequence(opt: torch.optim.Optimizer) -> schedulers.SequentialLR:
    parts = [schedulers.LinearLR(opt, 0.1, total_iters=8), schedulers.CosineAnnealingLR(opt, 20)]
    return schedulers.SequentialLR(opt, parts, [8])


SCHEDULERS = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda t: min(1.0, t / 5)),
    "step": lambda o: schedulers.StepLR(o, 7, 0.3),
    "multi": lambda o: schedulers.MultiStepLR(o, [4, 19], 0.1),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 25),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 6),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=31),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=5),
    "cyclic from 0": lambda o: schedulers.CyclicLR(o, 0.0, 0.1, step_size_up=5),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "sequence": sequence,
}


@pytest.mark.parametrize("tune", [(), ("lr",)], ids=["off", "on"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tune: tuple[str, ...]) -> None:
    """Tuned, but with no hyper step in 30 steps, the tuned factor is 1: torch's run again."""

    def run(ours: bool) -> nn.Module:
        net = network()
        extra = dict(tune=tune, probe=False, guard=False) if ours else {}
        options = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
        opt = (st if ours else torch.optim).SGD(net.parameters(), **options, **extra)
        scheduler = SCHEDULERS[name](opt)
        for step in range(30):
            opt.zero_grad()
            loss = gradients(net, step)
            opt.step()
            scheduler.step(*([loss] if name == "plateau" else []))
        return net

    same(run)


@pytest.mark.parametrize("look", [False, True], ids=["", "hparams read before"])
@pytest.mark.parametrize("name", ["step", "one cycle", "cosine", "lambda", "plateau"])
def test_schedulers_multiply_the_tuned_rate(name: str, look: bool) -> None:
    """By hand: a step of SGD moves a weight whose gradient is 1 by tuned lr x schedule."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = st.SGD([weight], lr=0.01, momentum=0.0, tune=("lr",), probe=False)
    if look:
        assert opt.hparams["lr"] == pytest.approx(0.01)
    scheduler = SCHEDULERS[name](opt)
    start = opt.param_groups[0].get("initial_lr", 0.01)
    for step in range(25):
        before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
        group = opt.param_groups[0]
        scale = group["lr"] / group["initial_lr"] if "initial_lr" in group else 1.0
        want, momentum = opt.hparams["lr"] * scale, group["momentum"]
        if step == 0:
            assert want == pytest.approx(group["lr"])  # nothing is tuned yet
        group["momentum"] = 0.0  # one cycle sets it as well
        opt.step()
        group["momentum"] = momentum
        assert float(before - weight.detach()) == pytest.approx(want, rel=1e-9)
        scheduler.step(*([float(weight.detach())] if name == "plateau" else []))
        opt.hyper_step(lambda: weight.sum())
    assert opt.hparams["lr"] > 1.2 * start


OWN = {
    "constant": {},
    "linear": dict(total_steps=60),
    "warm-up, cosine": dict(total_steps=60, warmup_steps=12, schedule="cosine"),
    "decay": dict(decay=0.1),
    "not tuned": dict(total_steps=60, tune=()),
    "scheduler": dict(scheduler=True),
}


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_groups_show_the_rate_that_is_applied(name: str, probe: bool) -> None:
    """By hand: a step of SGD moves a weight whose gradient is 1 by the rate that is applied."""
    options = dict(OWN[name])
    scheduled = options.pop("scheduler", False)
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    options = {"tune": ("lr", "decay"), **options}
    opt = st.SGD([weight], lr=0.01, momentum=0.0, weight_decay=0.0, probe=probe, **options)
    scheduler = schedulers.StepLR(opt, 7, 0.3) if scheduled else None
    for _ in range(60):
        before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
        opt.step()
        group = opt.param_groups[0]
        if float(weight.detach()) >= float(before):  # rewound
            continue
        rounded = 4e-16 * float(before.abs())
        applied = pytest.approx(float(before - weight.detach()), rel=1e-9, abs=rounded)
        assert group["applied_lr"] == applied
        if not (scheduled or name == "not tuned"):
            assert group["lr"] == applied
        peak = opt.hparams["lr"]
        assert group["peak_lr"] == pytest.approx(peak)
        opt.hyper_step(lambda: weight.sum())
        if scheduler is not None:
            scheduler.step()


def test_a_rate_written_during_a_schedule_is_the_rate_then() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = st.SGD([weight], lr=0.01, momentum=0.0, probe=False, tune=("lr",), total_steps=100)
    for step in range(50):
        weight.grad = torch.ones_like(weight)
        if step == 49:
            opt.param_groups[0]["lr"] = 10 * opt.param_groups[0]["lr"]
            before, peak = weight.detach().clone(), opt.hparams["lr"]
        opt.step()
    assert peak == pytest.approx(0.1, rel=1e-6)
    assert float(before - weight.detach()) == pytest.approx(0.1 * 0.51, rel=1e-3)


@pytest.mark.parametrize("schedule", [None, "cosine", "constant"])
@pytest.mark.parametrize("name", ["step", "cosine", "lambda"])
def test_annealing_twice_is_named_once(
    name: str, schedule: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A warm-up (lambda) does not anneal; torch's others do, beside ours unless it is constant."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = st.SGD([weight], lr=0.01, momentum=0.0, probe=False, total_steps=40, schedule=schedule)
    scheduler = SCHEDULERS[name](opt)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        opt.step()
        scheduler.step()
    found = [r for r in caplog.records if "is annealed twice" in r.getMessage()]
    assert len(found) == (name != "lambda" and schedule != "constant")


WARM_UPS = {
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=120),
    "linear": lambda o: schedulers.LinearLR(o, 0.1, total_iters=30),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda t: min(1.0, (t + 1) / 30)),
}


class Loop:
    """A training loop that writes a warm-up itself."""

    def __init__(self, opt: torch.optim.Optimizer) -> None:
        self.opt, self.taken = opt, 0
        self.write()

    def write(self) -> None:
        for group in self.opt.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.taken + 1) / 30)

    def step(self) -> None:
        self.taken += 1
        self.write()


@pytest.mark.parametrize("name", [*WARM_UPS, "loop"])
def test_a_warm_up_skips_the_sweep_and_says_so_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By hand: the rate applied is the scheduler's, and the tuned factor is still 1."""
    net = network()
    opt = st.SGD(net.parameters(), lr=0.1, momentum=0.9, tune=("lr",), guard=False)
    scheduler = (WARM_UPS | {"loop": Loop})[name](opt)
    for step in range(40):
        opt.zero_grad()
        gradients(net, step)
        opt.step()
        group = opt.param_groups[0]
        if step > 1:
            assert group["applied_lr"] == pytest.approx(float(group["lr"]), rel=1e-6)
        scheduler.step()
    told = [r for r in caplog.records if "sweep is skipped" in r.getMessage()]
    assert len(told) == 1
    if name != "loop":  # a loop that writes at every step decides alone
        assert opt.hparams["lr"] == pytest.approx(opt.param_groups[0]["initial_lr"])


def test_a_scheduler_that_only_lowers_the_rate_leaves_the_sweep(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = network()
    opt = st.SGD(net.parameters(), lr=1e-6, momentum=0.9, guard=False)
    scheduler = schedulers.CosineAnnealingLR(opt, 1000)
    for step in range(40):
        opt.zero_grad()
        gradients(net, step)
        opt.step()
        scheduler.step()
    assert not [r for r in caplog.records if "sweep is skipped" in r.getMessage()]
    assert opt.hparams["lr"] > 1e-4


def test_groups_of_two_rates_are_not_taken_for_annealed(caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[2].parameters()}]
    opt = st.SGD(groups, lr=0.01, probe=False, total_steps=40)
    scheduler = schedulers.StepLR(opt, 100)
    for step in range(5):
        opt.zero_grad()
        gradients(net, step)
        opt.step()
        scheduler.step()
    assert not [r for r in caplog.records if "is annealed twice" in r.getMessage()]


@pytest.mark.parametrize("shell", [st.AdamW, st.SGD])
def test_groups_start_beside_a_constant_scheduler_as_without(shell: type) -> None:
    """Truth: the run without scheduler; a layer joins late, and a start lies outside its bounds."""

    def run(scheduled: bool) -> nn.Module:
        net = network()
        net[0].requires_grad_(False)
        groups = [{"params": net[0].parameters(), "lr": 1e-3}, {"params": net[1:].parameters()}]
        bounds = {"lr": (1e-4, 1e-2)}
        opt = shell(groups, lr=0.5, bounds=bounds, total_steps=60, schedule="constant", probe=False)
        scheduler = schedulers.LambdaLR(opt, lambda _: 1.0) if scheduled else None
        for step in range(20):
            net[0].requires_grad_(step >= 12)
            opt.zero_grad()
            gradients(net, step)
            opt.step()
            opt.hyper_step(lambda step=step: loss_of(net, 1000 + step))
            if scheduler is not None:
                scheduler.step()
        return net

    same(run)


@pytest.mark.parametrize(
    ("warmup", "probe", "warns"), [(5, True, True), (5, False, False), (90, True, False)]
)
@pytest.mark.parametrize("driver", ["optimizer", "tuner"])
def test_a_warm_up_within_the_sweep_is_named(
    driver: str, warmup: int, probe: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It had no effect, in silence."""
    net, options = nn.Linear(4, 1), {"warmup_steps": warmup, "probe": probe}
    if driver == "optimizer":
        st.SGD(net, lr=0.01, total_steps=200, **options)
    else:
        data = [(x, x.sum(1, keepdim=True)) for x in torch.randn(20, 8, 4)]
        tuner = st.Tuner(net, nn.functional.mse_loss, compile=False, **options)
        tuner.fit(data, data[:2], epochs=10, progress=False)
    assert (f"warmup_steps={warmup} has no effect" in caplog.text) is warns
