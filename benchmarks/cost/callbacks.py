"""What the callbacks of frameworks cost beside ``hyper_step`` called by hand.

    python -m benchmarks.cost.callbacks [--rounds 15] [--only lightning]

Three runs of the same self-tuned steps (AdamW, a hyperparameter step every five steps): the plain
loop without a framework; the framework with a hook of one line that calls ``hyper_step`` on the
next batch of a validation loader; the framework with our callback, which draws the batch by
(seed, step), switches modes, moves, casts and logs. Rounds are interleaved; times are those of the
process, on one thread, since the machine is shared. The callback's overhead
is (callback − by hand), and the ratio (plain + overhead) ÷ plain: the target is 1.05 at most. The
last column, callback ÷ by hand, is in the framework's own time. Evaluations and checkpoints are
left out. Typical output is kept in ``docs/integrations/index.md``.
"""

from __future__ import annotations

import argparse
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

STEPS, FIRST = 110, 10  # of a run; the first are not timed
Value = Callable[[], Tensor]


class Timed(Dataset):
    """Training batches, and the process time when each was asked for."""

    def __init__(self, net: Net) -> None:
        self.batches, self.seen = net.batches[:-2], [0.0] * 0

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> Any:
        self.seen.append(time.process_time())
        return self.batches[index % len(self.batches)]

    def step(self) -> float:
        """Milliseconds a step."""
        return 1e3 * (self.seen[STEPS - 1] - self.seen[FIRST]) / (STEPS - 1 - FIRST)


class Run:
    """What all runs share: model, optimizer, data."""

    def __init__(self, net: Net) -> None:
        torch.manual_seed(0)
        self.net, self.model, self.train = net, net.make(), Timed(net)
        x, y = net.batches[-1]
        self.val = DataLoader(TensorDataset(x, y), batch_size=len(x))
        self.opt = st.AdamW(self.model, lr=1e-3, every=5, probe=False)
        self.loader = DataLoader(self.train, batch_size=None)
        self.drawn = self.stream()

    def stream(self) -> Iterator[Any]:
        while True:
            yield from self.val

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.net.loss(model(batch[0]), batch[1])

    def by_hand(self) -> None:
        """One line of a user's hook."""
        self.opt.hyper_step(lambda: self.loss(self.model, next(self.drawn)))


def plain(run: Run, ours: bool) -> None:
    """The loop without a framework."""
    for batch in run.loader:
        run.opt.zero_grad()
        run.loss(run.model, batch).backward()
        run.opt.step()
        run.by_hand()


def lightning(run: Run, ours: bool) -> None:
    """Lightning's Trainer."""
    from lightning.pytorch import Callback, LightningModule, Trainer

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

    class Hook(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            run.by_hand()

    trainer = Trainer(
        callbacks=[SelfTuning() if ours else Hook()], max_epochs=1, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=0, check_val_every_n_epoch=10,
    )  # fmt: skip
    trainer.fit(Module(), run.loader, run.val)


def transformers(run: Run, ours: bool) -> None:
    """Hugging Face's Trainer."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from selftune.integrations.transformers import SelfTuningCallback

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = run.model

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return {"loss": run.loss(self.model, (x, labels))}

    class Hook(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            run.by_hand()

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
        trainer.add_callback(SelfTuningCallback(trainer, loader) if ours else Hook())
        trainer.train()


def skorch(run: Run, ours: bool) -> None:
    """A net of skorch."""
    from skorch import NeuralNet
    from skorch.callbacks import Callback

    from selftune.integrations.skorch import HyperStep

    class Hook(Callback):
        def on_batch_end(self, net: Any, training: bool = False, **kwargs: Any) -> None:
            run.by_hand()

    class Made(NeuralNet):
        def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer_ = run.opt
            return self

        def get_loss(self, y_pred: Any, y_true: Any, *args: Any, **kwargs: Any) -> Tensor:
            return run.net.loss(y_pred, y_true)

    net = Made(
        run.model, nn.Identity, iterator_train__batch_size=None, max_epochs=1, train_split=None,
        callbacks=[HyperStep(run.val) if ours else Hook()], verbose=0,
    )  # fmt: skip
    net.fit(run.train)


def ignite(run: Run, ours: bool) -> None:
    """An engine of Ignite."""
    from ignite.engine import Engine, Events

    from selftune.integrations.ignite import HyperStep

    def update(engine: Engine, batch: Any) -> None:
        run.opt.zero_grad()
        run.loss(run.model, batch).backward()
        run.opt.step()

    trainer = Engine(update)
    if ours:
        HyperStep(run.opt, run.model, run.val, run.loss).attach(trainer)
    else:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: run.by_hand())
    trainer.run(run.loader)


FRAMEWORKS = (lightning, transformers, skorch, ignite)


def measure(net: Net, framework: Callable[[Run, bool], None], rounds: int) -> str:
    """A row of the table, but for names."""
    ways = {"plain": (plain, False), "by hand": (framework, False), "ours": (framework, True)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (loop, ours) in ways.items():
            run = Run(net)
            loop(run, ours)
            if turn:  # the first warms up
                found[name].append(run.train.step())
    loops = list(zip(*found.values(), strict=True))
    added = spread([(p + ours - hand) / p for p, hand, ours in loops])
    inside = spread([ours / hand for _, hand, ours in loops])
    middle = [f"{statistics.median(times):.2f}" for times in found.values()]
    return f"{' | '.join(middle)} | {added} | {inside}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="a framework")
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
    for framework in FRAMEWORKS:
        if args.only not in framework.__name__:
            continue
        for label, make in list(NETS.items())[:3]:
            row = measure(make(), framework, args.rounds)
            print(f"| {framework.__name__} | {label} | {row} |", flush=True)


if __name__ == "__main__":
    main()
