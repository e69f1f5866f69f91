"""Lightning. Truth: the same loop by hand, bit for bit; an uninterrupted run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tasks import (
    copied,
    dataset,
    equal,
    loss_of,
    needs,
    network,
    run,
    score,
    train_loader,
    tuned,
    val_loader,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = needs("lightning")
try:
    from lightning.fabric import Fabric
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import (
        Callback,
        EarlyStopping,
        EMAWeightAveraging,
        ModelCheckpoint,
        ModelPruning,
        StochasticWeightAveraging,
    )
    from lightning.pytorch.loggers import CSVLogger, Logger
    from lightning.pytorch.utilities import CombinedLoader
    from torchmetrics import SumMetric
    from torchmetrics.classification import MulticlassAccuracy

    from selftune.integrations import ValidationBatches
    from selftune.integrations.lightning import RAW, SelfTuning
except ModuleNotFoundError:
    LightningModule = Logger = Callback = object


class Net(LightningModule):
    """As users write it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net, self.options = network(), options
        self.accuracy = MulticlassAccuracy(2)
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = loss_of(self.net, batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = loss_of(self.net, batch)
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss)
        self.log("accuracy", self.accuracy)
        return loss

    def configure_optimizers(self) -> Any:
        return tuned(self.net, **self.options)


def trainer(
    folder: Path, *callbacks: Any, epochs: int = 4, batches: Any = None, **options: Any
) -> Any:
    return Trainer(
        callbacks=[SelfTuning(batches), *callbacks], max_epochs=epochs, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        **{"enable_checkpointing": bool(callbacks), "logger": False, **options},
    )  # fmt: skip


def fit(module: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    found = trainer(folder, *callbacks, **options)
    found.fit(module, train_loader(), val_loader())
    return found


@pytest.mark.parametrize(
    ("lightning", "by_hand"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
        (
            {"precision": "bf16-mixed"},
            {"autocast": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)},
        ),
    ],
    ids=["plain", "accumulation", "clipping", "bf16-mixed"],
)
def test_as_the_loop_by_hand(tmp_path: Path, lightning: Any, by_hand: Any) -> None:
    module = Net()
    done = fit(module, tmp_path, **lightning)
    model = network()
    opt = tuned(model)
    weights = run(model, opt, **by_hand)
    assert opt.hparams["lr"] != 0.01
    assert done.optimizers[0].hparams == opt.hparams
    assert equal(copied(module.net), weights)


def test_16_mixed_on_the_cpu(tmp_path: Path) -> None:
    """Truth: finite weights and a tuned rate. Lightning's plugin has float16 on a CPU, not it."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    module = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    done = fit(module, tmp_path, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert done.optimizers[0].hparams["lr"] != 0.01
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


@pytest.mark.parametrize("weights_only", [False, True])
def test_score_is_that_of_the_weights_in_the_file(tmp_path: Path, weights_only: bool) -> None:
    saver = ModelCheckpoint(
        tmp_path, monitor="val_loss", save_top_k=-1, save_weights_only=weights_only
    )
    fit(Net(), tmp_path, saver)
    assert len(saver.best_k_models) == 4
    for path, found in saver.best_k_models.items():
        state = torch.load(path, weights_only=True)["state_dict"]
        weights = {n.removeprefix("net."): t for n, t in state.items() if n.startswith("net.")}
        assert score(network(), weights) == pytest.approx(float(found), rel=1e-6)


@pytest.mark.parametrize("at", [2, 3])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, at: int) -> None:
    whole, half, rest = Net(), Net(), Net()
    end = fit(whole, tmp_path)
    fit(half, tmp_path, ModelCheckpoint(tmp_path, save_last=True), epochs=at)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not equal(saved[RAW], saved["state_dict"])
    resumed = trainer(tmp_path, ModelCheckpoint(tmp_path, save_last=True))
    resumed.fit(rest, train_loader(), val_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert equal(copied(rest), copied(whole))
    assert resumed.optimizers[0].hparams == end.optimizers[0].hparams


def test_saved_after_the_end_too(tmp_path: Path) -> None:
    """Truth: the state that the run's own checkpoint of its last step holds."""
    done = fit(Net(), tmp_path, ModelCheckpoint(tmp_path, save_last=True))
    done.save_checkpoint(tmp_path / "after.ckpt")
    last, after = (torch.load(tmp_path / f, weights_only=True) for f in ("last.ckpt", "after.ckpt"))
    assert equal(last["state_dict"], after["state_dict"])
    assert equal(last[RAW], after[RAW])


