"""Two gloo ranks. Truth: one process on the whole batches, to rounding in float64."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jobs import Outage, points
from ranks import (
    ROUNDING,
    STEPS,
    assert_close,
    cut,
    free_port,
    launched,
    loader,
    net,
    refusal,
    train,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import selftune as st
from selftune.tuner._group import join  # private: its streams of random numbers
from selftune.tuner._lock import owned
from tests.traced import trace

pytestmark = [
    pytest.mark.slow,  # processes that each import torch
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
]


def random_net() -> nn.Module:
    torch.manual_seed(1)  # of the layer's counter
    return net(nn.Dropout(0.3), st.nn.Dropout(0.1))


def following() -> DataLoader[Any]:
    x, y = points(480)
    data = TensorDataset(x.double(), y)
    return DataLoader(data, batch_sampler=st.structure.Batches(data, 8, 64, interval=5))


TUNED = ("lr", "weight_decay")
JOBS: dict[str, Callable[..., Any]] = {
    "SGD": lambda folder, **o: train(net(), folder, **o),
    "AdamW, a smaller last batch": lambda folder, **o: train(
        net(), folder, size=205, rule=st.rules.AdamW(), **o
    ),
    "workers": lambda folder, **o: train(net(), folder, size=2005, workers=1, **o),
    "batches follow the noise scale": lambda folder, **o: train(
        net(), folder, batches=following(), **o
    ),
    "no validation set": lambda folder, **o: train(net(), folder, val=None, **o),
    "dropout": lambda folder, **o: train(random_net(), folder, tune=TUNED, **o),
    "norm": lambda folder, **o: train(net(nn.BatchNorm1d(16)), folder, size=203, **o),
}
EQUAL = list(JOBS)[:5]


def small_validation_batches(**options: Any) -> dict[str, Any]:
    """Batches of 3, 3 and 2; without callbacks, before which ranks take rank 0's random state."""
    torch.manual_seed(3)
    tuner = st.Tuner(
        net(), F.cross_entropy, rule=st.rules.SGD(), hparams={"lr": 0.01}, compile=False, **options
    )
    val = loader(8, 1, batch_size=3)
    result = tuner.fit(loader(200, 0, batch_size=20), val, steps=STEPS, progress=False)
    hparams = {n: torch.as_tensor(v) for n, v in result.history.items()}
    return {"hparams": hparams, "weights": result.best_weights, "loss": result.best_loss}


def rank(number: int, port: int, folder: Path) -> None:
    """Everything that two ranks are to do, in one process each."""
    launched(number, port)
    found = {name: job(folder / name, parallel="ddp") for name, job in JOBS.items()}
    found["small"] = small_validation_batches(parallel="ddp")
    cut(folder / "to two", parallel="ddp")
    cut(folder / "to one", parallel="ddp")
    found["two again"] = train(net(), folder / "to two", parallel="ddp", resume=True)
    found["from one"] = train(net(), folder / "of one", parallel="ddp", resume=True)
    with pytest.raises(Outage):
        JOBS["dropout"](folder / "random", died=47, parallel="ddp")
    found["random again"] = JOBS["dropout"](folder / "random", parallel="ddp", resume=True)
    group, _ = join("ddp", torch.device("cpu"))
    group.seed()
    drawn = []

    def passing(run: None, batch: torch.Tensor) -> Any:
        drawn.append(torch.rand(2))
        return drawn[-1].sum(), [drawn[-1]], []

    mean = group.mean(passing, None, torch.ones(3))
    found["draws"] = group.gather(drawn[0]), mean[1][0], torch.rand(2)
    found["refused"] = [refusal(case, number) for case in REFUSED.values()]
    found["refused"].append(refusal(lambda number: locked(number, folder), number))
    torch.save(found, folder / f"{number}.pt")


def locked(number: int, folder: Path) -> None:
    """Another process writes to the folder, of which only the first rank knows."""
    with owned(folder / "locked") if number == 0 else nullcontext():
        train(net(), folder / "locked", parallel="ddp")


def small_batches(number: int) -> None:
    tuner = st.Tuner(net(), F.cross_entropy, parallel="ddp")
    tuner.fit(loader(20, 0, batch_size=1), loader(8, 1), steps=5, progress=False)


def other_models(number: int) -> None:
    model = net()
    model[0].weight.data[number, 0] += 1.0
    train(model, parallel="ddp")


def other_data(number: int) -> None:
    train(net(), parallel="ddp", size=205 + 40 * number)


def other_arguments(number: int, **options: Any) -> None:
    """Arguments on the first rank alone, which would wait for ever where ranks meet."""
    tuner = st.Tuner(net(), F.cross_entropy, parallel="ddp")
    given = options if number == 0 else {}
    tuner.fit(loader(40, 0, batch_size=8), loader(16, 1), steps=5, progress=False, **given)


