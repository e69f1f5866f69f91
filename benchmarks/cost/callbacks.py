"""What the callbacks of frameworks cost beside ``hyper_step`` called by hand.

    python -m benchmarks.cost.callbacks [--rounds 5] [--only lightning]

AdamW, a hyperparameter step every five steps. In one run of the framework, blocks of steps take
turns: a hook of one line that calls ``hyper_step`` on the next batch of a validation loader, and
our callback, which draws the batch by (seed, step), switches modes, moves and casts. The callback's
overhead is the difference of neighbouring blocks, and its ratio (plain + overhead) ÷ plain, where
plain is the loop without a framework, in runs between these: the target is 1.05 at most. The last
column, callback ÷ by hand, is in the framework's own time. Times are those of the process, on one
thread, since the machine is shared. Evaluations and checkpoints are left out. Typical output is
kept in ``docs/integrations/index.md``.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import selftune as st
from benchmarks.cost.nets import NETS, Net
from benchmarks.fused import spread

BLOCK = 20  # steps
PAIRS = 10  # of blocks in a run, the first of which warms up
STEPS = 2 * BLOCK * PAIRS


class Batches(Dataset):
    """Training batches, again and again."""

    def __init__(self, net: Net) -> None:
        self.batches = net.batches[:-2]

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Any:
        return self.batches[index % len(self.batches)]


class Run:
    """What all runs share: model, optimizer, data."""

    def __init__(self, net: Net) -> None:
        torch.manual_seed(0)
        self.net, self.model, self.train = net, net.make(), Batches(net)
        x, y = net.batches[-1]
        self.val = DataLoader(TensorDataset(x, y), batch_size=len(x))
        self.opt = st.AdamW(self.model, lr=1e-3, every=5, probe=False)
        self.loader = DataLoader(self.train, batch_size=None)
        self.drawn, self.marks = self.stream(), [0.0] * 0

    def stream(self) -> Iterator[Any]:
        """Validation batches, without an end."""
        while True:
            yield from self.val

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Of training and validation batches."""
        return self.net.loss(model(batch[0]), batch[1])

    def by_hand(self) -> None:
        """One line of a user's hook."""
        self.opt.hyper_step(lambda: self.loss(self.model, next(self.drawn)))

    def hook(self, ours: Callable[[], Any]) -> None:
        """After a step: by hand, or by our callback, in turns."""
        if len(self.marks) // BLOCK % 2:
            ours()
        else:
            self.by_hand()
        self.marks.append(time.process_time())

    def blocks(self) -> list[tuple[float, float]]:
        """Milliseconds a step by hand and by our callback, of all pairs of blocks but the first."""
        ends = self.marks[BLOCK - 1 :: BLOCK]
        times = [1e3 * (b - a) / BLOCK for a, b in itertools.pairwise(ends)]
        return list(zip(times[1::2], times[2::2], strict=False))


def plain(run: Run) -> None:
    """The loop without a framework."""
    for batch in run.loader:
        run.opt.zero_grad()
        run.loss(run.model, batch).backward()
        run.opt.step()
        run.hook(run.by_hand)


def lightning(run: Run) -> None:
    """Lightning's Trainer."""
    from lightning.pytorch import LightningModule, Trainer

    from selftune.integrations.lightning import SelfTuning

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return run.loss(self.model, batch)

        validation_step = training_step

        def configure_optimizers(self) -> Any:
            return run.opt

    class Turns(SelfTuning):
        def on_train_batch_end(self, *args: Any) -> None:
            run.hook(lambda: super(Turns, self).on_train_batch_end(*args))

    trainer = Trainer(
        callbacks=[Turns()], max_epochs=1, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=0, check_val_every_n_epoch=10,
    )  # fmt: skip
    trainer.fit(Module(), run.loader, run.val)


