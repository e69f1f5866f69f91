"""Two processes: Lightning's DDP strategy, then the same loop by hand. Run by test_lightning.py."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from tasks import copied, loss_of, network, train_loader, tuned, val_loader
from test_lightning import Net
from torch import Tensor, nn
from torch.utils.data import DataLoader

from selftune.integrations import ValidationBatches


def share(loader: DataLoader[Any], rank: int) -> DataLoader[Any]:
    """Every second example."""
    sampler = torch.utils.data.DistributedSampler(loader.dataset, 2, rank, shuffle=False)
    return DataLoader(loader.dataset, batch_size=8, sampler=sampler)


def by_hand(rank: int) -> dict[str, Any]:
    """The loop, in the process group that Lightning made."""
    model = network(norm=False)
    opt, wrapped = tuned(model), nn.parallel.DistributedDataParallel(model)
    batches, step = ValidationBatches(val_loader()), 0
    for _ in range(4):
        for batch in share(train_loader(), rank):
            wrapped.train()
            loss_of(wrapped, batch).backward()
            opt.step()
            opt.zero_grad()
            step += 1
            drawn = batches.at(step)

            def value(drawn: Any = drawn) -> Tensor:
                model.eval()
                return loss_of(model, next(drawn))

            opt.hyper_step(value)
    with opt.averaged():
        return {"weights": copied(model), "hparams": opt.hparams}


def main(folder: Path) -> None:
    """Save how both end."""
    from lightning.pytorch import Trainer

    from selftune.integrations.lightning import SelfTuning

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel("ERROR")
    module = Net()
    module.net = network(norm=False)
    trainer = Trainer(
        callbacks=[SelfTuning()], strategy="ddp", devices=2, accelerator="cpu", max_epochs=4,
        use_distributed_sampler=False,  # Lightning's own shuffles
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    rank = trainer.global_rank
    trainer.fit(module, share(train_loader(), rank), val_loader())
    end = {"weights": copied(module.net), "hparams": trainer.optimizers[0].hparams}
    torch.save(end, folder / f"{rank}.pt")
    torch.save(by_hand(rank), folder / f"by-hand-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
