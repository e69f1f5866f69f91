"""Processes that train together. Truth: one process on all the data; errors that name ranks."""

import copy
import math
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import selftune as st
from selftune.monitor import JSONL, read_jsonl

pytestmark = pytest.mark.slow  # two processes that each import torch
MAKES: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda net: st.SGD(net, lr=0.01, momentum=0.5),
    "AdamW": lambda net: st.AdamW(net, lr=0.003),
    "sliced": lambda net: st.SGD(net, lr=0.01, momentum=0.9, tangents=1 / 4),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 130), nn.Tanh(), nn.Linear(130, 130), nn.Linear(130, 2))


def train(
    net: nn.Module, opt: Any, steps: int, *, validate: bool = True, bare: bool = False
) -> dict[str, Any]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    outer = net.module if bare else net
    for step in range(steps):
        x, xv = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(step)).double()
        x, xv = x[rank::world], xv[rank::world]
        opt.zero_grad()
        cross_entropy(net(x), (x.sum(1) > 0).long()).backward()
        opt.step()
        if validate:
            opt.hyper_step(lambda xv=xv: cross_entropy(outer(xv), (xv.sum(1) > 0.3).long()))
    return dict(opt.hparams)


def refused(call: Callable[[], Any]) -> list[Any]:
    begun = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        return [str(error), time.monotonic() - begun]
    return ["nothing", 0.0]


class Overflow(torch.autograd.Function):
    """Passes a number on; its gradient is infinite beyond a scale, as in float16."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if float(grad) <= 100 else grad * torch.inf


def overflowing(rank: int) -> list[Any]:
    """The scaled validation gradient of one rank overflows; a pass is one of all ranks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model, opt = DistributedDataParallel(net), st.SGD(net, lr=0.01, probe=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(20):
        opt.zero_grad()
        x, xv = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(step))
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(opt)
        scaler.update()

        def loss(xv: Tensor = xv) -> Tensor:
            value = model(xv).square().mean()
            return Overflow.apply(value) if rank else value

        opt.hyper_step(loss, scaler=scaler)
    return [opt.hparams["lr"], float(net[0].weight.detach().sum())]


def two(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), USE_LIBUV="0")
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    for name, make in MAKES.items():
        net = network().double()
        found[name] = train(DistributedDataParallel(net), make(net), 100)
        net = network().double()
        found[f"{name}, bare"] = train(DistributedDataParallel(net), make(net), 100, bare=True)

    net = network().double()
    zero = ZeroRedundancyOptimizer(net.parameters(), st.SGD, lr=0.01)
    model = DistributedDataParallel(net)
    cross_entropy(model(torch.ones(4, 4).double()), torch.zeros(4).long()).backward()
    found["zero"] = refused(zero.step)

    net = network().double()
    with torch.no_grad():
        net[0].weight += rank
    opt = st.SGD(net, lr=0.01)
    cross_entropy(net(torch.ones(4, 4).double()), torch.zeros(4).long()).backward()
    found["weights"] = refused(opt.step)
    found["alone"] = train(net, st.SGD(net, lr=0.01, distributed=False), 3)

    found["overflow"] = overflowing(rank)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(9, 9), st.nn.Dropout(0.5)))
    found["dropped"] = [model(torch.ones(4, 9)) == 0 for _ in range(2)][1]
    net = network().double()
    opt, model = st.SGD(net, lr=0.01), DistributedDataParallel(net)
    train(model, opt, 40)
    state = opt.state_dict()
    other = network().double()
    with torch.no_grad():
        other[0].weight += rank
    opt = st.SGD(other, lr=0.01)
    opt.load_state_dict(copy.deepcopy(state))
    cross_entropy(other(torch.ones(4, 4).double()), torch.zeros(4).long()).backward()
    found["resumed weights"] = refused(opt.step)

    twins = [network().double() for _ in range(2)]  # as two critics
    pairs = [(DistributedDataParallel(n), st.SGD(n, lr=0.01)) for n in twins]
    for model, opt in pairs:
        opt.load_state_dict(copy.deepcopy(state))  # of a run that has been validated on both ranks
        train(model, opt, 9, validate=False)
    found["one rank"] = refused(lambda: [
        train(*pair, 1, validate=rank == 0 or place == 1) for place, pair in enumerate(pairs)
    ])  # fmt: skip
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)  # the other rank may hang in what was never answered