def test_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Truth: the by-hand run at that step."""
    fit(Net(), tmp_path, ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1),
        val_check_interval=4)  # fmt: skip
    model = network()
    opt = tuned(model)
    weights = run(model, opt, epochs=1)
    saved = torch.load(next(tmp_path.glob("*step=6.ckpt")), weights_only=True)
    state = {n.removeprefix("net."): t for n, t in saved["state_dict"].items() if n[:4] == "net."}
    assert equal(state, weights)
    raw = {n.removeprefix("net."): t for n, t in saved[RAW].items() if n[:4] == "net."}
    assert equal(raw, copied(model))


def test_early_stopping(tmp_path: Path) -> None:
    module = Net()
    stopper = EarlyStopping("val_loss", min_delta=10.0, patience=1)
    done = fit(module, tmp_path, stopper, enable_checkpointing=False)
    assert done.current_epoch == 2
    model = network()
    assert equal(copied(module.net), run(model, tuned(model), epochs=2))


def test_hyper_steps_leave_logs_and_metrics_alone(tmp_path: Path) -> None:
    """Truth: the accuracy counted by hand, on exactly the validation set."""
    counts = []

    class Watched(Net):
        def on_validation_epoch_end(self) -> None:
            counts.append(int(self.accuracy.tp.sum() + self.accuracy.fn.sum()))

        def on_train_batch_end(self, *args: Any) -> None:
            assert self.trainer.callback_metrics.get("hyper") is None

    fit(Watched(), tmp_path, num_sanity_val_steps=0)
    assert counts == [60] * 4


def test_logs_hyperparameters(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    done = fit(Net(), tmp_path, logger=logger, log_every_n_steps=1)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("hyper/lr")
    values = [float(r.split(",")[column]) for r in rows[1:] if r.split(",")[column]]
    assert values[-1] == pytest.approx(done.optimizers[0].hparams["lr"])


def test_training_step_where_validation_step_returns_nothing(tmp_path: Path) -> None:
    class Quiet(Net):
        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", loss_of(self.net, batch))

    module = Quiet()
    fit(module, tmp_path)
    model = network()
    assert equal(copied(module.net), run(model, tuned(model)))


class Plain(LightningModule):
    """A plain optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any) -> Any:
        return loss_of(self.net, batch)

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"AdamW.*self-tuned"):
        fit(Plain(), tmp_path)

    class Two(Net):
        def configure_optimizers(self) -> Any:
            return [tuned(self.net), tuned(self.net)]

        automatic_optimization = False

    with pytest.raises(ValueError, match="2 self-tuned optimizers"):
        fit(Two(), tmp_path)

    class Unvalidated(Net):
        validation_step = None

    with pytest.raises(ValueError, match="no validation loader"):
        trainer(tmp_path).fit(Unvalidated(), train_loader())

    class Lossless(Net):
        def validation_step(self, batch: Any) -> Any:
            return None

        def training_step(self, batch: Any) -> Any:
            return loss_of(self.net, batch) if self.training else None

    with pytest.raises(ValueError, match="returned no loss: return one"):
        fit(Lossless(), tmp_path)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Truth: DistributedDataParallel by hand, in the script; the ranks agree."""
    script = Path(__file__).with_name("lightning_ddp.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    command = [sys.executable, str(script), str(tmp_path)]
    for _ in range(2):
        run = subprocess.run(command, timeout=300, env=environment, capture_output=True, text=True)
        if "Address already in use" not in run.stderr:  # Lightning's port, taken meanwhile
            break
    assert run.returncode == 0, run.stderr
    one, two, by_hand = (torch.load(tmp_path / f"{n}.pt") for n in ("0", "1", "by-hand-0"))
    assert one["hparams"] == two["hparams"] == by_hand["hparams"]
    assert equal(one["weights"], two["weights"])
    assert equal(one["weights"], by_hand["weights"])


class Paired(Net):
    """Validates on a batch of each of two loaders at a time."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return loss_of(self.net, batch["a"]) + loss_of(self.net, batch["b"])


