"""Selection with units removed within the runs. Truths: counts by hand, the reported loss."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from selftune import search
from selftune.search import families
from selftune.structure import gated


def data() -> tuple[list[Any], list[Any]]:
    """A quadratic of four numbers."""
    x = torch.randn(320, 4, generator=torch.Generator().manual_seed(0))
    batches = list(zip(x.split(32), x.square().sum(1, keepdim=True).split(32), strict=True))
    return batches[:7], batches[7:]


def build(space: search.Space) -> nn.Module:
    """A hidden layer, of 32 units if they are removed within the run."""
    width = space.suggest_width("width", (8, 16, 32))
    act = space.suggest_categorical("act", ("relu", "tanh"))
    layers = [nn.Linear(4, width), nn.ReLU() if act == "relu" else nn.Tanh()]
    return nn.Sequential(*layers, *space.gates(width), nn.Linear(width, 1))


QUICK: dict[str, Any] = dict(
    steps=40, loss_fn=F.mse_loss, progress=False, pruner=None, tuner=dict(compile=False),
)  # fmt: skip


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(x[0], y[0]) for x, y in data()[0]])


def test_a_stream_in_a_loader_has_no_length() -> None:
    """As a stream of batches: its runs are of the given steps."""
    found = search.select(
        build, DataLoader(Stream(), 4), data()[1], trials=1, structure="inside", **QUICK
    )
    assert found.sizes["units"] == [16]
    with pytest.raises(RuntimeError, match="needs the length of the run, at least 2 steps"):
        search.select(
            build, DataLoader(Stream(), 4), data()[1], trials=1, structure="inside",
            **{**QUICK, "steps": None}, epochs=2,
        )  # fmt: skip


def loss_of(model: nn.Module | None, val: list[Any], loss: Any = F.mse_loss) -> float:
    """The mean loss of a model over the validation set."""
    assert model is not None
    x, y = (torch.cat(parts) for parts in zip(*val, strict=True))
    with torch.no_grad():
        return float(loss(model(x), y))


def test_a_model_is_cut_and_its_width_is_not_searched() -> None:
    """Count: 80 of 160 multiply-adds are 16 units of 5; 97 parameters. The loss is the model's."""
    train, val = data()
    found = search.select(build, train, val, trials=2, structure="inside", **QUICK)
    assert {n for t in found.study.trials for n in t.params} == {"act"}
    assert found.sizes == {"units": [16], "parameters": 97}
    assert found.params["units"] == [16]
    assert "parameters=97" in found.table()
    assert found.model is not None
    assert not list(gated(found.model))
    assert found.model[0].weight.shape == (16, 4)
    assert sum(p.numel() for p in found.model.parameters()) == 97
    assert loss_of(found.model, val) == pytest.approx(found.value, rel=1e-5)
    assert all(t.user_attrs["steps"] == 40 for t in found.study.trials)


@pytest.mark.parametrize(
    ("structure", "units"),
    [(dict(budget=0.5), 15), (dict(budget=0.25, of="multiply_adds"), 8), (dict(tolerance=1e9), 1)],
)
def test_the_goal_can_be_set(structure: dict[str, Any], units: int) -> None:
    """Count: half of 193 parameters are 15 units of 6 and a bias, 40 multiply-adds 8 of 5."""
    train, val = data()
    found = search.select(build, train, val, trials=1, structure=structure, **QUICK)
    assert found.sizes["units"] == [units]


def test_the_weights_are_read_in_another_call(tmp_path: Path) -> None:
    """Truth: the model that the first call returned, and after the loss of its file, its size."""
    train, val = data()
    given: dict[str, Any] = dict(structure="inside", storage=tmp_path / "a.journal", trials=1)
    first = search.select(build, train, val, **given, **QUICK)
    again = search.select(build, train, val, **given, **QUICK)
    x = val[0][0]
    assert first.model is not None
    assert again.model is not None
    torch.testing.assert_close(again.model(x), first.model(x))
    for file in tmp_path.glob("**/*.pt"):
        file.unlink()
    trained = search.select(build, train, val, **given, **QUICK)
    assert trained.model is not None
    assert trained.model[0].out_features == 16
    with pytest.raises(ValueError, match=r"structure: there .* here None"):
        search.select(build, train, val, **{**given, "structure": None}, **QUICK)


