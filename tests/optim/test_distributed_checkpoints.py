"""Checkpoints of torch.distributed. Truth: the uninterrupted run; on other ranks, to rounding."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.functional import cross_entropy

import selftune as st

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
HALF, END = 30, 55
MAKES: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda net: st.SGD(net, lr=0.02, momentum=0.9),
    "AdamW, sliced": lambda net: st.AdamW(net, lr=0.01, tangents=1 / 3, snapshots="device"),
    "NAdam": lambda net: st.SelfTuning(torch.optim.NAdam(net.parameters(), lr=0.01)),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 301), nn.Linear(301, 2))


def train(net: nn.Module, opt: Any, steps: range, rank: int = 0) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, xv = torch.randn(2, 16, 5, generator=generator)
        x, xv = x[rank::world], xv[rank::world]
        opt.zero_grad()
        cross_entropy(net(x), (x.sum(1) > 0).long()).backward()
        opt.step()
        opt.hyper_step(lambda xv=xv: cross_entropy(net(xv), (xv.sum(1) > 0).long()))


def end(net: nn.Module, opt: Any) -> dict[str, Any]:
    """Hyperparameters, averaged weights and training weights, whole on every rank."""

    def flat() -> Tensor:
        wholes = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in net.parameters()]
        return torch.cat([w.reshape(-1) for w in wholes])

    with opt.averaged():
        averaged = flat()
    return {"hparams": opt.hparams, "averaged": averaged, "weights": flat()}


def plainly(net: nn.Module, opt: Any) -> dict[str, Any]:
    return {"model": net.state_dict(), "optim": opt.state_dict()}


def by_names(net: nn.Module, opt: Any) -> dict[str, Any]:
    model, optim = get_state_dict(net, opt)
    return {"model": model, "optim": optim}


def flattened(net: nn.Module, opt: Any) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optim = get_state_dict(net, opt, options=options)
    return {"model": model, "optim": optim}


def load(how: Callable, net: nn.Module, opt: Any, path: Path) -> None:
    state = how(net, opt)
    dcp.load(state, checkpoint_id=path)
    if how is plainly:
        net.load_state_dict(state["model"])
        opt.load_state_dict(state["optim"])
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=how is flattened)
        set_state_dict(
            net, opt, model_state_dict=state["model"], optim_state_dict=state["optim"],
            options=options,
        )  # fmt: skip


def test_a_state_of_evaluation_mode(tmp_path: Path) -> None:
    """Truth: a run without evaluation; and a refusal that says how."""
    net = network()
    opt = MAKES["SGD"](net)
    train(net, opt, range(HALF))
    opt.eval()
    dcp.save(by_names(net, opt), checkpoint_id=tmp_path)
    opt.train()
    train(net, opt, range(HALF, END))
    want = end(net, opt)
    net = network()
    with pytest.raises(ValueError, match="before get_state_dict"):
        load(by_names, net, MAKES["SGD"](net), tmp_path)
    net = network()
    opt = MAKES["SGD"](net)
    opt.eval()
    load(by_names, net, opt, tmp_path)
    opt.train()
    train(net, opt, range(HALF, END))
    found = end(net, opt)
    assert found["hparams"] == want["hparams"]
    assert torch.equal(found["weights"], want["weights"])


@pytest.mark.parametrize("how", [plainly, by_names, flattened])
@pytest.mark.parametrize("name", MAKES)
def test_one_process_goes_on_bit_for_bit(name: str, how: Callable, tmp_path: Path) -> None:
    if name == "NAdam" and how is not by_names:
        pytest.skip("the state of torch's own optimizer begins with its first step")
    net = network()
    opt = MAKES[name](net)
    train(net, opt, range(HALF))
    dcp.save(how(net, opt), checkpoint_id=tmp_path)
    train(net, opt, range(HALF, END))
    want = end(net, opt)
    net = network()
    opt = MAKES[name](net)
    load(how, net, opt, tmp_path)
    train(net, opt, range(HALF, END))
    torch.testing.assert_close(end(net, opt), want, rtol=0, atol=0)


# shards; processes cost seconds, so that all that two of them do is done by one test


def sharded() -> nn.Module:
    net = network()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net:
        if isinstance(layer, nn.Linear):
            dist.fsdp.fully_shard(layer, mesh=mesh)
    return dist.fsdp.fully_shard(net, mesh=mesh)


@contextmanager
def processes(rank: int, world: int, port: int) -> Iterator[None]:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), USE_LIBUV="0")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    yield
    dist.destroy_process_group()


def mixture(net: nn.Module) -> st.Mixture:
    rules = [st.rules.SGD(), st.rules.AdamW()]
    return st.Mixture(net, rules, lr=0.02, tangents=1 / 3, total_steps=80)


def chosen(rank: int, port: int, folder: Path) -> None:
    """A full state of a mixture after its choice, whose state no new one has."""
    torch.set_num_threads(1)
    with processes(rank, 2, port):
        net = sharded()
        opt = mixture(net)
        train(net, opt, range(HALF), rank)
        assert opt.rule is not None
        states = get_state_dict(net, opt, options=StateDictOptions(full_state_dict=True))
        torch.save(states, folder / "full.pt" if rank == 0 else os.devnull)
        train(net, opt, range(HALF, END), rank)
        dist.barrier()
        ends = resume("Mixture", rank, folder, full=True), end(net, opt)
        torch.save(ends, folder / f"{rank}.pt")
        dist.barrier()
    os._exit(0)


@pytest.mark.slow
def test_shards_of_a_mixture_after_its_choice(tmp_path: Path) -> None:
    mp.spawn(chosen, (a_port(), tmp_path), nprocs=2)
    for rank in range(2):
        got, want = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def save(name: str, rank: int, folder: Path) -> None:
    """Half a run, saved in both ways, and the whole of it."""
    net = sharded()
    opt = MAKES[name](net)
    train(net, opt, range(HALF), rank)
    dcp.save(by_names(net, opt), checkpoint_id=folder / "dcp")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optim = get_state_dict(net, opt, options=options)
    if rank == 0:
        torch.save([model, optim], folder / "full.pt")
    train(net, opt, range(HALF, END), rank)
    want = end(net, opt)
    if rank == 0:
        torch.save(want, folder / "want.pt")
    dist.barrier()


def resume(name: str, rank: int, folder: Path, full: bool) -> dict[str, Any]:
    net = sharded()
    opt = {**MAKES, "Mixture": mixture}[name](net)
    if full:
        model, optim = torch.load(folder / "full.pt", weights_only=True)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(net, model, options=options)
        set_optimizer_state_dict(net, opt, optim, options=options)
    else:
        load(by_names, net, opt, folder / "dcp")
    train(net, opt, range(HALF, END), rank)
    return end(net, opt)


def two(rank: int, port: int, name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    with processes(rank, 2, port):
        save(name, rank, folder / "two")
        for place, full in [("two", False), ("two", True), ("one", False), ("one", True)]:
            got = resume(name, rank, folder / place, full)
            if rank == 0:
                torch.save(got, folder / place / f"by two, {full}.pt")
        dist.barrier()
    os._exit(0)  # torch's threads may abort the interpreter's end ("terminate called without …")


def unvalidated(rank: int, port: int, folder: Path) -> None:
    """A run without ``hyper_step``, saved between two steps that training gradients make."""

    def go_on(steps: range) -> None:
        for step in steps:
            x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))[rank::2]
            opt.zero_grad()
            cross_entropy(net(x), (x.sum(1) > 0).long()).backward()
            opt.step()

    torch.set_num_threads(1)
    with processes(rank, 2, port):
        net = sharded()
        opt = st.SGD(net, lr=0.02, momentum=0.9, probe=False)
        go_on(range(77))
        dcp.save(by_names(net, opt), checkpoint_id=folder / "dcp")
        go_on(range(77, 120))
        want = end(net, opt)
        net = sharded()
        opt = st.SGD(net, lr=0.02, momentum=0.9, probe=False)
        load(by_names, net, opt, folder / "dcp")
        go_on(range(77, 120))
        torch.save([end(net, opt), want], folder / f"{rank}.pt")
        dist.barrier()
    os._exit(0)


@pytest.mark.slow
def test_shards_without_hyper_step(tmp_path: Path) -> None:
    """Rank 0's sum of training signals was loaded on all."""
    mp.spawn(unvalidated, (a_port(), tmp_path), nprocs=2)
    for rank in range(2):
        got, want = torch.load(tmp_path / f"{rank}.pt")
        assert want["hparams"]["lr"] != pytest.approx(0.02)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def a_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKES)
