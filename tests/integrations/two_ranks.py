"""Two ranks in a framework: a checkpoint at half time, and the end. Run by test_other_ranks.py."""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from tasks import copied, dataset, network, train_loader, val_loader
from torch.utils.data import DataLoader, DistributedSampler

from selftune.integrations import unwrap

HALF = 12  # steps, of 24


def by_accelerate(folder: Path, ranks: int, split: bool = False) -> dict[str, Any]:
    """``save_state`` after two of four epochs, or the rest of a run from there on one rank."""
    from accelerate import DataLoaderConfiguration
    from test_accelerate import Run

    run = Run(ranks=ranks, dataloader_config=DataLoaderConfiguration(split_batches=split))
    if ranks > 1:
        run.epochs(2).accelerator.save_state(str(folder / "half"))
    else:
        run.accelerator.load_state(str(folder / "half"))
        run.step = HALF
    run.epochs(2)
    opt = unwrap(run.opt)
    with opt.averaged():
        return {
            "weights": copied(run.accelerator.unwrap_model(run.model)), "hparams": opt.hparams,
        }  # fmt: skip


def by_transformers(folder: Path, ranks: int) -> dict[str, Any]:
    """A checkpoint of Trainer after half of the steps, or a run resumed from it on one rank."""
    from test_transformers import trainer

    made = trainer(
        folder / f"of {ranks}", per_device_train_batch_size=16 // ranks,
        per_device_eval_batch_size=20 // ranks, save_strategy="steps", save_steps=HALF,
    )  # fmt: skip
    made.model.net = network(norm=False)
    half = folder / "of 2" / f"checkpoint-{HALF}"
    made.train(resume_from_checkpoint=None if ranks > 1 else str(half))
    return {"weights": copied(made.model.net), "hparams": unwrap(made.optimizer).hparams}


def by_lightning(folder: Path, ranks: int) -> dict[str, Any]:
    """A checkpoint of Lightning after two of four epochs, or a run resumed from it on one rank."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from test_lightning import Net

    from selftune.integrations.lightning import SelfTuning

    logging.getLogger("lightning.pytorch").setLevel("ERROR")
    module = Net()
    module.net = network(norm=False)
    train = train_loader()
    options: dict[str, Any] = {}
    if ranks > 1:
        sampler = DistributedSampler(train.dataset, ranks, int(os.environ["RANK"]), shuffle=False)
        train = DataLoader(train.dataset, batch_size=16 // ranks, sampler=sampler)
        options = {"strategy": "ddp", "devices": ranks, "use_distributed_sampler": False}
    saver = ModelCheckpoint(folder, "{epoch}", every_n_epochs=2, save_top_k=-1)
    trainer = Trainer(
        callbacks=[SelfTuning(), saver], accelerator="cpu", max_epochs=4, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    # Validation loaders are not divided: each rank scores all examples.
    val = DataLoader(dataset(60, 1), batch_size=20 // ranks) if ranks > 1 else val_loader()
    trainer.fit(module, train, val, ckpt_path=None if ranks > 1 else folder / "epoch=1.ckpt")
    return {"weights": copied(module.net), "hparams": trainer.optimizers[0].hparams}


RUNS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "accelerate": by_accelerate, "accelerate split": partial(by_accelerate, split=True),
    "transformers": by_transformers, "lightning": by_lightning,
}  # fmt: skip


def rank(number: int, name: str, port: str, folder: Path) -> None:
    """Save how a rank ends."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        NODE_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=port, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.save(RUNS[name](folder, 2), folder / f"{number}.pt")


if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1], sys.argv[2], Path(sys.argv[3])), nprocs=2)