def transformers(run: Run) -> None:
    """Hugging Face's Trainer."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from selftune.integrations.transformers import SelfTuningCallback

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.model

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return {"loss": run.loss(self.model, (x, labels))}

    class Turns(SelfTuningCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            run.hook(lambda: super(Turns, self).on_step_end(*args, **kwargs))

    def named(rows: list[Any]) -> Any:
        if len(rows) == 1:  # a whole batch
            return dict(zip(("x", "labels"), rows[0], strict=True))
        return {n: torch.stack([r[i] for r in rows]) for i, n in enumerate(("x", "labels"))}

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=1, save_strategy="no",
            lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[],
            disable_tqdm=True, logging_strategy="no", train_sampling_strategy="sequential",
            remove_unused_columns=False,
        )  # fmt: skip
        constant = torch.optim.lr_scheduler.ConstantLR(run.opt, 1.0)
        trainer = Trainer(
            Module(), args, train_dataset=run.train, optimizers=(run.opt, constant),
            data_collator=named,
        )  # fmt: skip
        loader = DataLoader(run.val.dataset, batch_size=run.val.batch_size, collate_fn=named)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Turns(trainer, loader))
        trainer.train()


def skorch(run: Run) -> None:
    """A net of skorch."""
    from skorch import NeuralNet

    from selftune.integrations.skorch import HyperStep

    class Turns(HyperStep):
        def on_batch_end(self, *args: Any, **kwargs: Any) -> None:
            run.hook(lambda: super(Turns, self).on_batch_end(*args, **kwargs))

    class Made(NeuralNet):
        def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer_ = run.opt
            return self

        def get_loss(self, y_pred: Any, y_true: Any, *args: Any, **kwargs: Any) -> Tensor:
            return run.net.loss(y_pred, y_true)

    net = Made(
        run.model, nn.Identity, iterator_train__batch_size=None, max_epochs=1, train_split=None,
        callbacks=[Turns(run.val)], verbose=0,
    )  # fmt: skip
    net.fit(run.train)


def ignite(run: Run) -> None:
    """An engine of Ignite."""
    from ignite.engine import Engine

    from selftune.integrations.ignite import HyperStep

    class Turns(HyperStep):
        def _hyper_step(self, engine: Engine) -> None:
            run.hook(lambda: super(Turns, self)._hyper_step(engine))

    def update(engine: Engine, batch: Any) -> None:
        run.opt.zero_grad()
        run.loss(run.model, batch).backward()
        run.opt.step()

    trainer = Engine(update)
    Turns(run.opt, run.model, run.val, run.loss).attach(trainer)
    trainer.run(run.loader)


FRAMEWORKS = (lightning, transformers, skorch, ignite)


def measure(net: Net, framework: Callable[[Run], None], rounds: int) -> str:
    """A row of the table, but for names."""
    alone: list[float] = []
    pairs: list[tuple[float, float]] = []
    for _ in range(rounds):
        for loop in (plain, framework):
            run = Run(net)
            loop(run)
            if loop is plain:
                alone += [time for pair in run.blocks() for time in pair]
            else:
                pairs += run.blocks()
    base = statistics.median(alone)
    hand, ours = zip(*pairs, strict=True)
    added = spread([(base + o - h) / base for h, o in pairs])
    inside = spread([o / h for h, o in pairs])
    middle = [f"{statistics.median(times):.2f}" for times in (alone, hand, ours)]
    return f"{' | '.join(middle)} | {added} | {inside}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    known = {framework.__name__: framework for framework in FRAMEWORKS}
    parser.add_argument("--only", nargs="+", choices=known, default=list(known))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("selftune", "lightning.pytorch", "ignite"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(
        "| framework | net | plain loop, ms a step | framework, by hand | framework, callback "
        "| with the callback's overhead ÷ plain (quartiles) | callback ÷ by hand |\n"
        "|---|---|---|---|---|---|---|"
    )
    for framework in (known[name] for name in args.only):
        for label, make in list(NETS.items())[:3]:
            row = measure(make(), framework, args.rounds)
            print(f"| {framework.__name__} | {label} | {row} |", flush=True)


if __name__ == "__main__":
    main()
