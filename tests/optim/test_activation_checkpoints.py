"""Activation checkpointing of both kinds. Truth: the same model without it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import selftune as st


def run(reentrant: bool | None, adapted: bool, split: bool) -> tuple[Any, Any]:
    """60 steps of a net whose middle is recomputed; only the middle is trained if adapted.

    If split, the checkpoint begins at the input, whose gradient torch wants to be asked for then.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    if adapted:
        net.requires_grad_(False)
        net[2].requires_grad_(True)

    def forward(x: Tensor) -> Tensor:
        if reentrant is None:
            return net(x)
        x = x.requires_grad_()
        h = x if split else net[:2](x)
        part = net[:4] if split else net[2:4]
        return net[4](checkpoint(part, h, use_reentrant=reentrant))

    opt = st.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        x, xv = torch.randn(2, 16, 8, generator=generator)
        y, yv = (x.sum(1) > 0).long(), (xv.sum(1) > 0).long()
        opt.zero_grad()
        cross_entropy(forward(x), y).backward()
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        opt.step()
        opt.hyper_step(lambda xv=xv, yv=yv: cross_entropy(forward(xv), yv))
        after = [p.grad for p in net.parameters() if p.grad is not None]
        assert all(map(torch.equal, after, grads))
    return opt.hparams, nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_equals_the_model_without(reentrant: bool, split: bool, adapted: bool) -> None:
    got, want = run(reentrant, adapted, split), run(None, adapted, split)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_with_random_numbers_of_its_own_is_refused(reentrant: bool) -> None:
    middle = nn.Sequential(nn.Linear(8, 8), st.nn.Dropout(0.5, name="middle"), nn.Tanh())
    loss = checkpoint(middle, torch.randn(4, 8, requires_grad=True), use_reentrant=reentrant).sum()
    with pytest.raises(RuntimeError, match=r"Dropout\(name='middle'\).*outside the checkpoint"):
        loss.backward()
