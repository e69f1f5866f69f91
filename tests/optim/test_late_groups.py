"""Parameters that join a run. Truth: the ratios given, and the weights they join with."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import selftune as st

BODY, HEAD = 1e-6, 1e-5
"""Learning rates given, a hundredfold and more below a good one."""


class FineTuning:
    """A body whose weights are given, and a head on it that is trained first."""

    def __init__(self, width: int = 32, **options: Any) -> None:
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 3)
        self.net = nn.Sequential(self.body, nn.ReLU(), self.head)
        self.x = torch.randn(512, 8)
        self.y = self.x[:, :3].abs()
        self.body.requires_grad_(False)
        groups: list[dict[str, Any]] = [
            {"params": list(self.body.parameters()), "lr": BODY},
            {"params": list(self.head.parameters()), "lr": HEAD},
        ]
        self.opt = st.AdamW(groups, total_steps=400, **options)

    def loss(self, part: Tensor) -> Tensor:
        return F.mse_loss(self.net(self.x[part]), self.y[part])

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.opt.zero_grad()
            self.loss(torch.randint(0, 448, (32,))).backward()
            self.opt.step()
            self.opt.hyper_step(lambda: self.loss(torch.arange(448, 512)))


def test_a_group_that_is_unfrozen_keeps_its_ratio_to_the_others() -> None:
    job = FineTuning()
    job.train(150)
    moved = job.opt.hparams
    assert moved["lr"] > 100 * HEAD
    before = job.loss(torch.arange(448, 512)).item()
    job.body.requires_grad_(True)
    body, head = job.opt.hparams["lr"]
    assert head == moved["lr"]
    assert body / head == pytest.approx(BODY / HEAD, rel=1e-9)
    assert job.opt.hparams["beta1"] == moved["beta1"]  # given alike, and so alike
    job.train(150)
    assert job.loss(torch.arange(448, 512)).item() < before


@pytest.mark.parametrize("per", ["run", "group", "tensor"])
def test_a_group_that_is_added_takes_up_the_factor_of_the_run(per: str) -> None:
    job = FineTuning(per=per)
    job.train(150)
    values = job.opt.hparams["lr"]
    moved = torch.tensor(values if isinstance(values, list) else [values]).log().mean().exp()
    late = nn.Linear(3, 3)
    job.net.append(late)
    job.opt.add_param_group({"params": late.parameters(), "lr": 0.3 * HEAD})
    assert job.opt.hparams["lr"][-1] == pytest.approx(0.3 * float(moved), rel=1e-6)
    job.train(20)


@pytest.mark.parametrize(
    "given",
    [
        nn.Module.parameters,
        lambda late: late,
        lambda late: [*late.parameters()],
        lambda late: late.weight,
    ],
)
@pytest.mark.parametrize("first", [nn.Module.parameters, lambda net: net])
def test_groups_are_added_as_parameters_or_as_a_module(given: Any, first: Any) -> None:
    """Torch refuses a group without names beside named ones. Truth: the gradients are followed."""
    net, late = nn.Linear(3, 3), nn.Linear(3, 1)
    opt = st.SGD(first(net), lr=0.1, probe=False)
    opt.add_param_group({"params": given(late)})
    before = late.weight.detach().clone()
    late(net(torch.ones(2, 3))).square().sum().backward()
    opt.step()
    assert not torch.equal(late.weight, before)
    assert len({"param_names" in g for g in opt.param_groups}) == 1
    assert all(len(g.get("param_names", g["params"])) == len(g["params"]) for g in opt.param_groups)


def test_parameters_that_join_a_group_take_its_present_values() -> None:
    """The applied rate, which the schedule has annealed, is not their peak."""
    job = FineTuning()
    groups = [{"params": list(job.net.parameters()), "lr": HEAD}]
    job.opt = st.AdamW(groups, total_steps=400)
    job.train(300)
    moved = job.opt.hparams
    job.body.requires_grad_(True)
    assert job.opt.hparams == moved


def test_averages_good_weights_and_age_begin_where_they_join() -> None:
    job = FineTuning()
    job.train(100)
    with torch.no_grad():
        for param in job.body.parameters():
            param.add_(0.01)  # loaded while the group is frozen
    joined = [p.clone() for p in job.body.parameters()]
    job.body.requires_grad_(True)
    state = job.opt.state_dict()["state"]  # makes the run's state of them
    for place, weights in enumerate(joined):
        entry = state[place]
        assert float(entry["step"]) == 0
        assert torch.equal(entry["average"], weights)
        assert torch.equal(entry["good"], weights)
    job.train(10)
    assert float(job.opt.state[job.body[0].weight]["step"]) == 10


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("width", [40, 150])
def test_the_slice_may_change_where_parameters_join(width: int, grouped: bool) -> None:
    """Larger nets keep sensitivities of a smaller share: those of the head are cut to it."""
    job = FineTuning(width)
    job.net.insert(2, nn.Linear(width, width))
    if not grouped:
        job.opt = st.AdamW(job.net.parameters(), lr=HEAD, total_steps=400)
    job.train(120)
    job.net.append(nn.Linear(3, 500))
    job.net.append(nn.Linear(500, 3))
    job.body.requires_grad_(True)
    job.opt.add_param_group({"params": job.net[4:].parameters()})
    before = job.loss(torch.arange(448, 512)).item()
    job.train(200)
    assert job.loss(torch.arange(448, 512)).item() < before


def test_a_rate_computed_from_the_tuned_ones_is_pointed_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As Lightning's BaseFinetuning computes it; the tuned factor would act twice."""
    job = FineTuning()
    job.train(150)
    extra = nn.Linear(3, 3)
    job.opt.add_param_group({"params": list(extra.parameters()), "lr": HEAD / 10})
    assert "tuned factor" not in caplog.text
    other = nn.Linear(3, 3)
    rate = job.opt.param_groups[1]["lr"] / 10
    job.opt.add_param_group({"params": list(other.parameters()), "lr": rate})
    assert "not one computed from param_groups" in caplog.text


