"""Checks of the framework matrix: wrappers and checkpoints, memory, precision, order of calls."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tasks import dataset, equal, loss_of, network, tuned
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.checkpoint import checkpoint

from selftune.integrations import unwrap

# pieces


def steps(model: Any, opt: Any, count: int = 12, loss: Any = loss_of, scheduler: Any = None) -> Any:
    """Train on one batch a step; returns the weights."""
    x, y = dataset(16 * count, 3).tensors
    for batch in zip(x.split(16), y.split(16), strict=True):
        opt.zero_grad()
        loss(model, batch).backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()
        unwrap(opt).hyper_step(partial(loss, model, batch))
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@contextlib.contextmanager
def warnings_of_selftune() -> Iterator[list[str]]:
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("selftune")
    logger.addHandler(handler)
    found: list[str] = []
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        found += stream.getvalue().splitlines()


def usable(wrapper: Any) -> None:
    """The wrapper gives what is inside."""
    assert wrapper.hparams == unwrap(wrapper).hparams
    with wrapper.averaged():
        pass
    assert callable(wrapper.hyper_step)


def wrapped_by_lightning(usable: Callable[[Any], None], folder: Path) -> None:
    from lightning.pytorch.core.optimizer import LightningOptimizer

    opt = tuned(network())
    wrapper = LightningOptimizer(opt)
    assert unwrap(wrapper) is opt
    usable(wrapper)


def wrapped_by_fabric(usable: Callable[[Any], None], folder: Path) -> None:
    from lightning.fabric import Fabric

    model = network(norm=False)
    opt = tuned(model)
    _, wrapper = Fabric(accelerator="cpu", devices=1).setup(model, opt)
    assert unwrap(wrapper) is opt
    usable(wrapper)


def wrapped_by_accelerate(usable: Callable[[Any], None], folder: Path) -> None:
    from accelerate import Accelerator

    opt = tuned(network())
    wrapper = Accelerator(cpu=True).prepare(opt)
    assert unwrap(wrapper) is opt
    usable(wrapper)


def refused_by_accelerate(folder: Path) -> None:
    def read(wrapper: Any) -> None:
        with pytest.raises(AttributeError, match="'AcceleratedOptimizer' object has no attribute"):
            _ = wrapper.hparams

    wrapped_by_accelerate(read, folder)


def dcp_round_trip(folder: Path) -> None:
    """One process: hyperparameters and averages are those of before."""
    model, fresh = network(), network()
    opt, loaded = tuned(model), tuned(fresh)
    steps(model, opt)
    dcp.save({"opt": get_optimizer_state_dict(model, opt)}, checkpoint_id=folder, no_dist=True)
    state = {"opt": get_optimizer_state_dict(fresh, loaded)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(fresh, loaded, state["opt"])
    assert loaded.hparams == opt.hparams
    for one, other in zip(opt.state.values(), loaded.state.values(), strict=True):
        assert torch.equal(one["average"], other["average"])


# memory, precision, order of calls


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = network(norm=False), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.net(x)
        if self.reentrant:
            x = x.requires_grad_()
        hidden = checkpoint(self.net[:3], x, use_reentrant=self.reentrant)
        return self.net[3](hidden)


def checkpointing(reentrant: bool, folder: Path) -> None:
    """Truth: the same without; or a refusal that names it."""
    ends, refusal = [], ""
    for kind in (None, reentrant):
        model = Checkpointed(kind)
        opt = tuned(model, probe=False)
        try:
            ends.append((steps(model, opt), opt.hparams))
        except (RuntimeError, ValueError) as error:
            refusal = str(error)
    if refusal:
        assert "checkpoint" in refusal
        return
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def skipped_first_step(folder: Path) -> None:
    """A scaler's first step overflows: hyper_step has nothing to do."""
    model = network()
    opt, scaler = tuned(model), torch.amp.GradScaler("cpu", init_scale=2.0**120)
    x, y = dataset(16, 3).tensors
    scaler.scale(1e5 * loss_of(model, (x, y))).backward()
    scaler.step(opt)
    scaler.update()
    assert opt.hyper_step(lambda: loss_of(model, (x, y))) is None


def hyper_step_while_accumulating(folder: Path) -> None:
    model = network()
    opt = tuned(model)
    x, y = dataset(16, 3).tensors
    loss_of(model, (x, y)).backward()
    assert opt.hyper_step(lambda: loss_of(model, (x, y))) is None


def saved_inside_averaged(folder: Path) -> None:
    """Truth: the state saved outside, BatchNorm's statistics included."""
    model = network()
    opt = tuned(model)
    steps(model, opt)

    def statistics() -> list[torch.Tensor]:
        run = io.BytesIO(opt.state_dict()["param_groups"][0]["selftune"])
        return torch.load(run, weights_only=True)["buffers"]["average"]

    outside = statistics()
    with opt.averaged():
        inside = statistics()
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


def loaded_inside_averaged(folder: Path) -> None:
    """Weights loaded inside are there afterwards, or loading is refused."""
    model, other = network(), network()
    opt = tuned(model)
    steps(model, opt)
    state = {n: t + 1 for n, t in other.state_dict().items()}
    with contextlib.suppress(RuntimeError):
        with opt.averaged():
            model.load_state_dict(state)
        assert equal(dict(model.state_dict()), state)


def annealed_twice(folder: Path) -> None:
    model = network()
    opt = tuned(model)
    with warnings_of_selftune() as found:
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, 24)
        steps(model, opt, scheduler=schedule)
    assert any("twice" in line or "scheduler" in line for line in found)


def constant_scheduler(folder: Path) -> None:
    """Truth: the run without a scheduler."""
    ends = []
    for scheduled in (False, True):
        model = network()
        opt = tuned(model)
        schedule = torch.optim.lr_scheduler.ConstantLR(opt, 1.0) if scheduled else None
        ends.append((steps(model, opt, scheduler=schedule), opt.hparams["lr"]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def shown_rate(folder: Path) -> None:
    """param_groups show the rate that is applied: at the end of a linear schedule about 0."""
    model = network()
    opt = tuned(model, total_steps=12)
    steps(model, opt, 12)
    assert float(opt.param_groups[0]["lr"]) < 0.2 * float(opt.hparams["lr"])


def compiled_step(folder: Path) -> None:
    """Truth: steps that are not compiled; or a refusal by name, not the compiler's own failure."""
    ends, refusal = [], ""
    for compiled in (False, True):
        model = network(norm=False)
        opt = tuned(model)
        if compiled:
            opt.step = torch.compile(opt.step, backend="aot_eager")
        try:
            ends.append(steps(model, opt))
        except torch._dynamo.exc.TorchDynamoException:
            raise
        except (RuntimeError, TypeError) as error:
            refusal = str(error)
    assert "torch.compile" in refusal or torch.equal(*ends)