def sampler(number: int) -> None:
    data = TensorDataset(*points(64))
    batches = DataLoader(data, 8, sampler=DistributedSampler(data))
    st.Tuner(net(), F.cross_entropy, parallel="ddp").fit(batches, batches, steps=5)


REFUSED: dict[str, Callable[[int], Any]] = {
    "train: batches of 1 cannot be divided among 2 ranks": small_batches,
    "weights and buffers of the model of rank 1 differ": other_models,
    "lengths of train and val of rank 1 differ": other_data,
    "callbacks of fit (whether passed) of rank 1 differ": partial(
        other_arguments, callbacks=[lambda progress: None]
    ),
    "recorder of fit (whether passed) of rank 1 differ": partial(
        other_arguments, recorder=lambda values, step: None
    ),
    "evaluate_every of fit of rank 1 differ": partial(other_arguments, evaluate_every=2),
    "train has a DistributedSampler": sampler,
    "needs an elementwise estimator": lambda _: train(net(st.nn.Dropout(0.1)), parallel="ddp"),
    "population=2 cannot be trained": lambda _: train(net(), parallel="ddp", population=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """What two ranks found."""
    cut(folder / "of one")
    mp.spawn(rank, (free_port(), folder), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in (0, 1)]


@pytest.mark.parametrize("job", EQUAL)
def test_two_ranks_follow_one_process_on_whole_batches(
    job: str, both: list[dict[str, Any]]
) -> None:
    alone = JOBS[job](None)
    assert both[0][job]["hparams"]["lr"][-1] != pytest.approx(0.01)
    assert_close(both[0][job], alone, **ROUNDING)


@pytest.mark.parametrize("job", list(JOBS))
def test_ranks_agree_bit_for_bit(job: str, both: list[dict[str, Any]]) -> None:
    assert_close(both[0][job], both[1][job], rtol=0, atol=0)
    assert torch.equal(both[0][job]["stream"], both[1][job]["stream"])


def test_a_run_goes_on_with_other_numbers_of_ranks(
    folder: Path, both: list[dict[str, Any]]
) -> None:
    whole = both[0]["SGD"]
    assert_close(both[0]["two again"], whole, rtol=0, atol=0)
    assert_close(both[0]["from one"], whole, **ROUNDING)
    assert_close(train(net(), folder / "to one", resume=True), whole, **ROUNDING)


def test_resumed_ranks_draw_the_same_random_numbers(both: list[dict[str, Any]]) -> None:
    assert_close(both[0]["random again"], both[0]["dropout"], rtol=0, atol=0)


def test_ranks_skip_small_validation_batches_together(both: list[dict[str, Any]]) -> None:
    """One rank skipped its single example of three, so that the ranks' data were others."""
    want = small_validation_batches()
    for found in both:
        assert_close(found["small"], want, **ROUNDING)


def test_one_rank_writes(folder: Path, both: list[dict[str, Any]]) -> None:
    first, second = (found["SGD"] for found in both)
    assert first["folder"] == folder / "SGD"
    assert second["folder"] is None
    assert first["rows"] > 0
    assert second["rows"] == 0


def test_ranks_draw_other_numbers_from_their_own_streams_alone(both: list[dict[str, Any]]) -> None:
    for (one, two), mean, _ in (found["draws"] for found in both):
        assert not torch.equal(one, two)
        torch.testing.assert_close(mean, (one + two) / 2)
        assert torch.equal(mean, both[0]["draws"][1])
    assert torch.equal(both[0]["draws"][2], both[1]["draws"][2])


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_ranks_cannot_do_is_refused_on_all(number: int, both: list[dict[str, Any]]) -> None:
    for found in both:
        assert list(REFUSED)[number] in found["refused"][number]
        assert "is being written to by process" in found["refused"][-1]


def compiled(number: int, port: int, folder: Path) -> None:
    launched(number, port)
    torch.compile = trace  # as the fixture "traced" does; two ranks make six graphs each
    found = [train(net(), parallel="ddp", compile=c) for c in (False, True)]
    torch.save(found, folder / f"{number}.pt")


def test_compiled_ranks_agree_with_eager_ones_to_rounding(tmp_path: Path) -> None:
    mp.spawn(compiled, (free_port(), tmp_path), nprocs=2)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=False) for n in (0, 1))
    assert_close(one[1], two[1], rtol=0, atol=0)
    assert_close(one[1], one[0], **ROUNDING)


def test_it_is_refused_outside_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        ValueError, match=r"parallel='ddp' .* torchrun --nproc-per-node 2 script.py"
    ):
        st.Tuner(net(), F.cross_entropy, parallel="ddp")
