"""Hugging Face Trainer. Truth: the same loop by hand, bit for bit; an uninterrupted run."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import copied, dataset, equal, needs, network, run, score, tuned
from torch import nn
from torch.nn.functional import cross_entropy

import selftune as st

pytestmark = needs("transformers")
try:
    from safetensors.torch import load_file
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        EarlyStoppingCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from selftune.integrations.transformers import SelfTuningCallback
except ModuleNotFoundError:
    Trainer = object


class Net(nn.Module):
    """A model as Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Any, labels: Any = None) -> Any:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def rows(size: int, seed: int) -> list[dict[str, Any]]:
    return [{"x": x, "labels": int(y)} for x, y in dataset(size, seed)]


class Made(Trainer):
    """Its optimizer is called with the model, so that BatchNorm is known from the start."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, optimizer_cls_and_kwargs=(lambda: tuned, {}))


def trainer(folder: Path, kind: type = Made, callbacks: Any = (), **options: Any) -> Any:
    defaults = dict(
        num_train_epochs=4, per_device_train_batch_size=16, per_device_eval_batch_size=20,
        lr_scheduler_type="constant", max_grad_norm=0.0, eval_strategy="epoch", use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, train_sampling_strategy="sequential",
        seed=0, logging_strategy="no",
    )  # fmt: skip
    made = kind(
        model=Net(),
        args=TrainingArguments(output_dir=str(folder), **(defaults | options)),
        train_dataset=rows(96, 0), eval_dataset=rows(60, 1), callbacks=list(callbacks),
    )  # fmt: skip
    made.add_callback(SelfTuningCallback(made))
    return made


def weights(state: dict[str, Any]) -> dict[str, Any]:
    return {n.removeprefix("net."): t for n, t in state.items()}


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
        ({"max_grad_norm": 0.1}, {"clip": 0.1}),
        ({"bf16": True}, {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}),
    ],
    ids=["plain", "accumulation", "clipping", "bf16"],
)
def test_as_the_loop_by_hand(tmp_path: Path, options: Any, by_hand: Any) -> None:
    done = trainer(tmp_path, **options)
    done.train()
    model = network()
    opt = tuned(model)
    expected = run(model, opt, **by_hand)
    assert opt.hparams["lr"] != 0.01
    assert done.optimizer.optimizer.hparams == opt.hparams
    assert equal(copied(done.model.net), expected)


def test_score_is_that_of_the_weights_in_the_file(tmp_path: Path) -> None:
    done = trainer(tmp_path, save_strategy="epoch")
    done.train()
    scores = {r["step"]: r["eval_loss"] for r in done.state.log_history if "eval_loss" in r}
    assert list(scores) == [6, 12, 18, 24]
    for step, found in scores.items():
        state = weights(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"))
        assert score(network(), state) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("step", [10, 12, 16])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, step: int) -> None:
    """Saved at evaluations (12), and apart from them."""
    options: Any = dict(save_strategy="steps", save_steps=step)
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    rest = trainer(tmp_path / "rest", **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert rest.optimizer.optimizer.hparams == whole.optimizer.optimizer.hparams
    assert equal(copied(rest.model), copied(whole.model))


def test_best_model_at_the_end(tmp_path: Path) -> None:
    done = trainer(
        tmp_path, save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="loss",
        callbacks=[EarlyStoppingCallback(1, early_stopping_threshold=10.0)],
    )  # fmt: skip
    done.train()
    assert done.state.global_step == 12
    best = load_file(Path(done.state.best_model_checkpoint) / "model.safetensors")
    assert equal(copied(done.model), best)
    assert done.evaluate()["eval_loss"] == pytest.approx(done.state.best_metric, rel=1e-6)
    assert equal(copied(done.model), best)


def test_through_optimizer_cls_and_kwargs(tmp_path: Path) -> None:
    """Truth: the same groups by hand."""
    args = dict(lr=0.01, total_steps=24, every=2)

    class Given(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, optimizer_cls_and_kwargs=(st.AdamW, dict(args)))

    done = trainer(tmp_path, Given, weight_decay=0.1)
    done.train()
    model = network()
    named = list(model.named_parameters())
    decayed, others = ([p for n, p in named if ("bias" in n) == bias] for bias in (False, True))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    opt = st.AdamW(groups, **args)
    expected = run(model, opt)
    assert done.optimizer.optimizer.hparams == opt.hparams
    assert equal(copied(done.model.net), expected)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_logs_hyperparameters(tmp_path: Path, strategy: str) -> None:
    done = trainer(tmp_path, logging_strategy=strategy, logging_steps=4)
    done.train()
    found = [r["hyper/lr"] for r in done.state.log_history if "hyper/lr" in r]
    assert found[-1] == pytest.approx(done.optimizer.optimizer.hparams["lr"])
    losses = [r["step"] for r in done.state.log_history if "loss" in r]
    assert losses == ([4, 8, 12, 16, 20, 24] if strategy == "steps" else [6, 12, 18, 24])


@pytest.mark.parametrize("scheduler", ["constant", "linear"])
def test_logs_the_rate_that_is_applied(tmp_path: Path, scheduler: str) -> None:
    """Truth: what the optimizer says after each step, to the six digits of Trainer's rounding."""
    applied: dict[int, float] = {}

    class Noting(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            group = given["optimizer"].optimizer.param_groups[0]
            applied[state.global_step + 1] = group["applied_lr"]

    done = trainer(
        tmp_path, logging_strategy="steps", logging_steps=3, callbacks=[Noting()],
        lr_scheduler_type=scheduler,
    )  # fmt: skip
    done.train()
    found = {r["step"]: float(r["learning_rate"]) for r in done.state.log_history if "loss" in r}
    assert found == pytest.approx({step: applied[step] for step in found}, rel=1e-5)
    assert len(set(found.values())) > 2


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="AdamW is not self-tuned"):
        trainer(tmp_path, Trainer).train()
    several = trainer(tmp_path)
    several.eval_dataset = {"a": rows(4, 2), "b": rows(4, 3)}
    with pytest.raises(ValueError, match="several datasets"):
        several.train()