def test_combined_loaders_need_batches(tmp_path: Path) -> None:
    """The error names them, and they tune the run."""
    combined = CombinedLoader({"a": val_loader(), "b": val_loader()}, "min_size")
    found = trainer(tmp_path, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"mode='min_size'.*SelfTuning\(batches\)"):
        found.fit(Paired(), train_loader(), combined)
    batches = [batch for batch, *_ in combined]
    found = trainer(tmp_path, batches=batches, num_sanity_val_steps=0)
    found.fit(Paired(), train_loader(), combined)
    assert found.optimizers[0].hparams["lr"] != 0.01


class Gathering(Net):
    """Gathers outputs for the end of a validation epoch, and has an index of the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []
        self.gathered: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        assert dataloader_idx in (0, 1)
        loss = loss_of(self.net, batch)
        self.outputs.append(loss)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.gathered.append(len(self.outputs))
        self.outputs.clear()


def test_outputs_gathered_for_the_end_of_an_epoch_are_those_of_validation(tmp_path: Path) -> None:
    """By hand: two loaders of three batches; hyperparameter steps use the first."""
    module = Gathering()
    found = trainer(tmp_path, num_sanity_val_steps=0)
    found.fit(module, train_loader(), [val_loader(), val_loader()])
    assert module.gathered == [6] * 4
    assert found.optimizers[0].hparams["lr"] != 0.01


def test_outputs_collected_in_dictionaries_and_submodules_are_those_of_validation(
    tmp_path: Path,
) -> None:
    """Count: one epoch of validation batches, none of those of hyperparameter steps."""

    class Collects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

    class Gathers(Net):
        def __init__(self) -> None:
            super().__init__()
            self.outs: dict[str, list[float]] = defaultdict(list)
            self.part, self.counts = Collects(), []

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().validation_step(batch, batch_idx)
            self.outs["loss"].append(float(loss.detach()))
            self.part.losses.append(float(loss.detach()))
            return loss

        def on_validation_epoch_end(self) -> None:
            self.counts.append((len(self.outs["loss"]), len(self.part.losses)))
            self.outs.clear()
            self.part.losses.clear()

    module = Gathers()
    fit(module, tmp_path, epochs=2, num_sanity_val_steps=0)
    assert module.counts == [(len(val_loader()),) * 2] * 2


def test_augmentations_of_training_batches_leave_those_of_tuning(tmp_path: Path) -> None:
    """As Lightning documents them: in a hook that asks ``trainer.training``."""
    seen = []

    class Augmented(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [0 * batch[0], batch[1]] if self.trainer.training else batch

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((self.trainer.validating, bool(batch[0].any())))
            return super().validation_step(batch, batch_idx)

    fit(Augmented(), tmp_path, num_sanity_val_steps=0)
    assert set(seen) == {(True, True)}


def test_a_manual_training_step_is_not_taken_for_a_loss(tmp_path: Path) -> None:
    class Manual(Net):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(loss_of(self.net, batch))
            self.optimizers().step()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", loss_of(self.net, batch))

    with pytest.raises(ValueError, match=r"validation_step .* returned no loss.*SelfTuning\(loss="):
        fit(Manual(), tmp_path)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_validation_batches_of_fabric_are_drawn_by_step(precision: Any) -> None:
    """Twice the same; and a model that is converted after its optimizer was made."""
    fabric = Fabric(accelerator="cpu", precision=precision)
    model = network()
    net, opt = fabric.setup(model, tuned(model))
    train, val = fabric.setup_dataloaders(train_loader(), val_loader())
    batches = ValidationBatches(val)
    one, other = (next(batches.at(7)) for _ in range(2))
    assert torch.equal(one[0], other[0])
    for step, batch in enumerate(train):
        opt.zero_grad()
        fabric.backward(loss_of(net, batch))
        opt.step()
        opt.hyper_step(lambda step=step: loss_of(net, next(batches.at(step))))
    assert all(p.isfinite().all() for p in model.parameters())


def test_counts_are_those_of_validation(tmp_path: Path) -> None:
    """Numbers, tensors, buffers and nested lists. Count: the examples of an epoch."""

    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.examples, self.tensor = 0, torch.zeros(())
            self.register_buffer("counted", torch.zeros(()))
            self.outputs: list[list[int]] = [[]]
            self.found: list[tuple[float, ...]] = []

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            size = len(batch[0])
            self.examples += size
            self.tensor = self.tensor + size
            self.counted += size
            self.outputs[0].append(size)
            return super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            counts = (self.examples, self.tensor, self.counted, sum(self.outputs[0]))
            self.found.append(tuple(map(float, counts)))
            self.examples, self.tensor = 0, torch.zeros(())
            self.counted.zero_()
            self.outputs[0].clear()

    module = Counting()
    done = fit(module, tmp_path, num_sanity_val_steps=0)
    assert module.found == [(60.0,) * 4] * 4
    assert done.optimizers[0].hparams["lr"] != 0.01


def test_loggers_are_not_called_by_tuning_passes(tmp_path: Path) -> None:
    class Kept(Logger):
        name, version = "kept", 0

        def __init__(self) -> None:
            super().__init__()
            self.images, self.scalars = 0, 0

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            self.scalars += "hyper/lr" in metrics

        def log_image(self) -> None:
            self.images += 1

    class Painting(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 0:
                self.logger.log_image()
            return super().validation_step(batch, batch_idx)

    kept = Kept()
    fit(Painting(), tmp_path, num_sanity_val_steps=0, logger=kept, log_every_n_steps=1)
    assert kept.images == 4  # epochs
    assert kept.scalars > 4


def test_callbacks_that_average_too_are_refused(tmp_path: Path) -> None:
    for other in (StochasticWeightAveraging(0.01), EMAWeightAveraging()):
        match = f"callbacks: {type(other).__name__} puts its averaged weights"
        with pytest.raises(ValueError, match=match):
            fit(Net(), tmp_path, other)


def test_reloaded_validation_sets_are_tuned_on(tmp_path: Path) -> None:
    """Each epoch has labels of its own."""
    seen: list[tuple[bool, int, int]] = []

    class Reloading(Net):
        def train_dataloader(self) -> Any:
            return train_loader()

        def val_dataloader(self) -> Any:
            x, y = dataset(60, 1).tensors
            return DataLoader(TensorDataset(x, 0 * y + self.current_epoch % 2), batch_size=20)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((self.at, self.current_epoch, int(batch[1][0])))
            return super().validation_step(batch, batch_idx)

        at = False

        def on_validation_start(self) -> None:
            self.at = True

        def on_validation_end(self) -> None:
            self.at = False

    module = Reloading()
    found = trainer(tmp_path, num_sanity_val_steps=0, reload_dataloaders_every_n_epochs=1)
    found.fit(module)
    validated = {(epoch, label) for at, epoch, label in seen if at}
    tuned_on = {(epoch, label) for at, epoch, label in seen if not at}
    assert validated == {(0, 0), (1, 1), (2, 0), (3, 1)}
    # The loader of an epoch is known from its validation on, at the end of the epoch.
    assert tuned_on <= {(0, 0), (1, 0), (2, 1), (3, 0), *validated}
    assert (2, 1) in tuned_on


class Meter:
    """As in torch's ImageNet example."""

    def __init__(self) -> None:
        self.count = 0
        self.within: Any = None


