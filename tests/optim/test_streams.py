"""A loop of one's own over streams. Truth: the same loop, uninterrupted."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import selftune as st

pytestmark = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")  # by torchdata
MAKES: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda net: st.SGD(net, lr=0.01, momentum=0.9),
    "AdamW": lambda net: st.AdamW(net, lr=0.01),
}


class Endless(IterableDataset[Any]):
    """Examples without an end, each worker its own; it can say where it is."""

    def __init__(self, seed: int) -> None:
        self.seed, self.at = seed, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = get_worker_info()
        own = 0 if info is None else info.id
        while True:
            self.at += 1
            seed = (self.seed * 10 + own) * 10_000 + self.at
            x = torch.randn(4, generator=torch.Generator().manual_seed(seed))
            yield x, (x.sum() > 0).long()

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def train(net: nn.Module, opt: Any, batches: Iterator[Any], val: Iterator[Any], steps: int) -> None:
    for _ in range(steps):
        x, y = next(batches)
        opt.zero_grad()
        cross_entropy(net(x), y).backward()
        opt.step()

        def outer() -> Tensor:
            x, y = next(val)
            return cross_entropy(net(x), y)

        opt.hyper_step(outer)


def begun(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return net, MAKES[name](net)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", MAKES)
def test_workers_tune_as_the_process_itself(name: str, workers: int) -> None:
    found = []
    for persistent in {False, workers > 0}:
        net, opt = begun(name)
        options = dict(batch_size=8, num_workers=workers, persistent_workers=persistent)
        loaders = [DataLoader(Endless(seed), **options) for seed in (1, 2)]
        train(net, opt, iter(loaders[0]), iter(loaders[1]), 60)
        assert opt.hparams["lr"] != pytest.approx(0.01)
        found.append(opt.hparams)
    assert found[0] == found[-1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", MAKES)
def test_stateful_loaders_and_the_optimizer_go_on_together(name: str, workers: int) -> None:
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")

    def loaders() -> list[Any]:
        options = dict(batch_size=8, num_workers=workers)
        return [module.StatefulDataLoader(Endless(seed), **options) for seed in (1, 2)]

    net, opt = begun(name)
    before = loaders()
    streams = [iter(loader) for loader in before]
    train(net, opt, *streams, 45)
    saved = [copy.deepcopy(part.state_dict()) for part in (net, opt, *before)]
    train(net, opt, *streams, 45)
    want = opt.hparams
    net, opt = begun(name)
    after = loaders()
    for part, state in zip((net, opt, *after), saved, strict=True):
        part.load_state_dict(state)
    train(net, opt, *(iter(loader) for loader in after), 45)
    assert opt.hparams == want
