"""Ignite. Truth: the same loop by hand, bit for bit; an uninterrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import (
    copied,
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

pytestmark = needs("ignite")
try:
    from ignite.engine import Engine, Events, create_supervised_evaluator
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.metrics import Loss

    from selftune.integrations.ignite import HyperStep
except ModuleNotFoundError:
    pass


def parts(folder: Path | None = None) -> Any:
    """Model, optimizer, trainer, and the scores of every epoch."""
    model = network()
    opt, scores = tuned(model), []

    def update(engine: Any, batch: Any) -> None:
        model.train()
        opt.zero_grad()
        loss_of(model, batch).backward()
        opt.step()

    trainer = Engine(update)
    loss = Loss(torch.nn.functional.cross_entropy)
    evaluator = create_supervised_evaluator(model, {"loss": loss})
    HyperStep(opt, model, val_loader(), loss_of).attach(trainer, evaluator)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate() -> None:
        evaluator.run(val_loader())
        scores.append(evaluator.state.metrics["loss"])

    objects = {"model": model, "opt": opt, "trainer": trainer}
    if folder is not None:
        saver = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=None)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
    return objects, scores


def test_as_the_loop_by_hand() -> None:
    objects, _ = parts()
    objects["trainer"].run(train_loader(), max_epochs=4)
    model = network()
    opt = tuned(model)
    expected = run(model, opt)
    assert opt.hparams["lr"] != 0.01
    assert objects["opt"].hparams == opt.hparams
    assert equal(copied(objects["model"]), expected)


def test_score_is_that_of_the_weights_in_the_file(tmp_path: Path) -> None:
    objects, scores = parts(tmp_path)
    objects["trainer"].run(train_loader(), max_epochs=4)
    for epoch, found in enumerate(scores):
        state = torch.load(tmp_path / f"checkpoint_{6 * epoch + 6}.pt", weights_only=True)["model"]
        assert score(network(), state) == pytest.approx(found, rel=1e-6)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = parts(tmp_path)
    whole["trainer"].run(train_loader(), max_epochs=4)
    rest, _ = parts()
    saved = torch.load(tmp_path / "checkpoint_12.pt", weights_only=True)
    Checkpoint.load_objects(rest, saved)
    rest["trainer"].run(train_loader(), max_epochs=4)
    assert rest["opt"].hparams == whole["opt"].hparams
    assert equal(copied(rest["model"]), copied(whole["model"]))


def test_refuses_a_plain_optimizer() -> None:
    model = network()
    with pytest.raises(TypeError, match="SGD is not self-tuned"):
        HyperStep(torch.optim.SGD(model.parameters()), model, val_loader(), loss_of)


def test_an_evaluation_may_come_before_the_hyperparameter_step() -> None:
    """Truth: the run without it."""
    ends = []
    for early in (False, True):
        model = network()
        opt = tuned(model)

        def update(engine: Any, batch: Any, model: Any = model, opt: Any = opt) -> None:
            model.train()
            opt.zero_grad()
            loss_of(model, batch).backward()
            opt.step()

        trainer, evaluator = Engine(update), create_supervised_evaluator(model)
        if early:
            every = Events.ITERATION_COMPLETED(every=3)
            trainer.add_event_handler(every, lambda engine, e=evaluator: e.run(val_loader()))
        HyperStep(opt, model, val_loader(), loss_of).attach(trainer, evaluator)
        trainer.run(train_loader(), max_epochs=4)
        ends.append(copied(model))
    assert equal(*ends)
