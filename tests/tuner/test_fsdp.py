"""Weights sharded over two gloo ranks. Truth: one process with all weights, on whole batches."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.multiprocessing as mp
from jobs import Outage
from ranks import assert_close, cut, free_port, launched, loader, net, refusal, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import selftune as st

pytestmark = [
    pytest.mark.slow,  # processes that each import torch
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
]
ROUNDING = dict(rtol=1e-9, atol=1e-9)  # of float64 sums in another order, over 100 steps


def wide() -> nn.Module:
    """Of 17,283 weights, of which every fourth has sensitivities; a rank has no row of the last."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 3)),
        nn.Linear(3, 1),
    ).double()


def squares(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output[:, 0], target.double())


class Transformer(nn.Module):
    """Two blocks on the coordinates of a point as tokens, with activation checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Linear(1, 16)
        self.position = nn.Parameter(torch.randn(2, 16))
        options = dict(dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, **options) for _ in range(2)
        )
        self.head = nn.Linear(16, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x.unsqueeze(2)) + self.position
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return self.head(x.mean(1))


def sharded_transformer(**options: Any) -> nn.Module:
    """Block by block, by the user; plain in one process."""
    model = Transformer()
    if options.get("parallel") == "fsdp":
        for module in (*model.blocks, model):
            dist.fsdp.fully_shard(module)
    return model


def large() -> nn.Module:
    """Of 4.4 million weights, which are not joined to a vector, in two blocks and a rest."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(2, 1100), nn.Tanh(), nn.Linear(1100, 2000), nn.Tanh()),
        *(nn.Linear(2000, 1101), nn.Linear(1101, 3)),
    ).double()


SOME = dict(steps=60)
FEW = dict(steps=8, evaluate_every=8, checkpoint_every=4)
JOBS: dict[str, Callable[..., Any]] = {
    "SGD": lambda folder, **o: train(net(), folder, **o),
    "a mixture, no validation set": lambda folder, **o: train(
        *(net(), folder), rule=st.rules.Mixture([st.rules.SGD(), st.rules.AdamW()]),
        val=None, fit=SOME, **o,
    ),
    "AdamW, a last batch of 5, three of validation": lambda folder, **o: train(
        *(wide(), folder), rule=st.rules.AdamW(), penalty=st.penalties.L1(1e-4),
        loss_fn=squares, size=205, val=loader(45, 1, batch_size=16), fit=SOME, **o,
    ),
    "transformer": lambda folder, **o: train(sharded_transformer(**o), folder, **o),
    "large": lambda folder, **o: train(
        *(large(), folder), rule=st.rules.AdamW(), snapshots="device", probe=False, fit=FEW, **o
    ),
}  # fmt: skip
NORM = "norm"  # normalises by each rank's part of a batch, as with "ddp"


def norm(**options: Any) -> Any:
    return train(net(nn.BatchNorm1d(16)), size=203, fit={"steps": 40}, **options)


