"""The framework matrix: every row holds, or raises an error that says why; none is silent.

A row names its check here, or the test that is it. Rows that wait for the optimizers are strict
xfails. The table is printed in docs/integrations/index.md. Truth: named by each row.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tasks import dataset, equal, loss_of, needs, network, tuned
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import selftune as st
from selftune.integrations import unwrap

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "integrations" / "index.md"
Check = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A behaviour.

    Attributes:
        what: It, in words.
        truth: Its comparison.
        check: The check; or the name of the test that is it.
        refused: Whether it raises an error that says why.
        slow: Whether it takes seconds.
    """

    what: str
    truth: str
    check: Check | str
    refused: bool = False
    slow: bool = False

    @property
    def state(self) -> str:
        return "refused" if self.refused else "holds"


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


# any optimizer

SKIPPED = {
    "adahessian": "needs backward(create_graph=True)",
    "bnb": "CUDA", "fused": "CUDA", "SparseAdam": "takes sparse gradients alone",
}  # fmt: skip


def torch_optimizers() -> dict[str, Callable[[nn.Module], Any]]:
    kinds = {n: k for n, k in vars(torch.optim).items() if isinstance(k, type)}
    subs = {n: k for n, k in kinds.items() if issubclass(k, torch.optim.Optimizer)}
    del subs["Optimizer"]
    return {n: lambda m, k=k: k(m.parameters(), lr=1e-3) for n, k in subs.items()}


def timm_optimizers() -> dict[str, Callable[[nn.Module], Any]]:
    from timm.optim import create_optimizer_v2, list_optimizers

    return {n: lambda m, n=n: create_optimizer_v2(m, opt=n, lr=1e-3) for n in list_optimizers()}


def torchao_optimizers() -> dict[str, Callable[[nn.Module], Any]]:
    from torchao import optim

    names = ("Adam8bit", "AdamW8bit", "AdamW4bit", "AdamWFp8")
    return {n: lambda m, n=n: getattr(optim, n)(m.parameters(), lr=1e-3) for n in names}


def matrices(width: int = 12) -> nn.Module:
    """Weights of two dimensions alone, for Muon."""
    torch.manual_seed(0)
    first, last = nn.Linear(5, width, bias=False), nn.Linear(width, 2, bias=False)
    return nn.Sequential(first, nn.Tanh(), last)


def inside_selftuning(
    optimizers: Callable[[], dict[str, Callable[[nn.Module], Any]]],
    only: Any,
    folder: Path,
    width: int = 12,
) -> None:
    """Untuned, the inner optimizer's own weights; tuned, finite ones and another rate."""
    found = optimizers()
    names = [n for n in found if only(n) and not any(n.startswith(s) for s in SKIPPED)]
    assert names
    for name in names:
        plain, same, other = (matrices(width) for _ in range(3))
        inner = found[name](plain)
        torch.manual_seed(1)  # kron draws
        x, y = dataset(16 * 12, 3).tensors
        for batch in zip(x.split(16), y.split(16), strict=True):
            inner.zero_grad()
            loss_of(plain, batch).backward()
            inner.step()
        expected = nn.utils.parameters_to_vector(plain.parameters())
        untuned = st.SelfTuning(found[name](same), tune=(), probe=False, guard=False)
        torch.manual_seed(1)
        assert torch.equal(steps(same, untuned), expected), name
        opt = st.SelfTuning(found[name](other), total_steps=40, every=2, probe=False)
        assert bool(torch.isfinite(steps(other, opt)).all()), name
        assert opt.hparams["lr"] != pytest.approx(1e-3), name


def quantized(folder: Path) -> None:
    """Weights enough that torchao quantizes the state, without compiling its step."""
    torch.compiler.set_stance("force_eager")
    try:
        inside_selftuning(torchao_optimizers, lambda n: True, folder, width=1024)
    finally:
        torch.compiler.set_stance("default")


def lbfgs(folder: Path) -> None:
    with pytest.raises(TypeError, match="evaluates the loss several times"):
        st.SelfTuning(torch.optim.LBFGS(matrices().parameters()))