def test_a_finished_run_that_is_resumed_has_the_averaged_weights(tmp_path: Path) -> None:
    """Though no step is left to take, and no epoch ends."""
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    words = torch.randint(50, (160, 8), generator=torch.Generator().manual_seed(0))
    found = [{"input_ids": w, "labels": int((w < 25).sum() > 4)} for w in words]
    chosen = {"total_steps": 24, "every": 2, "schedule": "constant", "probe": False}

    def bert(**options: Any) -> Trainer:
        torch.manual_seed(1)
        args = TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=16,
            lr_scheduler_type="linear", use_cpu=True, save_strategy="epoch", report_to=[],
            disable_tqdm=True, seed=0, logging_strategy="no", eval_strategy="epoch",
            weight_decay=0.01, per_device_eval_batch_size=20,
        )  # fmt: skip
        made = Trainer(
            BertForSequenceClassification(config), args, train_dataset=found[:128],
            eval_dataset=found[128:], optimizer_cls_and_kwargs=(st.AdamW, {"lr": 1e-3, **chosen}),
        )  # fmt: skip
        made.add_callback(SelfTuningCallback(made))
        made.train(**options)
        return made

    first = bert()
    again = bert(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    assert equal(copied(again.model), copied(first.model))


def test_a_loss_of_the_users_gets_the_number_of_items(tmp_path: Path) -> None:
    """As in training and evaluation."""
    seen = []

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        seen.append(num_items_in_batch)
        return cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    class Own(Made):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, compute_loss_func=loss)

    trainer(tmp_path, Own, num_train_epochs=1).train()
    assert None not in seen


