"""Bad input: an error with argument, value and remedy, and nothing is lost."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import loader, net, points, same, tuner
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import WeightedRandomSampler

import selftune as st
from selftune.tuner._checkpoints import read  # private: a file is read without a run

VAL = [points(100, seed=1)]


def fit(train: Any = None, val: Any = None, run: Any = None, **options: Any) -> Any:
    train = loader() if train is None else train
    options = {"steps": 20, "progress": False} | options
    return (run or tuner()).fit(train, VAL if val is None else val, **options)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 3) + (self.weight if self.training else 0)


def changing() -> list[Any]:
    x, y = points(20)
    return [(x, y), {"x": x, "y": y}]


def not_finite() -> list[Any]:
    x, y = points(20)
    return [(x * math.nan, y)]


CASES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no training batch": (dict(train=[]), ValueError, "train has no batches"),
    "no validation batch": (dict(val=[]), ValueError, "val has no batches"),
    "a loader that drops all": (
        dict(train=loader(10, drop_last=True), epochs=1, steps=None), ValueError, "drop_last",
    ),
    "no iterable": (dict(train=3), TypeError, "train=int must be a DataLoader"),
    "structure": (dict(train=changing()), ValueError, "every batch must have the same structure"),
    "NaN": (dict(train=not_finite()), ValueError, "first train batch is nan, before any training"),
    "NaN in validation": (dict(val=not_finite()), ValueError, "first val batch is nan"),
    "validation tells nothing of the parameters": (
        dict(run=tuner(Constant())), ValueError, "val batch does not depend on the model",
    ),
    "no length": (dict(steps=None), ValueError, "epochs=None, steps=None: pass one"),
    "two lengths": (dict(epochs=2), ValueError, "epochs=2, steps=20: pass one"),
    "no step": (dict(steps=0), ValueError, "steps=0 must be at least 1"),
    "epochs of what has no length": (
        dict(train=iter(list(loader())), epochs=2, steps=None), ValueError, "pass steps= instead",
    ),
    "a generator that ends": (
        dict(train=iter(list(loader()))), ValueError, "ended after 10 batches",
    ),
    "split of a list": (dict(train=list(loader()), val=0.1), ValueError, r"not train \(list\):"),
    "split of nothing": (dict(val=0.001), ValueError, "leaves 0 for validation"),
    "split of all": (dict(val=1.5), ValueError, "val=1.5 must be between 0 and 1"),
    "split of a sampler's order": (
        dict(train=loader(sampler=WeightedRandomSampler(torch.ones(200), 200)), val=0.1),
        ValueError, "sampler=WeightedRandomSampler",
    ),
    "resume without a place": (dict(resume=True), ValueError, "resume=True needs the log_dir"),
    "a file as folder": (dict(log_dir=__file__), ValueError, "a folder, not a file"),
    "resume from nothing": (
        dict(resume="nowhere/last.pt"), FileNotFoundError, "there is no checkpoint nowhere",
    ),
    "a loss that is no scalar": (
        dict(run=st.Tuner(net(), lambda o, t: F.cross_entropy(o, t, reduction="none"))),
        ValueError, "return a scalar",
    ),
    "a loss that is no tensor": (
        dict(run=st.Tuner(net(), lambda o, t: 1.0)), TypeError, "is a float: return a tensor",
    ),
    "no loss": (dict(run=st.Tuner(net())), ValueError, "pass loss_fn="),
    "a metric with a value per example": (
        dict(run=tuner(metrics={"hits": lambda o, t: o.argmax(1) == t})),
        ValueError, r"metrics\['hits'\] returned shape \(100,\) for a batch: return one number",
    ),
    "a metric that returns nothing": (
        dict(run=tuner(metrics={"hits": lambda o, t: None})), ValueError, "returned None for",
    ),
    "a batch without a target": (
        dict(train=[points(20)[0]], run=st.Tuner(net(), F.cross_entropy)), ValueError,
        "objective=lambda model, batch: loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_bad_data_is_refused(case: str) -> None:
    options, error, message = CASES[case]
    with pytest.raises(error, match=message):
        fit(**options)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "every": (dict(every=0), "every=0 must be at least 1"),
    "compile": (dict(compile="always"), "compile='always' must be True or False, or 'auto'"),
    "unknown name": (dict(hparams={"learning_rate": 1.0}), "'learning_rate' is not one of SGD"),
    "another rule's": (dict(hparams={"beta1": 0.9}), "'beta1' is not one of SGD"),
    "negative": (dict(hparams={"lr": -1.0}), "must be finite and above 0"),
    "momentum": (dict(hparams={"momentum": 1.0}), "must be below 1"),
    "tuned name": (dict(tune=("lr", "beta7")), "beta7"),
    "bounds": (dict(bounds={"lr": (1.0, 0.1)}), "bounds"),
    "schedule": (dict(schedule="zigzag"), "zigzag"),
    "population": (dict(population=0), "population=0 must be at least 1"),
    "members that nothing ranks": (
        dict(population=3, guard=False), "ranks its members by the guard's mean",
    ),
    "metrics": (
        dict(metrics={"a": F.mse_loss}, objective=lambda m, b: m(b)), "metrics need outputs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ARGUMENTS))
def test_bad_arguments_are_refused(case: str) -> None:
    options, message = ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        tuner(**options)


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    model = net().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="is nan"):
        fit(val=not_finite(), run=tuner(model))
    assert same(model.state_dict(), before)
    assert not model.training


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(9, 3, max_norm=1.0), "model: 0 has max_norm=1.0"),
        (nn.Embedding(9, 3, sparse=True), "model: 0 gives sparse gradients"),
        (nn.Linear(3, 3, dtype=torch.cfloat), "model: 0.weight is complex"),
        (nn.Linear(3, 3, device="meta"), "model: 0.weight is on the meta device"),
        (nn.LazyLinear(3), "model: 0.weight is not initialised yet"),
    ],
)
def test_models_that_cannot_be_tuned_are_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuner(nn.Sequential(layer))


def test_one_tuner_is_one_run() -> None:
    run = tuner()
    fit(run=run)
    with pytest.raises(RuntimeError, match="make a new Tuner"):
        fit(run=run)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribble(path: Path) -> None:
    path.write_bytes(b"not a checkpoint")


def foreign(path: Path) -> None:
    torch.save({"model": {}}, path)


@pytest.mark.parametrize("damage", [truncate, scribble, foreign])
def test_a_damaged_checkpoint_is_refused_and_the_folder_untouched(
    damage: Any, tmp_path: Path
) -> None:
    fit(log_dir=tmp_path)
    damage(tmp_path / "last.pt")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"damaged|no checkpoint"):
        fit(log_dir=tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_an_incomplete_checkpoint_is_refused_and_the_folder_untouched(tmp_path: Path) -> None:
    fit(log_dir=tmp_path)
    whole = torch.load(tmp_path / "last.pt", weights_only=True)
    for name in ("leaves", "identity", "frozen", "joining"):
        torch.save({n: v for n, v in whole.items() if n != name}, tmp_path / "last.pt")
        before = contents(tmp_path)
        with pytest.raises(
            ValueError, match=f"is not the checkpoint of a run, last.pt: it lacks .*{name}"
        ):
            fit(log_dir=tmp_path, resume=True)
        assert contents(tmp_path) == before


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "model": (dict(model=nn.Sequential(nn.Linear(2, 3))), {}, "parameters"),
    "rule": (dict(rule=st.rules.AdamW(), hparams={}), {}, "rule"),
    "hyperparameters": (dict(tune=("lr",)), {}, "tuned hyperparameters"),
    "a fixed hyperparameter": (
        dict(hparams=dict(lr=0.02, momentum=0.5), tune=("lr",)), {}, "fixed hyperparameters|tuned",
    ),
    "length": ({}, dict(steps=10), "number of steps"),
    "population": (dict(population=2), {}, "population"),
    "activation": (
        dict(model=nn.Sequential(*[nn.Tanh() if isinstance(m, nn.ReLU) else m for m in net()])),
        {}, r"model is \(2\): ReLU\(\) there and \(2\): Tanh\(\) here",
    ),
    "schedule": (dict(schedule="cosine"), {}, "schedule is linear there and cosine here"),
    "bounds": (dict(bounds={"lr": (1e-5, 1.0)}), {}, "bounds"),
    "amp": (dict(amp=True), {}, "amp is False there and True here"),
    "settings": (
        dict(settings=st.method.MethodSettings(unit_gradient=False)), {},
        r"settings\.unit_gradient is True there and False here",
    ),
    "guard": (
        dict(guard=st.control.GuardPolicy(patience=5)), {}, r"guard\.patience is none there and 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(OTHERS))
def test_a_checkpoint_of_another_run_is_refused_and_the_folder_untouched(
    case: str, tmp_path: Path
) -> None:
    fit(log_dir=tmp_path)
    before = contents(tmp_path)
    options, lengths, message = OTHERS[case]
    other = tuner(**options)
    weights = {k: v.clone() for k, v in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"from another run: .*{message}"):
        fit(log_dir=tmp_path, resume=True, run=other, **lengths)
    assert contents(tmp_path) == before
    assert same(other.model.state_dict(), weights)


@pytest.mark.parametrize(
    ("options", "val", "message"),
    [
        ({}, 0.3, r"share of the training data for validation is 0\.2 there and 0\.3 here"),
        ({"seed": 5}, 0.2, "seed is 0 there and 5 here"),
    ],
)
def test_another_split_of_the_data_is_refused(
    options: dict[str, Any], val: float, message: str, tmp_path: Path
) -> None:
    """Otherwise examples that were trained on would be those of the validation."""
    fit(val=0.2, log_dir=tmp_path)
    with pytest.raises(ValueError, match=f"from another run: .*{message}"):
        fit(val=val, log_dir=tmp_path, resume=True, run=tuner(**options))


def test_a_share_may_be_a_number_of_numpy(tmp_path: Path) -> None:
    """Checkpoints hold plain numbers."""
    val = st.HoldOut(share=np.float64(0.2))
    first = fit(val=val, log_dir=tmp_path)
    assert fit(val=val, log_dir=tmp_path, resume=True).best_loss == first.best_loss


def test_a_seed_without_effect_may_change(tmp_path: Path) -> None:
    first = fit(log_dir=tmp_path)
    again = fit(log_dir=tmp_path, resume=True, run=tuner(seed=5))
    assert again.best_loss == first.best_loss


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_bit_is_refused_or_changes_nothing(place: float, tmp_path: Path) -> None:
    """Truth: the checkpoint as it was. Some bits of the file are padding, which holds nothing."""
    fit(log_dir=tmp_path)
    path, held = tmp_path / "last.pt", _tensors(tmp_path / "last.pt")
    whole = path.read_bytes()
    for at in range(int(place * len(whole)), int(place * len(whole)) + 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            found = read(path)
        except ValueError as error:
            assert "damaged" in str(error)  # noqa: PT017 - either is fine
            continue
        assert all(torch.equal(a, b) for a, b in zip(_leaves(found), held, strict=True))


def _leaves(state: Any) -> list[Any]:
    return [t for t in tree_leaves(state) if isinstance(t, torch.Tensor)]


def _tensors(path: Path) -> list[Any]:
    return _leaves(read(path))


HOLDER = """
import sys, time
from pathlib import Path
from filelock import FileLock
lock = FileLock(Path(sys.argv[1]) / "run.lock")
lock.acquire()
(Path(sys.argv[1]) / "run.owner").write_text(sys.argv[2])
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_that_another_process_writes_to_is_refused_until_it_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "selftune")
    owner = {"host": socket.gethostname(), "process": os.getppid(), "since": time.time() - 100}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), json.dumps(owner)], stdout=subprocess.PIPE,
        text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"being written to by process {os.getppid()} on"):
            fit(log_dir=tmp_path)
        assert contents(tmp_path) == before
        holder.kill()
    fit(log_dir=tmp_path)
    assert "did not end its run there" in caplog.text
    assert not (tmp_path / "run.owner").exists()


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    fit(log_dir=tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="already contains a run: pass resume=True"):
        fit(log_dir=tmp_path)
    assert contents(tmp_path) == before


