"""Streams: the next batch validates. Truths: the order of passes, and the noise of the targets."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st

STEPS, NOISE = 400, 0.1


def stream(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of y = Σx + noise, each example once."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(32, 8, generator=generator)
        noise = NOISE * torch.randn(32, 1, generator=generator)
        yield x, x.sum(1, keepdim=True) + noise


def excess(model: nn.Module) -> float:
    """Mean squared error on new data above the variance of the noise, in units of that variance."""
    x, y = map(torch.cat, zip(*(next(s) for s in [stream(99)] * 200), strict=True))
    with torch.no_grad():
        return float(F.mse_loss(model(x), y)) / NOISE**2 - 1


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_one_pass_over_a_stream_comes_down_to_the_noise(lr: float) -> None:
    """A plain optimizer with the same schedule does so from the second rate only."""
    torch.manual_seed(0)
    model, twin = nn.Linear(8, 1), nn.Linear(8, 1)
    twin.load_state_dict(model.state_dict())
    opt = st.SGD(model, lr=lr, momentum=0.9, total_steps=STEPS)
    plain = torch.optim.SGD(twin.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(plain, 1.0, 0.0, STEPS)
    batches = stream(0)
    order: list[tuple[str, int]] = []

    def loss_of(net: nn.Module, what: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        order.append((what, id(batch[0])))
        return F.mse_loss(net(batch[0]), batch[1])

    batch, kept = next(batches), []
    for _ in range(STEPS):
        following = next(batches)
        kept.append(batch)  # so that no other tensor takes its id
        for net, optimizer in ((model, opt), (twin, plain)):
            optimizer.zero_grad()
            loss_of(net, "train", batch).backward()
            optimizer.step()
        schedule.step()
        opt.hyper_step(lambda batch=following: loss_of(model, "validate", batch))  # type: ignore[misc]
        batch = following
    trained: set[int] = set()
    for what, number in order:
        assert what == "train" or number not in trained
        trained |= {number} if what == "train" else set()
    assert excess(model) < 0.05
    assert (excess(twin) < 0.05) == (lr == 1e-2)