def lora(folder: Path) -> None:
    """Truth: the same two factors by hand, without peft."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(matrices(), LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    one = {n: p for n, p in model.named_parameters() if p.requires_grad}
    down, up = (p.detach().clone().requires_grad_() for p in one.values())
    base = matrices()

    def by_hand(_: Any, batch: Any) -> Tensor:
        x, y = batch
        hidden = base[0](x) + x @ down.T @ up.T
        return cross_entropy(base[2](base[1](hidden)), y)

    factors = nn.ParameterList([down, up])
    opts = [st.AdamW(ps, lr=0.01, total_steps=40, every=2) for ps in (one.values(), [down, up])]
    steps(model, opts[0])
    steps(factors, opts[1], loss=by_hand)
    assert opts[0].hparams["lr"] == pytest.approx(opts[1].hparams["lr"], rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.values(), factors, strict=True))


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


# processes


ROWS = [
    Row(what="Lightning: clipping, accumulation, bf16-mixed", truth="the loop by hand, bit for bit",
        check="test_lightning.py::test_as_the_loop_by_hand"),
    Row(what="Lightning: float16 with a scaler",
        truth="results are finite, and hyperparameters are tuned",
        check="test_lightning.py::test_16_mixed_on_the_cpu"),
    Row(what="Lightning: checkpoint and resume", truth="the uninterrupted run, bit for bit",
        check="test_lightning.py::test_resumed_run_is_the_uninterrupted_one"),
    Row(what="Lightning: score of a checkpoint", truth="the file's weights, scored by hand",
        check="test_lightning.py::test_score_is_that_of_the_weights_in_the_file"),
    Row(what="Lightning: early stopping", truth="the loop by hand with the same number of epochs",
        check="test_lightning.py::test_early_stopping"),
    Row(what="Lightning: DDP, two processes", truth="DDP by hand, bit for bit",
        check="test_lightning.py::test_two_processes"),
    Row(what="HF Trainer: clipping, accumulation, bf16", truth="the loop by hand, bit for bit",
        check="test_transformers.py::test_as_the_loop_by_hand"),
    Row(what="HF Trainer: checkpoint and resume", truth="the uninterrupted run, bit for bit",
        check="test_transformers.py::test_resumed_run_is_the_uninterrupted_one"),
    Row(what="HF Trainer: score of a checkpoint", truth="the file's weights, scored by hand",
        check="test_transformers.py::test_score_is_that_of_the_weights_in_the_file"),
    Row(what="HF Trainer: best model at the end, early stopping", truth="the best file's weights",
        check="test_transformers.py::test_best_model_at_the_end"),
    Row(what="HF Trainer: `optimizer_cls_and_kwargs`", truth="the same groups by hand",
        check="test_transformers.py::test_through_optimizer_cls_and_kwargs"),
    Row(what="Accelerate: clipping, accumulation, bf16", truth="the loop by hand, bit for bit",
        check="test_accelerate.py::test_as_the_loop_by_hand"),
    Row(what="Accelerate: `save_state`, `load_state`", truth="the uninterrupted run, bit for bit",
        check="test_accelerate.py::test_resumed_run_is_the_uninterrupted_one"),
    Row(what="skorch: clipping; `fit`, `partial_fit`", truth="the loop by hand, bit for bit",
        check="test_skorch.py::test_as_the_loop_by_hand"),
    Row(what="skorch: checkpoint and resume", truth="the uninterrupted run, bit for bit",
        check="test_skorch.py::test_resumed_run_is_the_uninterrupted_one"),
    Row(what="Ignite", truth="the loop by hand, bit for bit",
        check="test_ignite.py::test_as_the_loop_by_hand"),
    Row(what="Ignite: checkpoint and resume", truth="the uninterrupted run, bit for bit",
        check="test_ignite.py::test_resumed_run_is_the_uninterrupted_one"),
    *(Row(what=f"{name}: `unwrap(wrapper)`", truth="the optimizer itself",
          check=partial(check, lambda wrapper: None))
      for name, check in (("Lightning's wrapper", wrapped_by_lightning),
                          ("Fabric's wrapper", wrapped_by_fabric),
                          ("Accelerate's wrapper", wrapped_by_accelerate))),
    *(Row(what=f"{name}: `wrapper.hparams`, `.averaged`, `.hyper_step`",
          truth="the optimizer's own", check=partial(check, usable))
      for name, check in (("Lightning's wrapper", wrapped_by_lightning),
                          ("Fabric's wrapper", wrapped_by_fabric))),
    Row(what="Accelerate's wrapper: `wrapper.hparams`", truth="an error that names `unwrap`",
        check=refused_by_accelerate, refused=True),
    Row(what="`st.SelfTuning`: every torch optimizer except Muon",
        truth="the inner optimizer, bit for bit",
        check=partial(inside_selftuning, torch_optimizers, lambda n: n not in ("Muon", "LBFGS"))),
    Row(what="`st.SelfTuning(torch.optim.Muon)`", truth="the inner optimizer, bit for bit",
        check=partial(inside_selftuning, torch_optimizers, lambda n: n == "Muon")),
    Row(what="`st.SelfTuning(torch.optim.LBFGS)`", truth="a refusal", check=lbfgs, refused=True),
    Row(what="`st.SelfTuning`: timm's optimizers", truth="the inner one, bit for bit",
        check=partial(inside_selftuning, timm_optimizers, lambda n: True), slow=True),
    Row(what="`st.SelfTuning`: torchao's Adam in 8 and 4 bits and fp8",
        truth="the inner one, bit for bit",
        check=quantized),
    Row(what="peft: LoRA", truth="the two factors by hand", check=lora),
    Row(what="activation checkpointing, non-reentrant",
        truth="the run without checkpointing, bit for bit",
        check=partial(checkpointing, False)),
    Row(what="activation checkpointing, reentrant",
        truth="the run without checkpointing, or a refusal",
        check=partial(checkpointing, True)),
    Row(what="GradScaler skips the first step", truth="`hyper_step` returns None",
        check=skipped_first_step),
    Row(what="`hyper_step` every batch while accumulating", truth="`hyper_step` returns None",
        check=hyper_step_while_accumulating),
    Row(what="optimizer's state saved inside `averaged()`", truth="the state saved outside",
        check=saved_inside_averaged),
    Row(what="weights loaded inside `averaged()`",
        truth="the loaded weights are kept, or a refusal",
        check=loaded_inside_averaged),
    Row(what="an annealing scheduler together with `total_steps`", truth="a warning",
        check=annealed_twice),
    Row(what="a constant scheduler together with `total_steps`",
        truth="the run without a scheduler, bit for bit",
        check=constant_scheduler),
    Row(what="learning-rate monitors", truth="`param_groups` show the rate that is applied",
        check=shown_rate),
    Row(what="`torch.compile(opt.step)`", truth="it runs, or a refusal", check=compiled_step),
    Row(what="`dcp.save`, `dcp.load`, one process", truth="hyperparameters and averages equal",
        check=dcp_round_trip),
    Row(what="FSDP2, two ranks: full optimizer state", truth="the uninterrupted run, bit for bit",
        check="../optim/test_distributed_checkpoints.py::test_shards_go_on_also_on_other_ranks"),
    Row(what="DDP, two ranks: 100 steps", truth="one process on all the data, to 1e-6",
        check="../optim/test_processes.py::test_two_processes"),
    Row(what="DDP: `hyper_step` on one rank only", truth="an error within seconds",
        check="../optim/test_processes.py::test_two_processes"),
    Row(what="ZeroRedundancyOptimizer", truth="a refusal", refused=True,
        check="../optim/test_processes.py::test_two_processes"),
]  # fmt: skip


def marked(row: Row) -> Any:
    marks = [needs("integrations")]
    if row.slow:
        marks.append(pytest.mark.slow)
    return pytest.param(row, id=re.sub(r"[^\w]+", "-", row.what), marks=marks)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # dcp, of one process
@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize("row", [marked(row) for row in ROWS if callable(row.check)])
def test_row(row: Row, tmp_path: Path) -> None:
    assert callable(row.check)
    row.check(tmp_path)


def test_rows_that_are_tests_elsewhere_exist() -> None:
    """Truth: the files."""
    for row in ROWS:
        if isinstance(row.check, str):
            file, name = row.check.split("::")
            assert f"def {name}(" in (HERE / file).read_text()


def table() -> str:
    lines = ["| behaviour | compared with | result |", "|---|---|---|"]
    return "\n".join(lines + [f"| {r.what} | {r.truth} | {r.state} |" for r in ROWS]) + "\n"


def test_the_page_prints_the_table() -> None:
    """Truth: the rows."""
    assert table() in PAGE.read_text(), f"print this table in {PAGE.name}:\n{table()}"