def storages() -> int:
    """Bytes of all tensors in this process."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    held = [t.untyped_storage() for t in found]
    return sum({s.data_ptr(): s.nbytes() for s in held}.values())


def memory(parallel: str) -> int:
    """Bytes of all tensors that a run needs, at an evaluation."""
    before, found = storages(), []
    tuner = st.Tuner(
        *(wide(), squares), rule=st.rules.AdamW(), snapshots="device", parallel=parallel
    )
    tuner.fit(
        *(loader(40, 0, batch_size=20), loader(16, 1, batch_size=16)), steps=4, progress=False,
        callbacks=[lambda progress: found.append(storages() - before)],
    )  # fmt: skip
    return found[-1]


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(2, 3).double(), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


def on_other_mesh() -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "rows"))
    return dist.fsdp.fully_shard(net(), mesh=mesh)


def in_part() -> nn.Module:
    model = net()
    dist.fsdp.fully_shard(model[0])
    return model


def first_layer(model: nn.Module, batch: Any) -> Tensor:
    """Part of a model, without a call of the whole."""
    return F.cross_entropy(model[0](batch[0]), batch[1])


REFUSED: dict[str, Callable[[int], Any]] = {
    "compile=True cannot be used": lambda _: train(net(), parallel="fsdp", compile=True),
    "rule=Muon needs whole matrices": lambda _: train(
        net(), parallel="fsdp", rule=st.rules.Muon(), hparams={}
    ),
    "penalty='group' needs whole tensors": lambda _: train(
        net(), parallel="fsdp", penalty=st.penalties.Group(1e-3)
    ),
    "model: scale has shape ()": lambda _: train(Scalar(), parallel="fsdp"),
    "model: 2.weight is not sharded, but 0.weight is": lambda _: train(in_part(), parallel="fsdp"),
    "0.weight is sharded (a DTensor): pass parallel=": lambda _: train(
        dist.fsdp.fully_shard(net()), parallel="ddp"
    ),
    "on a mesh of shape (2, 1)": lambda _: train(on_other_mesh(), parallel="fsdp"),
    "a part was used without such a call": lambda _: train(
        net(), parallel="fsdp", loss_fn=None, objective=first_layer
    ),
    "needs an elementwise estimator": lambda _: train(net(st.nn.Dropout(0.1)), parallel="fsdp"),
    "population=2 cannot be trained": lambda _: train(net(), parallel="fsdp", population=2),
}


def rank(number: int, port: int, folder: Path) -> None:
    """Everything that two ranks are to do, in one process each."""
    launched(number, port)
    found = {
        name: job(folder / name if name == "SGD" else None, parallel="fsdp")
        for name, job in JOBS.items()
    }
    found |= {f"{NORM}, {kind}": norm(parallel=kind) for kind in ("fsdp", "ddp")}
    cut(folder / "to two", died=87, parallel="fsdp")
    if number == 0:
        for target in ("one", "ddp"):
            shutil.copytree(folder / "to two", folder / f"to {target}")
    found["two again"] = train(net(), folder / "to two", parallel="fsdp", resume=True)
    found["ddp again"] = train(net(), folder / "to ddp", parallel="ddp", resume=True)
    found["from one"] = train(net(), folder / "of one", parallel="fsdp", resume=True)
    with pytest.raises(Outage):
        JOBS["large"](folder / "cut", died=5, parallel="fsdp")
    found["large again"] = JOBS["large"](folder / "cut", parallel="fsdp", resume=True)
    found["memory"] = memory("fsdp") / memory("ddp")
    found["refused"] = [refusal(case, number) for case in REFUSED.values()]
    torch.save(found, folder / f"{number}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """What two ranks found."""
    cut(folder / "of one", died=87)
    mp.spawn(rank, (free_port(), folder), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=False) for number in (0, 1)]


@pytest.mark.parametrize("job", list(JOBS))
def test_two_ranks_follow_one_process_with_all_weights(
    job: str, both: list[dict[str, Any]]
) -> None:
    alone = JOBS[job](None)
    assert both[0][job]["hparams"]["lr"][-1] != pytest.approx(0.01)
    assert_close(both[0][job], alone, **ROUNDING)
    assert_close(both[1][job], both[0][job], rtol=0, atol=0)


def test_batch_norm_sees_a_ranks_part_of_a_batch_as_with_ddp(both: list[dict[str, Any]]) -> None:
    assert_close(both[0]["norm, fsdp"], both[0]["norm, ddp"], **ROUNDING)


def test_a_run_goes_on_with_other_numbers_of_ranks(
    folder: Path, both: list[dict[str, Any]]
) -> None:
    whole = both[0]["SGD"]
    assert_close(both[0]["two again"], whole, rtol=0, atol=0)
    assert_close(both[0]["large again"], both[0]["large"], rtol=0, atol=0)
    for name in ("ddp again", "from one"):
        assert_close(both[0][name], whole, **ROUNDING)
    assert_close(train(net(), folder / "to one", resume=True), whole, **ROUNDING)


def test_a_rank_holds_half_of_weights_and_their_state(both: list[dict[str, Any]]) -> None:
    """Law: of the bytes of all tensors with "ddp", at an evaluation."""
    for found in both:
        assert 0.45 < found["memory"] < 0.6


def test_one_rank_writes(folder: Path, both: list[dict[str, Any]]) -> None:
    first, second = (found["SGD"] for found in both)
    assert first["folder"] == folder / "SGD"
    assert second["folder"] is None
    assert first["rows"] > 0
    assert second["rows"] == 0


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_sharded_runs_cannot_do_is_refused(number: int, both: list[dict[str, Any]]) -> None:
    for found in both:
        assert list(REFUSED)[number] in found["refused"][number]
