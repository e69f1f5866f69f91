"""FSDP2. Truth: the same run in one process that holds all parameters."""

import copy
import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st

pytestmark = pytest.mark.slow  # two processes that each import torch


def batches(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, xv = torch.randn(2, 16, 4, generator=generator)
    return x, (x.sum(1) > 0).long(), xv, (xv.sum(1) > 0.3).long()


SAVED = (3, 6, 9, 12, 15, 18, 30)
"""Steps at which a run is saved and loaded, most of them within the learning-rate sweep."""
MAKES: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda net: st.SGD(net.parameters(), lr=0.01, momentum=0.5),
    "AdamW": lambda net: st.AdamW(net.parameters(), lr=0.01),
}


def run(rank: int, world: int, port: int, folder: str) -> None:
    """Everything that a rank is to do."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), USE_LIBUV="0")
        dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {name: train(rank, world, make) for name, make in MAKES.items()}
    found["sampled"] = train(rank, world, MAKES["SGD"], wide=True)
    if world > 1:
        found["partly"] = partly()
        found |= {f"{n}, offloaded": train(rank, world, make, True) for n, make in MAKES.items()}
        dist.destroy_process_group()
    torch.save(found, Path(folder) / f"{world}-{rank}.pt")


def partly() -> str:
    """What is said of a model of which one layer alone is sharded."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    dist.fsdp.fully_shard(net[0], mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    opt = st.SGD(net.parameters(), lr=0.01)
    net(torch.ones(2, 4)).sum().backward()
    try:
        opt.step()
    except ValueError as error:
        return str(error)
    return "accepted"


def train(
    rank: int, world: int, make: Callable[[nn.Module], Any], offload: bool = False,
    wide: bool = False,
) -> Any:  # fmt: skip
    """Probe and tune for 60 steps on this rank's share of every batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    if wide:  # the sweep measures slopes along a sample of the weights, other steps too
        hidden = nn.Linear(130, 131)
        net = nn.Sequential(nn.Linear(4, 130), nn.Tanh(), hidden, nn.Tanh(), nn.Linear(131, 2))
        net = net.double()
    if world > 1:
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        policy = dist.fsdp.CPUOffloadPolicy(pin_memory=False)  # pinned for GPUs alone
        dist.fsdp.fully_shard(net, mesh=mesh, **({"offload_policy": policy} if offload else {}))
    opt = make(net)
    losses, (xw, yw, *_) = {}, batches(-1)  # the same batch for all ranks
    for step in range(60):
        x, y, xv, yv = (t[rank::world] for t in batches(step))
        x, xv, xw = (t.to(next(net.parameters()).dtype) for t in (x, xv, xw))
        if step in SAVED and world > 1:  # each rank saves its own part
            torch.save(opt.state_dict(), file := io.BytesIO())
            file.seek(0)
            opt.load_state_dict(copy.deepcopy(torch.load(file, weights_only=False)))
        opt.zero_grad()
        cross_entropy(net(x), y).backward()
        opt.step()
        opt.hyper_step(lambda xv=xv, yv=yv: cross_entropy(net(xv), yv))
        with torch.no_grad():  # the outermost module stays gathered
            with opt.averaged():
                losses[f"average {step}"] = float(cross_entropy(net(xw), yw))
            losses[f"training {step}"] = float(cross_entropy(net(xw), yw))
    return {**opt.hparams, **losses}


def test_sharded_parameters_tune_as_whole_ones_do(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(run, (2, port, str(tmp_path)), nprocs=2)
    run(0, 1, 0, str(tmp_path))
    alone, one, two = (torch.load(tmp_path / f) for f in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert one == two
    assert "others are whole on each" in one["partly"]
    assert one["sampled"] == pytest.approx(alone["sampled"], rel=1e-7)
    for rule in MAKES:
        assert one[f"{rule}, offloaded"] == one[rule]
        assert one[rule]["lr"] != pytest.approx(0.01)
        for name, value in alone[rule].items():  # float32 sums in another order
            assert one[rule][name] == pytest.approx(value, rel=1e-3 if rule == "AdamW" else 1e-4)
