"""The search. Truths: what was planted, Optuna's own record, a run without the search."""

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from selftune import search
from selftune.search import families


def data(seed: int = 0) -> tuple[list[Any], list[Any]]:
    """A quadratic of four numbers, which a linear net cannot fit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(320, 4, generator=generator)
    batches = list(zip(x.split(32), x.square().sum(1, keepdim=True).split(32), strict=True))
    return batches[:7], batches[7:]


def build(space: search.Space) -> nn.Module:
    """A linear net, or one with a hidden layer."""
    if space.suggest_categorical("kind", ("linear", "hidden")) == "linear":
        return nn.Linear(4, 1)
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))


QUICK: dict[str, Any] = dict(
    steps=60, loss_fn=F.mse_loss, progress=False,
    tuner=dict(compile=False, probe=False, hparams=dict(lr=0.01)),
)  # fmt: skip


def test_it_finds_what_can_fit_and_gives_it_back_trained() -> None:
    train, val = data()
    found = search.select(build, train, val, trials=6, sampler="random", pruner=None, **QUICK)
    assert found.params == {"kind": "hidden"}
    x, y = (torch.cat(parts) for parts in zip(*val, strict=True))
    assert found.model is not None
    assert F.mse_loss(found.model(x), y).item() == pytest.approx(found.value, rel=1e-5)
    assert found.value == min(t.value for t in found.study.trials if t.value is not None)
    assert len(found.study.trials) == 6
    assert found.schedule is not None
    assert set(found.hparams) >= {"lr", "weight_decay"}
    assert found.table().splitlines()[1].split()[0] == str(found.study.best_trial.number)


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe", "gp", "cmaes"])
def test_samplers(sampler: str) -> None:
    def objective(space: search.Space) -> float:
        width = space.suggest_int("width", 1, 3)
        return width + 0.1 * space.suggest_int("depth", 1, 2)

    found = search.select(objective, trials=6, sampler=sampler, progress=False)
    points = {tuple(sorted(t.params.items())) for t in found.study.trials}
    assert len(found.study.trials) == 6
    assert found.value == min(w + 0.1 * d for (_, d), (_, w) in points)
    if sampler == "grid":
        assert len(points) == 6  # each once


def test_names_are_of_the_family() -> None:
    train, val = data()
    made = {"plain": build, "deep": lambda s: nn.Linear(4, s.suggest_categorical("out", (1,)))}
    found = search.select(made, train, val, trials=8, sampler="random", pruner=None, **QUICK)
    names = {n for t in found.study.trials for n in t.params}
    assert names == {"family", "plain.kind", "deep.out"}
    assert found.family == "plain"


def test_a_candidate_that_raises_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    train, val = data()

    def broken(space: search.Space) -> nn.Module:
        raise RuntimeError("no such layer")

    made = {"good": build, "broken": broken}
    with caplog.at_level(logging.WARNING, "selftune"):
        found = search.select(made, train, val, trials=8, sampler="random", **QUICK)
    assert found.family == "good"
    failed = [t for t in found.study.trials if t.state.name == "FAIL"]
    assert failed
    assert all(t.user_attrs["error"] == "RuntimeError: no such layer" for t in failed)
    assert any("broken" in r.getMessage() and "no such layer" in r.getMessage()
               for r in caplog.records)  # fmt: skip
    with pytest.raises(RuntimeError, match=r"none of 2 trials finished.*no such layer"):
        search.select({"broken": broken}, train, val, trials=2, **QUICK)


def test_a_selection_prints_a_line() -> None:
    train, val = data()
    found = search.select(build, train, val, trials=2, sampler="random", **QUICK)
    told = repr(found)
    assert "\n" not in told
    assert len(told) < 300
    assert f"{found.value:.4g} on the validation data, best of 2 trials" in told


def test_a_metric_that_is_nan_fails() -> None:
    values = itertools.cycle([math.nan, 1.0])
    found = search.select(lambda space: next(values), trials=4, progress=False)
    assert [t.state.name for t in found.study.trials] == ["FAIL", "COMPLETE"] * 2
    assert found.value == 1.0


def test_an_unknown_metric_is_named_before_a_run_is_trained() -> None:
    train, val = data()
    steps: list[int] = []
    told = r"metric='acuracy' must be one of \['loss', 'accuracy'\]"
    with pytest.raises(RuntimeError, match=told):
        search.select(
            build, train, val, trials=2, metric="acuracy",
            fit=dict(callbacks=[lambda progress: steps.append(progress.step)]),
            **{**QUICK, "tuner": dict(metrics=dict(accuracy=search.accuracy))},
        )  # fmt: skip
    assert not steps


def test_runs_start_where_the_best_ended() -> None:
    """Truth: the median of where the runs before ended, seen before the first step of tuning."""
    train, val = data()
    starts: list[float] = []

    def listen(progress: Any) -> None:
        if progress.step == 1:
            starts.append(progress.hparams["weight_decay"])

    found = search.select(
        build, train, val, trials=4, sampler="random", pruner=None,
        fit=dict(evaluate_every=1, callbacks=[listen]), **QUICK,
    )  # fmt: skip
    ended = [t.user_attrs["hparams"]["weight_decay"] for t in found.study.trials]
    assert len(set(ended)) == 4
    assert starts == pytest.approx([0.01, *(sorted(ended[:i])[(i - 1) // 2] for i in (1, 2, 3))])


def test_the_pruner_sees_evaluations() -> None:
    train, val = data()
    found = search.select(
        build, train, val, trials=9, sampler="random", pruner="asha", seed=1, **QUICK
    )
    states = {t.state.name for t in found.study.trials}
    assert "PRUNED" in states
    pruned = [t for t in found.study.trials if t.state.name == "PRUNED"]
    whole = [t for t in found.study.trials if t.state.name == "COMPLETE"]
    assert min(len(t.intermediate_values) for t in pruned) == 3  # the first rung
    assert {len(t.intermediate_values) for t in whole} == {9}
    assert found.params == {"kind": "hidden"}


def test_a_journal_goes_on_and_gives_the_best_back(tmp_path: Path) -> None:
    train, val = data()
    path = tmp_path / "study.journal"
    first = search.select(build, train, val, trials=3, storage=path, **QUICK)
    again = search.select(build, train, val, trials=5, storage=path, **QUICK)
    assert len(again.study.trials) == 5
    assert again.value <= first.value
    x, y = (torch.cat(parts) for parts in zip(*val, strict=True))
    third = search.select(build, train, val, trials=5, storage=path, **QUICK)  # nothing to do
    assert third.model is not None
    assert F.mse_loss(third.model(x), y).item() == pytest.approx(third.value, rel=1e-5)
    assert len(list((tmp_path / "study.journal.runs" / "weights").glob("*.pt"))) <= 2


def test_studies_of_a_storage_keep_their_own_weights(tmp_path: Path) -> None:
    train, val = data()
    far = [(x, y - 50.0) for x, y in val]
    x, y = (torch.cat(parts) for parts in zip(*val, strict=True))
    options: dict[str, Any] = dict(trials=2, storage=tmp_path / "study.journal", **QUICK)
    first = search.select(build, train, val, study="one", **options)
    search.select(build, [(x, y - 50.0) for x, y in train], far, study="two", **options)
    again = search.select(build, train, val, study="one", **options)
    assert again.value == first.value
    assert again.model is not None
    assert F.mse_loss(again.model(x), y).item() == pytest.approx(first.value, rel=1e-5)


def test_storages_of_something_else_are_left_alone(tmp_path: Path) -> None:
    train, val = data()
    corrupt = tmp_path / "notes.txt"
    corrupt.write_text("these are\nmy notes\n")
    beside = tmp_path / "notes.txt.lock"  # not a lock either
    beside.write_text("mine")
    with pytest.raises(ValueError, match="not a journal"):
        search.select(build, train, val, trials=1, storage=corrupt, **QUICK)
    assert corrupt.read_text() == "these are\nmy notes\n"
    assert beside.read_text() == "mine"
    beside.unlink()
    for text in ("one line, 0.93", '{"steps": [1, 2]}'):
        corrupt.write_text(text)
        with pytest.raises(ValueError, match="not a journal"):
            search.select(build, train, val, trials=1, storage=corrupt, **QUICK)
        assert corrupt.read_text() == text
    path = tmp_path / "study.journal"
    search.select(build, train, val, trials=1, storage=path, **QUICK)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another search"):
        search.select({"other": build}, train, val, trials=1, storage=path, **QUICK)
    assert path.read_bytes()[: len(before)] == before
    with pytest.raises(ValueError, match="folder"):
        search.select(build, train, val, trials=1, storage=tmp_path, **QUICK)


def test_bad_arguments() -> None:
    train, val = data()
    for wrong, told in (
        (dict(candidates={}), "candidates is empty"),
        (dict(candidates=[]), "candidates is empty"),
        (dict(candidates="all"), "must be 'auto'"),
        (dict(trials=0), "trials=0"),
        (dict(workers=0), "workers=0"),
        (dict(sampler="best"), "sampler='best'"),
        (dict(pruner="best"), "pruner='best'"),
        (dict(epochs=3), "epochs=3, steps=60: pass one of the two"),
        (dict(candidates="auto", steps=None), "epochs=None, steps=None: pass one of the two"),
    ):
        with pytest.raises(ValueError, match=told):
            search.select(**{**dict(candidates=build, train=train, val=val, **QUICK), **wrong})
    with pytest.raises(TypeError, match="must be a function"):
        search.select({"net": 3}, train, val, trials=1, **QUICK)


def test_grids_are_counted_first() -> None:
    called = 0

    def huge(space: search.Space) -> float:
        nonlocal called
        called += 1
        return sum(space.suggest_int(f"x{i}", 1, 10) for i in range(7))

    with pytest.raises(ValueError, match="10,000,000 points"):
        search.select(huge, sampler="grid", progress=False)
    assert called == 1
    with pytest.raises(ValueError, match="x is a range without steps"):
        search.select(lambda s: s.suggest_float("x", 0, 1), sampler="grid", progress=False)


def test_every_trial_is_a_session_with_all_columns(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    train, val = data()
    found = search.select(
        build, train, val, trials=3, sampler="random", pruner=None, log_dir=tmp_path, **QUICK
    )
    folders = sorted(p for p in tmp_path.iterdir() if p.name != "weights")
    assert [p.name for p in folders] == [f"{i:04d}-model" for i in range(3)]
    for folder, trial in zip(folders, found.study.trials, strict=True):
        read = EventAccumulator(str(folder)).Reload()
        start = HParamsPluginData.FromString(
            read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        ).session_start_info.hparams
        assert start["kind"].string_value == trial.params["kind"]
        assert start["start/lr"].number_value > 0


def test_logs_stay_in_their_folder_whatever_the_names_of_study_and_family(tmp_path: Path) -> None:
    train, val = data()
    logs = tmp_path / "logs"
    search.select(
        {"net/small": build}, train, val, trials=1, sampler="random", study="a/../../b",
        log_dir=logs, **QUICK,
    )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]
    assert sorted(p.name for p in logs.iterdir()) == ["a%2F..%2F..%2Fb-0000-net%2Fsmall", "weights"]


SHAPES = {
    "table": (torch.randn(12, 5), torch.randint(3, (12,))),
    "images": (torch.randn(12, 2, 8, 6), torch.randint(3, (12,))),
    "sequence": (torch.randn(12, 7, 3), torch.randn(12)),
    "words": (torch.randint(9, (12, 7)), torch.randint(9, (12, 7))),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_families_fit_the_data(kind: str) -> None:
    """Law: outputs have the shape that the loss wants, at the smallest and the largest choice."""
    x, y = SHAPES[kind]
    shape = search.Shape.of([(x, y)])
    assert shape.kind == kind
    loss = shape.loss()

    class First:
        def suggest_categorical(self, name: str, choices: Any) -> Any:
            return choices[0]

        def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
            return low

    from selftune.search._space import GridPoint

    for build in families.auto(shape).values():
        for trial in (First(), GridPoint()):
            model = build(search.Space(trial))
            embedded = any(isinstance(m, families.Periodic) for m in model.modules())
            assert embedded == (kind == "table" and isinstance(trial, GridPoint))
            output = model(x)
            assert loss(output, y).ndim == 0
            if kind == "words":
                assert output.shape == (12, 7, 9)
                changed = x.clone()
                changed[:, -1] = (changed[:, -1] + 1) % 9
                model.eval()
                torch.testing.assert_close(model(changed)[:, :-1], model(x)[:, :-1])


def test_an_embedding_is_the_formula_for_each_feature() -> None:
    torch.manual_seed(0)
    layer = families.Periodic(3, 0.5, frequencies=2, dims=4)
    assert 0.2 < families.Periodic(50, 0.5).frequency.std().item() < 0.8
    x = torch.randn(5, 3)
    found = layer(x).view(5, 3, 4)
    for i, row in enumerate(x.tolist()):
        for j, value in enumerate(row):
            angles = [2 * math.pi * c * value for c in layer.frequency[j].tolist()]
            waves = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            for d in range(4):
                column = layer.weight[j, :, d].tolist()
                sum_ = sum(w * v for w, v in zip(column, waves, strict=True))
                expected = max(0.0, sum_ + layer.bias[j, d].item())
                assert found[i, j, d].item() == pytest.approx(expected, abs=1e-5)


def test_wide_tables_are_not_embedded() -> None:
    from selftune.search._space import GridPoint

    for features, embedded in ((128, True), (129, False)):
        model = families.MLP(search.Shape((features,), 3, "classification"))(
            search.Space(GridPoint())
        )
        assert any(isinstance(m, families.Periodic) for m in model.modules()) == embedded


def test_families_refuse_other_data() -> None:
    table = search.Shape((5,), 3, "classification")
    words = search.Shape((5,), 3, "classification", words=9)
    for kind, shape, told in (
        (families.CNN, table, "use mlp"),
        (families.MLP, words, "use gru"),
        (families.ResNet, words, "use transformer"),
    ):
        with pytest.raises(ValueError, match=told):
            kind(shape)(search.Space(optuna.trial.FixedTrial({})))


def test_auto_searches_families_of_the_data() -> None:
    x = torch.randn(128, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    batches = list(zip(x.split(32), y.split(32), strict=True))
    found = search.select(
        "auto", batches[:3], batches[3:], trials=4, steps=30, sampler="random", progress=False,
        metric="accuracy", maximize=True,
        tuner=dict(compile=False, metrics=dict(accuracy=search.accuracy)),
    )  # fmt: skip
    assert {t.user_attrs["family"] for t in found.study.trials} <= {"mlp", "resnet"}
    assert 0 <= found.value <= 1


def test_a_grid_has_the_points_of_choices_that_depend_on_others() -> None:
    """By hand: three kernels of one kind, none of the other."""

    def network(space: search.Space) -> nn.Module:
        if space.suggest_categorical("kind", ("hidden", "linear")) == "linear":
            return nn.Linear(4, 1)
        return nn.Sequential(nn.Linear(4, space.suggest_int("units", 1, 3)), nn.Linear(1, 1))

    train, val = data()
    found = search.select(network, train, val, sampler="grid", **QUICK)
    points = [tuple(sorted(t.params.items())) for t in found.study.trials]
    assert len(points) == len(set(points)) == 4


def test_a_point_of_a_grid_that_cannot_be_built_is_one_failed_trial() -> None:
    def network(space: search.Space) -> nn.Module:
        units = space.suggest_categorical("units", (1, 2, 3))
        if units == 3:
            raise RuntimeError("too many")
        return nn.Sequential(nn.Linear(4, units), nn.Linear(units, 1))

    train, val = data()
    found = search.select(network, train, val, sampler="grid", **QUICK)
    assert sorted(t.state.name for t in found.study.trials) == ["COMPLETE", "COMPLETE", "FAIL"]


def test_lengths_and_words_of_all_batches_count() -> None:
    x = [torch.tensor([[1, 2, 3]]), torch.tensor([[7, 2, 3, 4, 5]])]
    shape = search.Shape.of([(x[0], torch.rand(1)), (x[1], torch.rand(1))])
    assert (shape.inputs, shape.words) == ((5,), 8)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="convert images to float first"):
        search.Shape.of([(images, torch.tensor([0, 1]))])


def test_targets_that_fit_no_output_are_named() -> None:
    with pytest.raises(ValueError, match=r"targets of shape \(3,\), not \(3, 1\)"):
        search.accuracy(torch.eye(3), torch.tensor([[0], [1], [2]]))
    loss = search.Shape((4,), 1, "regression", flat=True).loss()
    assert loss(torch.ones(3, 1), torch.zeros(3)).item() == 1.0
    with pytest.raises(ValueError, match=r"returned shape \(3, 2\) for targets of shape \(3,\)"):
        loss(torch.ones(3, 2), torch.zeros(3))
