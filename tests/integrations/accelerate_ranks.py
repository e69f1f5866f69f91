"""Two ranks with Accelerate, a state at half time and the end. Run by test_accelerate.py."""

import os
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp
from tasks import copied
from test_accelerate import Run

from selftune.integrations import unwrap


def rank(number: int, port: str, folder: Path) -> None:
    """Save the state after two epochs, and weights and hyperparameters after four."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="localhost", MASTER_PORT=port,
    )  # fmt: skip
    run = Run(ranks=2).epochs(2)
    run.accelerator.save_state(str(folder / "half"))
    run.epochs(2)
    opt = unwrap(run.opt)
    with opt.averaged():
        end = {"weights": copied(run.accelerator.unwrap_model(run.model)), "hparams": opt.hparams}
    torch.save(end, folder / f"{number}.pt")


if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1], Path(sys.argv[2])), nprocs=2)
