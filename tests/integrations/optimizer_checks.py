"""Checks of the framework matrix with other optimizers inside: torch's, timm's, torchao's; LoRA."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix_checks import steps
from tasks import dataset, loss_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import selftune as st

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
        fresh = matrices(width)  # goes on from a checkpoint
        again = st.SelfTuning(found[name](fresh), total_steps=40, every=2, probe=False)
        fresh.load_state_dict(other.state_dict())
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=False))
        ends = []
        for net, run in ((other, opt), (fresh, again)):
            torch.manual_seed(2)
            ends.append(steps(net, run))
        assert torch.equal(*ends), name


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


def sparse(folder: Path) -> None:
    """Truth: a refusal that says what to do."""
    table = nn.Embedding(4, 2, sparse=True)
    opt = st.SelfTuning(torch.optim.SparseAdam(table.parameters()))
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        opt.step()


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