def apart(rank: int, port: int, folder: Path) -> None:
    """One of two processes stops to call ``hyper_step`` in the middle of a run."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), USE_LIBUV="0")
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=20))
    net = network().double()
    opt, model = st.SGD(net, lr=0.01), DistributedDataParallel(net)
    train(model, opt, 60)
    torch.save(refused(lambda: train(model, opt, 60, validate=rank == 0)), folder / f"{rank}.pt")
    os._exit(0)


def test_a_process_that_stops_tuning_is_named(tmp_path: Path) -> None:
    """Without a meeting, its training gradients would be taken for the validation losses."""
    spawned(apart, tmp_path)
    message, seconds = torch.load(tmp_path / "0.pt")
    assert "hyper_step was called on rank 0" in message
    assert "not on rank 1 within 20 s" in message
    assert seconds < 40


def spawned(work: Callable[..., None], folder: Path) -> None:
    """Run two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = mp.spawn(work, (port, folder), nprocs=2, join=False)
    for process in context.processes:
        process.join(240)


def test_two_processes(tmp_path: Path) -> None:
    spawned(two, tmp_path)
    zero, one = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    for name, make in MAKES.items():
        net = network().double()
        want = train(net, make(net), 100)
        assert want["lr"] != pytest.approx(0.01)
        for run in (name, f"{name}, bare"):  # validated with the wrapped model, and without
            assert zero[run] == one[run]
            for key, value in want.items():
                assert zero[run][key] == pytest.approx(value, rel=1e-6)
    for found in (zero, one):
        assert "params on rank" in found["zero"][0]
        assert "params on rank" in found["weights"][0]
        assert "fully_shard" in found["zero"][0]
        assert "params on rank" in found["resumed weights"][0]
    assert zero["overflow"] == one["overflow"]
    assert zero["overflow"][0] != pytest.approx(0.01)
    # Torch makes buffers, and so the counters of random numbers, equal on all ranks.
    assert not torch.equal(zero["dropped"], one["dropped"])
    message, seconds = zero["one rank"]
    assert "hyper_step was called on rank 0" in message
    assert "not on rank 1 within" in message
    assert seconds < 15


def again(rank: int, port: int, folder: Path) -> None:
    """A loop catches the error of a validation batch, and takes the next one at the same step."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), USE_LIBUV="0")
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=10))
    net = network().double()
    log_dir = JSONL(folder / "run.jsonl")
    opt = st.SGD(net, lr=0.01, probe=False, every=1, log_dir=log_dir)
    model = DistributedDataParallel(net)
    train(model, opt, 9)
    train(model, opt, 1, validate=False)
    x = torch.ones(4, next(net.parameters()).shape[1], dtype=torch.float64)
    lost = 0
    for scale in (math.nan, 1.0):
        try:
            opt.hyper_step(lambda scale=scale: scale * net(x).square().mean())
        except ValueError:
            lost += 1
    opt.finish()
    torch.save((lost, opt.hparams), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_calls_at_one_step_meet_again(tmp_path: Path) -> None:
    """One process passed the first meeting's mark, the other waited for ever."""
    spawned(again, tmp_path)
    zero, one = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    assert zero == one
    rows = read_jsonl(tmp_path / "run.jsonl")  # of one process alone
    rates = [row["step"] for row in rows if row.get("tag") == "hyper/lr"]
    assert len(rates) == len(set(rates)) > 5