def test_a_share_of_the_data_validates() -> None:
    x, y = (torch.cat(parts) for parts in zip(*data()[0], strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
    found = search.select(
        build, loader, 0.3, trials=1, structure="inside", metric="error",
        **{**QUICK, "tuner": dict(compile=False, metrics=dict(error=F.l1_loss))},
    )  # fmt: skip
    assert found.sizes["units"] == [16]


def test_what_does_not_fit_is_named() -> None:
    train, val = data()
    given: dict[str, Any] = dict(structure="inside", trials=1, **QUICK)
    with pytest.raises(RuntimeError, match=r"candidates\['model'\] built a model without gates"):
        search.select(lambda space: nn.Linear(4, 1), train, val, **given)
    with pytest.raises(RuntimeError, match=r"candidates\['model'\] returned a float"):
        search.select(lambda space: 1.0, train, val, **given)
    with pytest.raises(RuntimeError, match="rnn has no gates"):
        search.select({"rnn": families.RNN(search.Shape.of(train))}, train, val, **given)
    with pytest.raises(RuntimeError, match="at least 2 steps, not 1"):
        search.select(build, train, val, **{**given, "steps": 1})
    for wrong in ("outside", dict(width=3), 1):
        with pytest.raises(ValueError, match=r"must be .inside., a mapping"):
            search.select(build, train, val, **{**given, "structure": wrong})
    with pytest.raises(ValueError, match=r"end=1.5 must be above 0 and below 1"):
        search.select(build, train, val, **{**given, "structure": dict(end=1.5)})


def test_the_grid_has_no_widths() -> None:
    train, val = data()
    found = search.select(build, train, val, sampler="grid", structure="inside", **QUICK)
    assert sorted(t.params["act"] for t in found.study.trials) == ["relu", "tanh"]


def kinds() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Small random data of each kind."""
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(128, 1, 8, 8, generator=generator)
    words = torch.randint(11, (128, 6), generator=generator)
    classes = (tall.mean((1, 2, 3)) > 0).long()
    return {
        "table": (tall[:, 0, 0], tall[:, 0, 0].square().sum(1)),
        "images": (tall, classes),
        "sequence": (tall[:, 0], classes),
        "words": (words, classes),
        "each": (words, words.flip(1)),
    }


def test_embedded_tables_are_cut() -> None:
    """Truth: the loss in the study."""
    x, y = kinds()["table"]
    batches = list(zip(x.split(32), y.split(32), strict=True))
    shape = search.Shape.of(batches)
    asked = {"depth": 1, "batch_norm": False, "dropout": 0.0, "frequency": 0.3}

    def embedded(space: search.Space) -> nn.Module:
        fixed = optuna.trial.FixedTrial(asked)
        return families.MLP(shape)(search.Space(fixed, inside=space.inside))

    given = {**QUICK, "steps": 10, "loss_fn": shape.loss()}
    found = search.select(embedded, batches[:3], batches[3:], trials=1, structure="inside", **given)
    assert found.model is not None
    assert isinstance(found.model[0], families.Periodic)
    assert loss_of(found.model, batches[3:], shape.loss()) == pytest.approx(found.value, rel=1e-4)
    assert not list(gated(found.model))


FAMILIES = [
    (kind, name)
    for kind, names in {
        "table": ("mlp", "resnet"), "images": ("cnn", "resnet", "mlp"),
        "sequence": ("lstm", "gru", "transformer"), "words": ("lstm", "gru", "transformer"),
        "each": ("lstm", "gru", "transformer"),
    }.items()
    for name in names
]  # fmt: skip
QUICKLY = [("table", "resnet"), ("images", "cnn"), ("each", "gru"), ("words", "transformer")]


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*f, marks=[] if f in QUICKLY else pytest.mark.slow) for f in FAMILIES],
)
def test_families(kind: str, name: str) -> None:
    """Truth: the loss in the study; torch's modules alone hold the parameters that are counted."""
    x, y = kinds()[kind]
    batches = list(zip(x.split(32), y.split(32), strict=True))
    shape = search.Shape.of(batches)
    family = families.auto(shape)[name]
    given = {**QUICK, "steps": 10, "loss_fn": shape.loss()}
    found = search.select(
        {name: family}, batches[:3], batches[3:], trials=1, structure="inside", **given
    )
    assert found.model is not None
    assert loss_of(found.model, batches[3:], shape.loss()) == pytest.approx(found.value, rel=1e-4)
    assert not list(gated(found.model))
    assert f"{name}.width" not in found.params or name == "transformer"
    held = {type(m).__module__ for m in found.model.modules() if list(m.parameters(recurse=False))}
    assert all(module.startswith("torch.") or "families" in module for module in held)
    assert sum(p.numel() for p in found.model.parameters()) == found.sizes["parameters"]
    wide = family(search.Space(optuna.trial.FixedTrial(found.study.best_params), name, inside=True))
    assert found.sizes["parameters"] < sum(p.numel() for p in wide.parameters() if p.ndim < 6)


class Scaled(nn.Module):
    """Two inputs, which a dictionary has in another order, and one that it has not."""

    def __init__(self, width: int, gates: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.ReLU(), *gates, nn.Linear(width, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: Any = None) -> Tensor:
        found = self.body(x) * scale
        return found if mask is None else found * mask


def test_dictionaries_are_passed_by_name() -> None:
    train, val = (
        [{"scale": torch.ones(len(x), 1), "x": x, "label": y} for x, y in batches]
        for batches in data()
    )

    def build(space: search.Space) -> nn.Module:
        width = space.suggest_width("width", (8, 32))
        return Scaled(width, space.gates(width))

    found = search.select(build, train, val, trials=1, structure="inside", **QUICK)
    assert found.sizes is not None
    assert found.sizes["units"][0] < 32


def test_entries_that_forward_does_not_name_are_named() -> None:
    train, val = (
        [{"features": x, "label": y} for x, y in batches] for batches in data()
    )  # fmt: skip

    class Named(nn.Module):
        def __init__(self, width: int, gates: list[nn.Module]) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, width), nn.ReLU(), *gates, nn.Linear(width, 1))

        def forward(self, **entries: Tensor) -> Tensor:
            return self.body(entries["features"])

    def build(space: search.Space) -> nn.Module:
        width = space.suggest_width("width", (8, 32))
        return Named(width, space.gates(width))

    with pytest.raises(RuntimeError, match=r"forward\(\*\*entries.*name them as its arguments"):
        search.select(build, train, val, trials=1, structure="inside", **QUICK)