def test_one_value_stands_for_groups_that_differ_everywhere() -> None:
    """Truth: the chart, whose value the explanation must end with."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    rows = st.monitor.InMemory()
    groups: list[dict[str, Any]] = [
        {"params": net[0].parameters(), "lr": 1e-3}, {"params": net[2].parameters(), "lr": 3e-3}
    ]  # fmt: skip
    opt = st.AdamW(groups, total_steps=60, log_dir=rows, tune=("lr",))
    for _ in range(60):
        opt.zero_grad()
        F.mse_loss(net(x), x.sum(1, keepdim=True)).backward()
        opt.step()
        opt.hyper_step(lambda: F.mse_loss(net(x), x.sum(1, keepdim=True)))
    opt.finish()
    assert "given 0.003 → " in opt.explain()
    assert f"{rows.curve('hyper/lr')[1][-1]:.3g}" in opt.explain()


class Running(nn.Module):
    """Subtracts a running mean, which training passes update."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.scale * (x - self.mean)


class Growing:
    """A second branch, with buffers, is called from step 21 on."""

    def __init__(self, joins: bool) -> None:
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        self.late = nn.Sequential(Running(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.net = nn.ModuleList([self.late, self.first])
        self.joins, self.calls = joins, 0
        params = self.first.parameters() if joins else self.net.parameters()
        self.opt = st.SGD(params, lr=0.01, probe=False, every=4, total_steps=100)

    def loss(self, seed: int, shift: float, late: bool) -> Tensor:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)) + shift
        self.calls += 1
        return (self.late(x) + self.first(x) if late else self.first(x)).sub(1).square().mean()

    def train(self, steps: range) -> None:
        for step in steps:
            if step == 21 and self.joins:
                self.opt.add_param_group({"params": list(self.late.parameters())})
            self.opt.zero_grad()
            self.loss(step, 0, step >= 21).backward()
            self.opt.step()
            before = [b.clone() for b in self.net.buffers()]
            self.opt.hyper_step(lambda step=step: self.loss(1000 + step, 3, step >= 21))
            for buffer, old in zip(self.net.buffers(), before, strict=True):
                assert torch.equal(buffer, old)