def test_a_path_to_resume_from_does_not_replace_another_run(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    fit(log_dir=here)
    fit(log_dir=there)
    before = contents(here)
    with pytest.raises(ValueError, match="contains another run than resume="):
        fit(log_dir=here, resume=there / "last.pt")
    assert contents(here) == before
    assert fit(log_dir=here, resume=here / "last.pt").steps == 20
    with pytest.raises(ValueError, match=r"best\.pt is not the checkpoint of a run, last\.pt"):
        fit(resume=there / "best.pt")


def test_a_layer_that_a_callback_unfreezes_is_named() -> None:
    model = net()
    model[0].requires_grad_(False)

    def unfreeze(progress: Any) -> None:
        model[0].requires_grad_(True)

    with pytest.raises(ValueError, match=r"requires_grad of 0\.bias, 0\.weight: st\.Tuner trains"):
        fit(run=tuner(model), callbacks=[unfreeze])


def test_a_part_that_no_loss_uses_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    fit(run=tuner(Unused()))
    assert "does not depend on spare.weight, spare.bias: weight decay" in caplog.text


def test_a_converted_model_is_refused() -> None:
    converted = st.hypernet.convert(nn.Sequential(st.nn.Dropout(0.1), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"model\.revert\(\)"):
        st.Tuner(converted, F.cross_entropy)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.LazyLinear(1), "not initialised yet: call the model once"),
        (lambda: nn.Linear(3, 1, device="meta"), r"to_empty\(device=\)"),
        (lambda: nn.Linear(3, 1, dtype=torch.complex64), "torch.view_as_real"),
    ],
)
def test_parameters_without_values_and_complex_ones_are_named(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        st.Tuner(nn.Sequential(make()), nn.MSELoss())


def test_frozen_complex_parameters_are_no_obstacle() -> None:
    """As the tables of rotary embeddings are."""

    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            table = torch.polar(torch.ones(1), torch.ones(1))
            self.table = nn.Parameter(table, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.view_as_real(torch.view_as_complex(x) * self.table))

    x = torch.randn(32, 2)
    batches = [(part, part.sum(1, keepdim=True)) for part in x.split(8)]
    result = st.Tuner(Rotated(), F.mse_loss).fit(batches[:3], batches[3:], epochs=3, progress=False)
    assert math.isfinite(result.best_loss)


def test_another_validation_set_is_named_when_a_run_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Folds of a cross-validation in one folder: the weights were trained on the other's data."""
    first = fit(val=[points(100, seed=5)], log_dir=tmp_path)
    same = fit(val=[points(100, seed=5)], log_dir=tmp_path, resume=True)
    assert same.best_loss == first.best_loss
    assert "on the data of this call" not in caplog.text
    fit(val=[points(100, seed=9)], log_dir=tmp_path, resume=True)
    assert "on the data of this call. If the data are others, use another log_dir" in caplog.text


def test_parameters_outside_of_the_model_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """In loops of torch the optimizer gets them; here only parts of the model are trained."""
    head, frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        inputs = batch[0].clone().requires_grad_()  # as for a gradient penalty
        return F.cross_entropy(frozen(model(inputs)), batch[1])

    def objective(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss(nn.Sequential(model, head), batch)

    def run(objective: Any) -> None:
        fit(run=st.Tuner(net(), objective=objective, probe=False))

    run(loss)
    assert "not trained" not in caplog.text
    run(objective)
    assert caplog.text.count("belong neither to the model nor to loss_fn=: they are not") == 1
    assert "(3, 3)" in caplog.text


def test_errors_of_the_first_pass_name_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    """A second target is taken for an input. Exceptions have notes from Python 3.11 on."""
    x, y = points(20)
    with pytest.raises(TypeError) as failure:
        fit(train=[(x, y, y)])
    notes = getattr(failure.value, "__notes__", [caplog.text])
    assert "on the first train batch. With loss_fn(output, target)" in notes[0]


@pytest.mark.parametrize("name", ["train", "val"])
def test_batches_of_one_example_before_a_batch_norm_are_named(name: str) -> None:
    """Truth: an error with the batch (it was torch's own, about training, for validation too)."""
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x, y = points(20)
    batches = {"train": [(x, y)], "val": [(x, y)]} | {name: [(x[:1], y[:1])]}
    with pytest.raises(ValueError, match=f"the first {name} batch has one example, but BatchNorm"):
        st.Tuner(model, nn.CrossEntropyLoss()).fit(**batches, steps=20, progress=False)
