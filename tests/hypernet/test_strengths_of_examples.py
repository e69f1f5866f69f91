"""Strengths with a value for each example. Truths: a closed form, the shapes of the layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st


@pytest.mark.parametrize("perturb", ["auto", "batch"])
def test_the_response_of_dropped_weights(perturb: str) -> None:
    """Linear regression: ``w(z) = (S + e^z diag S)⁻¹ b``; examples share the dropped weights."""
    torch.manual_seed(0)
    x = torch.randn(512, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    y = x @ torch.randn(4, 1, dtype=torch.float64) + torch.randn(512, 1, dtype=torch.float64)
    square, cross = x.T @ x / 512, x.T @ y / 512

    def best(z: Tensor) -> Tensor:
        return torch.linalg.solve(square + z.exp() * square.diag().diag(), cross).flatten()

    expected = torch.func.jacrev(best)(torch.logit(torch.tensor(0.3, dtype=torch.float64)))
    net = st.hypernet.convert(
        st.nn.DropConnect(nn.Linear(4, 1, bias=False).double(), 0.3), perturb=perturb
    ).train()
    assert not net.report.per_example
    opt, steps, found = torch.optim.Adam(net.weights(), lr=0.03), 1500, torch.zeros(4).double()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for step in range(steps):
        rows = torch.randint(512, (64,))
        opt.zero_grad()
        F.mse_loss(net(x[rows]), y[rows]).backward()
        opt.step()
        schedule.step()
        if step >= steps - 500:
            with torch.no_grad():
                found += net.along(net._places[0], torch.ones(1).double()).flatten() / 500
    cosine = F.cosine_similarity(found, expected, dim=0)
    assert float(cosine) > 0.9
    assert 0.5 < float(found.norm() / expected.norm()) < 1.5


class Attention(nn.Module):
    """Heads are folded into the batch, where dropout acts on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.drop = st.nn.Dropout(0.1, name="attention")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2).flatten(0, 1)
            for part in self.qkv(x).chunk(3, -1)
        )
        mixed = self.drop((q @ k.mT).softmax(-1)) @ v
        return self.out(mixed.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out, self.drop = nn.Linear(8, 8), nn.Linear(8, 2), st.nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.up(x).transpose(0, 1)).transpose(0, 1))


class BatchFirst(TimeFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.up(x)))


CASES = [(Attention, 5, False), (TimeFirst, 5, False), (TimeFirst, 6, False), (BatchFirst, 6, True)]


@pytest.mark.parametrize(("model", "length", "apart"), CASES)
def test_strengths_that_reach_other_examples(
    model: type[nn.Module], length: int, apart: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Six examples: as many time steps were given the strengths of examples in silence."""
    net = st.hypernet.convert(model()).train()
    keys = {n: b.clone() for n, b in net.model.named_buffers() if n.endswith("key")}
    x = torch.randn(6, length, 8)
    net(x)
    assert net.report.per_example is apart
    assert ("once per batch" in caplog.text) is not apart
    for name, before in keys.items():
        assert int(net.model.get_buffer(name) - before) == 1  # the pass's own draw
    if not apart:
        with pytest.raises(ValueError, match="perturb='example' is not possible"):
            st.hypernet.convert(model(), perturb="example").train()(x)