class Recording(Net):
    """Counts the examples of a validation in several ways."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.names = {i: f"class {i}" for i in range(1000)}  # entries that need no look
        self.begin()

    def begin(self) -> None:
        self.entry, self.tensors = {"n": 0}, {"n": torch.zeros(())}
        self.array, self.queue = np.zeros(2), deque()
        self.pair, self.meter, self.large = [0], Meter(), torch.zeros(50, 50)
        self.none: Any = None
        self.replaced, self.two, self.ids = np.zeros(0), (0, 0.0), set[int]()
        self.meters, self.inner, self.metrics = {"n": Meter()}, [Meter()], {"n": SumMetric()}
        self.inner[0].within = Meter()
        vars(self).pop("lazy", None)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        size = len(batch[0])
        self.entry["n"] += size
        self.tensors["n"] += size
        self.array += size
        self.queue.extend(range(size))
        self.pair[0] += size
        self.meter.count += size
        self.large += size
        self.none = size + (self.none or 0)
        self.replaced = np.concatenate([self.replaced, np.zeros(size)])
        self.two = (self.two[0] + size, 0.0)
        self.ids |= set(range(len(self.ids), len(self.ids) + size))
        self.meters["n"].count += size
        self.inner[0].within.count += size
        self.metrics["n"].update(size)
        self.lazy = getattr(self, "lazy", 0) + size
        return super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.counts = {
            self.entry["n"], int(self.tensors["n"]), int(self.array[0]), len(self.queue),
            self.pair[0], self.meter.count, int(self.large[0, 0]), self.none, len(self.replaced),
            self.two[0], len(self.ids), self.meters["n"].count, self.inner[0].within.count,
            int(self.metrics["n"].compute()), self.lazy,
        }  # fmt: skip
        self.begin()


def test_records_of_any_kind_are_those_of_validations(tmp_path: Path) -> None:
    """Truth: 60 validation examples, an interval of one batch between validations."""
    module = Recording()
    trainer(tmp_path, val_check_interval=2).fit(module, train_loader(), val_loader())
    assert module.counts == {60}


class Predicting(Net):
    """Returns no loss in validation, and reads the logger's folder."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.logger is not None:
            self.folder = self.logger.save_dir
        return self.net(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return loss_of(self.net, batch)


def test_predictions_are_not_taken_for_a_loss(tmp_path: Path) -> None:
    module, logger = Predicting(), CSVLogger(tmp_path)
    trainer(tmp_path, logger=logger, log_every_n_steps=1).fit(module, train_loader(), val_loader())
    assert module.optimizers().hparams["lr"] != 0.01
    assert module.folder == str(tmp_path)


def test_nested_loaders_are_tuned_on_the_first(tmp_path: Path) -> None:
    class Several(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return super().validation_step(batch, batch_idx)

    loaders = [[val_loader(), val_loader()], val_loader()]
    module = Several()
    trainer(tmp_path).fit(module, train_loader(), loaders)
    assert module.optimizers().hparams["lr"] != 0.01


class Renaming(Callback):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"renamed.{n}": t for n, t in state.items()}


def test_checkpoints_lose_no_weights_to_other_callbacks(tmp_path: Path) -> None:
    """Files had no weights, without a message."""
    module = Net()
    made = trainer(tmp_path)
    made.callbacks.insert(0, Renaming())
    made.fit(module, train_loader(), val_loader())
    with pytest.raises(ValueError, match=r"renamed.net.* put SelfTuning before it"):
        made.save_checkpoint(tmp_path / "lost.ckpt")
    with pytest.raises(ValueError, match="ModelPruning saves weights under other names"):
        fit(Net(), tmp_path, ModelPruning("l1_unstructured", amount=0.5))


def test_a_finished_run_that_is_resumed_ends_at_the_averaged_weights(tmp_path: Path) -> None:
    """Truth: the run that finished; Lightning skips ``on_train_end`` where no step is left."""
    module = Net()
    keep = lambda: ModelCheckpoint(tmp_path, save_last=True)  # noqa: E731
    fit(module, tmp_path, keep())
    again = Net()
    trainer(tmp_path, keep(), num_sanity_val_steps=0).fit(
        again, train_loader(), val_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False
    )
    assert equal(again.net.state_dict(), module.net.state_dict())
