"""skorch. Truth: the same loop by hand, bit for bit; an uninterrupted run."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import EPOCH, copied, dataset, equal, needs, network, run, score, tuned
from torch import nn

import selftune as st

pytestmark = needs("skorch")
try:
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback, Checkpoint, GradientNormClipping
    from skorch.helper import predefined_split

    from selftune.integrations.skorch import HyperStep
except ModuleNotFoundError:
    NeuralNetClassifier = object


class Net(NeuralNetClassifier):
    """Its optimizer knows the model, so that BatchNorm is known from the start."""

    def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.optimizer_ = tuned(self.module_)
        return self


def net(kind: type = Net, *callbacks: Any, epochs: int = 4, **options: Any) -> Any:
    defaults = dict(
        criterion=nn.CrossEntropyLoss, max_epochs=epochs, batch_size=16, verbose=0,
        iterator_valid__batch_size=20, train_split=predefined_split(dataset(60, 1)),
        callbacks=[HyperStep(), *callbacks], classes=[0, 1],
    )  # fmt: skip
    return kind(network(), **(defaults | options))


def fit(found: Any, **options: Any) -> Any:
    return found.partial_fit(dataset(96, 0), **options)


def position(step: int) -> tuple[int, int]:
    """Epoch and batch."""
    return (step - 1) // EPOCH + 1, (step - 1) % EPOCH + 1


@pytest.mark.parametrize("clip", [None, 0.1])
def test_as_the_loop_by_hand(clip: float | None) -> None:
    done = fit(net(Net, *([GradientNormClipping(clip)] if clip else [])))
    model = network()
    opt = tuned(model)
    expected = run(model, opt, clip=clip, position=position)
    assert opt.hparams["lr"] != 0.01
    assert done.optimizer_.hparams == opt.hparams
    assert equal(copied(done.module_), expected)
    assert done.history[-1, "hyper_lr"] == opt.hparams["lr"]


def test_score_is_that_of_the_weights_in_the_file(tmp_path: Path) -> None:
    saver = Checkpoint(
        dirname=tmp_path, monitor=None, f_params="{last_epoch[epoch]}.pt", f_optimizer=None,
        f_criterion=None, f_history=None,
    )  # fmt: skip
    done = fit(net(Net, saver))
    for row in done.history:
        state = torch.load(tmp_path / f"{row['epoch']}.pt", weights_only=True)
        assert score(network(), state) == pytest.approx(row["valid_loss"], rel=1e-6)


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = fit(net())
    saver = Checkpoint(dirname=tmp_path, monitor=None)
    fit(net(Net, saver, epochs=2))
    rest = net(epochs=2).initialize()
    rest.load_params(checkpoint=saver)
    fit(rest)
    assert rest.optimizer_.hparams == whole.optimizer_.hparams
    assert equal(copied(rest.module_), copied(whole.module_))


def test_goes_on_with_partial_fit() -> None:
    """Truth: the same epochs in one call."""
    whole, parts = fit(net()), net(epochs=2)
    fit(fit(parts))
    assert equal(copied(parts.module_), copied(whole.module_))


def test_by_name_in_a_plain_net() -> None:
    """As users write it: parameters alone, a split of skorch's own."""
    done = NeuralNetClassifier(
        nn.Sequential(nn.Linear(5, 4), nn.Softmax(-1)), optimizer=st.AdamW, lr=0.01, verbose=0,
        optimizer__total_steps=60, optimizer__per={"lr": "tensor"}, callbacks=[HyperStep()],
        max_epochs=60,
    )  # fmt: skip
    x, y = dataset(96, 0).tensors
    done.fit(x.numpy(), y.numpy())
    rates = done.optimizer_.hparams["lr"]
    assert len(rates) == 2
    assert 0.01 not in rates
    assert [done.history[-1, f"hyper_lr_{i}"] for i in range(2)] == rates


def test_refusals() -> None:
    plain = net(NeuralNetClassifier, optimizer=torch.optim.AdamW)
    with pytest.raises(TypeError, match="AdamW is not self-tuned"):
        fit(plain)
    with pytest.raises(ValueError, match="train_split=None"):
        fit(net(train_split=None))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_fitted_net_train_on(how: str) -> None:
    """Truth: the original."""
    done = fit(net(epochs=2))
    other = copy.deepcopy(done) if how == "deepcopy" else pickle.loads(pickle.dumps(done))
    fit(done)
    fit(other)
    assert equal(copied(done.module_), copied(other.module_))


def test_an_interrupted_network_has_the_averaged_weights() -> None:
    """``fit`` ends at Ctrl-C as at its last epoch."""

    class Stop(Callback):
        left = 15

        def on_batch_end(self, net: Any, training: bool = False, **kwargs: Any) -> None:
            self.left -= training
            if self.left == 0:
                raise KeyboardInterrupt

    found = fit(net(Net, Stop()))
    shown = copied(found.module_)
    with found.optimizer_.averaged():
        assert equal(shown, copied(found.module_))


class Smoothed(nn.CrossEntropyLoss):
    """Another loss in training."""

    def forward(self, output: Any, target: Any) -> Any:
        self.label_smoothing = 0.5 if self.training else 0.0
        return super().forward(output, target)


def test_criteria_are_in_evaluation_mode_too() -> None:
    """Truth: the criterion's mode while skorch validates."""
    modes: list[bool] = []

    class Noted(Smoothed):
        def forward(self, output: Any, target: Any) -> Any:
            if not net_.module_.training:
                modes.append(self.training)
            return super().forward(output, target)

    net_ = net(Net, criterion=Noted)
    fit(net_)
    assert modes
    assert not any(modes)
