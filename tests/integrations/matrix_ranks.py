"""Rows of the framework matrix that take two processes."""

from __future__ import annotations

import datetime
import os
import socket
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tasks import dataset, loss_of, network, tuned
from torch import nn

import selftune as st


def a_port() -> int:
    """A free one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        found: int = free.getsockname()[1]
    return found


def begin(rank: int, port: int, seconds: int = 60) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), USE_LIBUV="0")
    wait = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=wait)


def train(model: nn.Module, opt: Any, count: int, rank: int, world: int) -> None:
    x, y = dataset(16 * count, 3).tensors
    for whole in zip(x.split(16), y.split(16), strict=True):
        batch = [t[rank::world] for t in whole]
        opt.zero_grad()
        loss_of(model, batch).backward()
        opt.step()
        if hasattr(opt, "hyper_step"):
            opt.hyper_step(lambda batch=batch: loss_of(model, batch))


def union(rank: int, port: int, folder: str) -> None:
    """Hyperparameters of two ranks are those of one process on both halves."""
    alone = network(norm=False)
    expected = tuned(alone, total_steps=100, distributed=False)
    train(alone, expected, 100, 0, 1)
    begin(rank, port)
    model = network(norm=False)
    opt = tuned(model, total_steps=100)
    train(nn.parallel.DistributedDataParallel(model), opt, 100, rank, 2)
    for name, value in expected.hparams.items():
        assert abs(opt.hparams[name] - value) <= 1e-6 * abs(value), name
    dist.destroy_process_group()


def one_rank(rank: int, port: int, folder: str) -> None:
    """The rank that calls alone is told so within seconds; the timeout is a minute."""
    begin(rank, port, seconds=60)
    model = network(norm=False)
    opt = tuned(model, probe=False)
    x, y = dataset(16, 3).tensors
    loss_of(nn.parallel.DistributedDataParallel(model), (x, y)).backward()
    opt.step()
    if rank == 1:
        time.sleep(17)
        return
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank.* 1"):
        opt.hyper_step(lambda: loss_of(model, (x, y)))
    assert time.monotonic() - start < 15


def zero(rank: int, port: int, folder: str) -> None:
    """Refused by name, on all ranks."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    begin(rank, port)
    model = network(norm=False)
    opt = ZeroRedundancyOptimizer(model.parameters(), st.AdamW, lr=0.01)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="in place of ZeroRedundancyOptimizer"):
        train(wrapped, opt, 1, rank, 2)


def fsdp2(rank: int, port: int, folder: str) -> None:
    """A full optimizer state, gathered and loaded again."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    begin(rank, port)
    options = StateDictOptions(full_state_dict=True)
    model, fresh = network(norm=False), network(norm=False)
    for one in (model, fresh):
        fully_shard(one)
    opt, loaded = tuned(model), tuned(fresh)
    train(model, opt, 12, rank, 2)
    state = get_optimizer_state_dict(model, opt, options=options)
    set_optimizer_state_dict(fresh, loaded, state, options=options)
    assert loaded.hparams == opt.hparams
    dist.destroy_process_group()


RANKED = {"union": union, "one rank": one_rank, "zero": zero, "fsdp2": fsdp2}