def test_shards_go_on_also_on_other_ranks(name: str, tmp_path: Path) -> None:
    about = dict(rtol=1e-4, atol=1e-5)  # sums in another order, amplified over 25 steps
    one, both = tmp_path / "one", tmp_path / "two"
    for folder in (one, both):
        folder.mkdir()
    with processes(0, 1, a_port()):
        save(name, 0, one)
    mp.spawn(two, (a_port(), name, tmp_path), nprocs=2)
    want = torch.load(both / "want.pt")
    for full in (False, True):
        got = torch.load(both / f"by two, {full}.pt")
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        got = torch.load(one / f"by two, {full}.pt")
        torch.testing.assert_close(got, torch.load(one / "want.pt"), **about)
    with processes(0, 1, a_port()):
        for full in (False, True):
            torch.testing.assert_close(resume(name, 0, both, full), want, **about)
    # One plain process, without any sharding, keeps the same and goes on from it.
    net = network()
    opt = MAKES[name](net)
    train(net, opt, range(HALF))
    model, optim = torch.load(both / "full.pt", weights_only=True)
    for fqn, entry in get_optimizer_state_dict(net, opt)["state"].items():
        torch.testing.assert_close(optim["state"][fqn], entry, rtol=1e-3, atol=1e-6, equal_nan=True)
    net.load_state_dict(model)
    set_optimizer_state_dict(net, opt, optim)
    train(net, opt, range(HALF, END))
    torch.testing.assert_close(end(net, opt), want, **about)
