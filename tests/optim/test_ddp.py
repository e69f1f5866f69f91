"""Two processes with DistributedDataParallel. Truth: ranks agree; one process on all the data."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
]


def batches(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, xv = torch.randn(2, 16, 4, generator=generator)
    return x, (x.sum(1) > 0).long(), xv, (xv.sum(1) > 0.3).long()


def run(rank: int, world: int, port: int, folder: str) -> None:
    """Two runs in one process group, validating with the wrapped model and with the bare one."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), USE_LIBUV="0")
        dist.init_process_group("gloo", rank=rank, world_size=world)
    ends = [train(rank, world, wrapped) for wrapped in (True, False)]
    torch.save(ends, Path(folder) / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def train(rank: int, world: int, wrapped: bool) -> dict[str, Any]:
    """Train 60 steps on this rank's share of every batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    opt = st.SGD(net.parameters(), lr=0.01, momentum=0.5)
    for step in range(60):
        x, y, xv, yv = (t[rank::world] for t in batches(step))
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()
        outer = model if wrapped else net
        opt.hyper_step(lambda outer=outer, xv=xv, yv=yv: cross_entropy(outer(xv), yv))
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    return {"hparams": opt.hparams, "weights": flat}


def test_10_every_rank_takes_the_same_hyper_step(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(run, (2, port, str(tmp_path)), nprocs=2)
    run(0, 1, 0, str(tmp_path))
    files = ("2-0.pt", "2-1.pt", "1-0.pt")
    for one, two, alone in zip(*(torch.load(tmp_path / f) for f in files), strict=True):
        assert one["hparams"]["lr"] != pytest.approx(0.01)
        assert one["hparams"] == two["hparams"]
        assert torch.equal(one["weights"], two["weights"])
        # Halves of a batch averaged equal the whole batch up to float32 rounding.
        for name, value in alone["hparams"].items():
            assert one["hparams"][name] == pytest.approx(value, rel=1e-5)
