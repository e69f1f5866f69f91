"""Without tuning, every shell with torch's tools around it. Truth: torch.optim's own steps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import selftune as st

OFF = dict(tune=(), probe=False, guard=False)
CASES = [
    ("SGD", dict(lr=0.05)),
    ("SGD", dict(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1)),
    ("SGD", dict(lr=0.05, momentum=0.8, nesterov=True, maximize=True)),
    ("SGD", dict(lr=torch.tensor(0.0625, dtype=torch.float64), momentum=0.9)),
    ("Adam", dict(lr=0.01, weight_decay=0.1)),
    ("Adam", dict(lr=0.01, amsgrad=True, betas=(0.8, 0.7), maximize=True)),
    ("AdamW", dict(lr=0.01, weight_decay=0.3, amsgrad=True)),
    ("RMSprop", dict(lr=0.01, momentum=0.5, centered=True, alpha=0.9)),
]


def build(name: str, params: object, options: dict, ours: bool) -> torch.optim.Optimizer:
    module = st if ours else torch.optim
    return getattr(module, name)(params, **options, **(OFF if ours else {}))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 1)).double()


def gradients(net: nn.Module, step: int, sign: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
    (sign * loss).backward()
    return loss.detach()


def weights(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def same(run: Callable[[bool], nn.Module]) -> None:
    torch.testing.assert_close(weights(run(True)), weights(run(False)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_torch(name: str, options: dict, set_to_none: bool) -> None:
    """Groups, a frozen and thawed layer, and parameters without gradient in some steps."""

    def run(ours: bool) -> nn.Module:
        net = network()
        own = {**options, "lr": 0.002, "weight_decay": 0.2}
        groups = [{"params": list(net[0].parameters()), **own}]
        groups += [{"params": [*net[2].parameters(), *net[3].parameters()]}]
        opt = build(name, groups, options, ours)
        net[2].weight.requires_grad_(False)
        for step in range(30):
            if step in (10, 20):
                net[2].weight.requires_grad_(step == 10)
            opt.zero_grad(set_to_none=set_to_none)
            gradients(net, step, -1 if options.get("maximize") else 1)
            if step % 3 == 2:
                net[0].bias.grad = None
            opt.step()
        return net

    same(run)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_equals_torch_with_named_parameters_and_a_later_group(name: str) -> None:
    def run(ours: bool) -> nn.Module:
        net = network()
        opt = build(name, net[:3].named_parameters(), dict(lr=0.01, weight_decay=0.1), ours)
        for step in range(30):
            if step == 12:
                later = {"params": net[3].named_parameters(), "lr": 0.03, "weight_decay": 0.0}
                opt.add_param_group(later)
            net.zero_grad()
            gradients(net, step)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            opt.step()
        return net

    same(run)


def test_grad_scaler_skips_and_unscales() -> None:
    def run(ours: bool) -> nn.Module:
        net = network()
        opt = build("Adam", net.parameters(), dict(lr=0.01), ours)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        for step in range(30):
            opt.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()
            scaler.scale(net(x).square().mean()).backward()
            if step in (3, 4, 17):
                net[0].weight.grad.fill_(torch.inf)
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
        return net

    same(run)


@pytest.mark.parametrize("probe", [False, True])
def test_maximize_tunes_as_minimizing_the_negative_does(probe: bool) -> None:
    """The same descent written both ways, tuned by its training gradients alone."""
    ends = []
    for sign in (1, -1):
        net = network()
        opt = st.SGD(net.parameters(), lr=0.001, maximize=sign < 0, probe=probe)
        for step in range(80):
            opt.zero_grad()
            gradients(net, step, sign)
            opt.step()
        ends.append(opt.hparams)
    assert ends[0] == ends[1]


def test_hyper_steps_before_the_first_step_are_none() -> None:
    """A scaler skips the first steps, and gradients are accumulated over three batches.

    Truth: the run whose hyper_steps begin with the first step.
    """

    def run(early: bool) -> tuple[dict, Tensor]:
        net = network()
        opt = st.SGD(net.parameters(), lr=0.001, every=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(90):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).double()
            scaler.scale(net(x).square().mean()).backward()
            if step == 2:
                net[0].weight.grad.fill_(torch.inf)
            if step % 3 == 2:
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
            if early or step >= 5:
                found = opt.hyper_step(lambda x=x: net(x).square().mean())
                assert step >= 5 or found is None
        return opt.hparams, weights(net)

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_a_compiled_step_is_the_step() -> None:
    def run(compiled: bool) -> Tensor:
        net = network()
        opt = st.AdamW(net.parameters(), lr=0.01)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        for at in range(30):
            opt.zero_grad()
            gradients(net, at)
            step()
        return weights(net)

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)