@pytest.mark.parametrize("joins", [True, False], ids=["joins", "is first called"])
def test_the_buffers_of_a_part_that_comes_later_are_kept_apart(joins: bool) -> None:
    """Truths: those before a validation pass; the data of these passes, at the averaged weights.

    No call of the closure is added.
    """
    job = Growing(joins)
    job.train(range(21))
    before = job.calls
    job.train(range(21, 81))
    assert job.calls == before + 60 + 15
    with job.opt.averaged(), torch.no_grad():
        x = torch.randn(4000, 4) + 3
        hidden = job.late[1](job.late[0].eval()(x))
        job.late[0].train()
        found = job.late[2].running_mean
        assert (found - hidden.mean(0)).abs().max() < (0.5 * hidden.std(0)).max()


@pytest.mark.parametrize("saved", [22, 30])
@pytest.mark.parametrize("joins", [True, False], ids=["joins", "is first called"])
def test_a_run_with_a_late_part_resumes(joins: bool, saved: int) -> None:
    """Saved before its first validation pass, or after it. Truth: the uninterrupted run."""
    whole, half, resumed = Growing(joins), Growing(joins), Growing(joins)
    whole.train(range(60))
    half.train(range(saved))
    resumed.net.load_state_dict(half.net.state_dict())
    if joins:
        resumed.opt.add_param_group({"params": list(resumed.late.parameters())})
        resumed.joins = False
    resumed.opt.load_state_dict(copy.deepcopy(half.opt.state_dict()))
    resumed.train(range(saved, 60))
    for job in (whole, resumed):
        job.opt.eval()
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[name]), name


@pytest.mark.parametrize("change", ["add", "copy", "unfreeze"])
def test_values_outside_the_bounds_stay_where_groups_join(change: str) -> None:
    """Truth: the value that was written; its bounds hold for tuning (it was clamped to them)."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    net[0].requires_grad_(False)
    opt = st.SGD(net, lr=0.01, momentum=0.9, total_steps=100, probe=False)
    for step in range(4):
        if step == 1:
            opt.param_groups[0]["momentum"] = 0.98
        if step == 2 and change == "add":
            opt.add_param_group({"params": nn.Linear(2, 2), "momentum": 0.5})
        elif step == 2 and change == "copy":
            net, opt = copy.deepcopy((net, opt))
        elif step == 2:
            net[0].requires_grad_(True)
        opt.zero_grad()
        net(torch.ones(2, 3)).square().mean().backward()
        opt.step()
    assert opt.param_groups[0]["momentum"] == 0.98


def test_a_parametrization_that_joins_replaces_its_parameter() -> None:
    """Truth: torch's SGD; the message names the step that torch does not need."""
    ends = []
    for make in (torch.optim.SGD, lambda p, lr: st.SGD(p, lr, tune=(), guard=False)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        opt = make(net.parameters(), 0.05)
        for step in range(20):
            if step == 10:
                old = net[2].weight
                parametrizations.weight_norm(net[2])
                new = list(net[2].parametrizations.parameters())
                if make is not torch.optim.SGD:
                    with pytest.raises(ValueError, match="remove that from its group first"):
                        opt.add_param_group({"params": new})
                group = opt.param_groups[0]
                group["params"] = [p for p in group["params"] if p is not old]
                opt.add_param_group({"params": new})
            opt.zero_grad()
            net(torch.ones(2, 4).double()).square().mean().backward()
            opt.step()
        ends.append([p.detach() for p in net.parameters()])
    for expected, found in zip(*ends, strict=True):
        torch.testing.assert_close(found, expected)