def test_the_best_model_of_a_finished_run_stays(tmp_path: Path) -> None:
    """A resume with no steps left. Truth: the file, of a run whose best is not the last."""
    options: Any = dict(
        save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    whole = trainer(tmp_path, **options)
    whole.train()
    best = load_file(Path(whole.state.best_model_checkpoint) / "model.safetensors")
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-24"))
    for _ in range(2):
        assert equal(copied(again.model), best)
        assert again.evaluate()["eval_loss"] == pytest.approx(whole.state.best_metric, rel=1e-6)


def test_loaders_that_group_by_length_are_drawn_by_step(tmp_path: Path) -> None:
    """Truth: the uninterrupted run."""
    options: Any = dict(
        train_sampling_strategy="group_by_length", save_strategy="steps", save_steps=5,
    )  # fmt: skip

    def made(folder: str) -> Any:
        one = trainer(tmp_path / folder, **options)
        for rows_of in (one.train_dataset, one.eval_dataset):
            for index, row in enumerate(rows_of):
                row["input_ids"] = [0] * (1 + index % 7)
        one.data_collator = collated
        return one

    def collated(found: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "x": torch.stack([row["x"] for row in found]),
            "labels": torch.tensor([row["labels"] for row in found]),
        }

    whole = made("whole")
    whole.train()
    assert "LengthGrouped" in type(whole._get_eval_sampler(whole.eval_dataset)).__name__
    rest = made("rest")  # seeds torch, as a new process does
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert rest.optimizer.optimizer.hparams == whole.optimizer.optimizer.hparams
    assert equal(copied(rest.model), copied(whole.model))


def test_metrics_that_compute_loss_collects_are_those_of_evaluations(tmp_path: Path) -> None:
    """As TRL's trainers do. Count: the batches of an evaluation."""

    class Collecting(Made):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.kept: Any = {"train": defaultdict(list), "eval": defaultdict(list)}
            self.counts: list[int] = []

        def compute_loss(self, model: Any, *args: Any, **given: Any) -> Any:
            self.kept["train" if model.training else "eval"]["seen"].append(1)
            return super().compute_loss(model, *args, **given)

        def evaluate(self, *args: Any, **given: Any) -> Any:
            found = super().evaluate(*args, **given)
            self.counts.append(len(self.kept["eval"]["seen"]))
            self.kept["eval"].clear()
            return found

    done = trainer(tmp_path, Collecting)
    done.train()
    assert done.counts == [3] * 4
    assert done.optimizer.optimizer.hparams["lr"] != 0.01


def test_other_callbacks_may_evaluate_before(tmp_path: Path) -> None:
    """Truth: the run without these evaluations."""

    class Evaluating(TrainerCallback):
        trainer: Any

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step in (3, 9):
                self.trainer.evaluate()

    callback = Evaluating()
    found = callback.trainer = trainer(tmp_path, callbacks=[callback])
    found.train()
    plain = trainer(tmp_path)
    plain.train()
    assert equal(copied(found.model), copied(plain.model))


class Talking(Made):
    """Logs and sums in ``compute_loss``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sums: dict[str, float] = {"passes": 0}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.sums["passes"] += 1
        self.log({"own": 1.0})
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_what_compute_loss_logs_and_sums_is_that_of_training(tmp_path: Path) -> None:
    """Truth: one pass for each training batch; tuning passes logged and counted, too."""
    options: dict[str, Any] = dict(logging_strategy="steps", logging_steps=3, eval_strategy="no")
    made = trainer(tmp_path, Talking, **options)
    made.add_callback(SelfTuningCallback(made, batches=None))
    made.train()
    steps = made.state.global_step
    assert made.sums["passes"] == steps
    entries = made.state.log_history
    assert sum("own" in entry for entry in entries) == steps
    assert [e["step"] for e in entries if "loss" in e] == [*range(3, steps + 1, 3)]


class Averaging(Made):
    """Adds the mean of a second loss to the next entry, and begins it anew, as TRL's trainers."""

    total, passes = 0.0, 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.total, self.passes = self.total + 1.0, self.passes + 1
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "train_loss" not in logs:
            logs["mean"] = self.total / self.passes
            self.total, self.passes = 0.0, 0
        super().log(logs, *args, **kwargs)


def test_an_entry_has_the_loss_the_hyperparameters_and_the_trainers_own_metrics(
    tmp_path: Path,
) -> None:
    """Hyperparameters had an entry of their own, which took the metrics (a division by zero)."""
    options: dict[str, Any] = dict(logging_strategy="steps", logging_steps=3, eval_strategy="no")
    made = trainer(tmp_path, Averaging, **options)
    made.train()
    entries = [e for e in made.state.log_history if "train_loss" not in e]
    assert [e["step"] for e in entries] == [*range(3, made.state.global_step + 1, 3)]
    assert all({"loss", "mean"} <= set(entry) for entry in entries)
    assert any({"hyper/lr", "lr"} <= set(entry) for entry in entries)
