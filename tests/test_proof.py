"""The proof's harness. Truths: numbers counted by hand, loops written out, torch's own classes."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import run as command
from benchmarks.ablations import CHANGES, PARTS, cells, paired
from benchmarks.proof import comparison, drivers, rendering, scoring, searches
from benchmarks.proof.contenders import METHODS, Config, draw, fixed, selftune
from benchmarks.proof.training import Record, RunningAverage, train
from benchmarks.workloads import Workload, digits

STEPS = 60


@pytest.fixture
def short() -> Workload:
    return replace(digits(), name="short", steps=STEPS)


def record(method: str, val: float, seed: int = 0, curve: tuple = (), gradients: int = 1) -> Record:
    own = {"val": val, "test": val}
    return Record("w", method, seed, own, own, list(curve), gradients, seconds=1.0)


def test_a_fixed_run_is_a_loop_of_torch(short: Workload) -> None:
    """The loop written out, with torch's optimizer and scheduler, judged at its last weights."""
    config = Config(lr=2e-3, beta1=0.8, weight_decay=0.1, schedule="linear")
    found = train(short, "fixed", fixed(config), seed=3)
    model = short.model(3)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.8, 0.999), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, STEPS)
    batches = short.batches("train", 3)
    for _ in range(STEPS):
        opt.zero_grad()
        short.loss(model, next(batches)).backward()
        opt.step()
        schedule.step()
    last = short.evaluate(model, "val")
    assert found.own["val"] == pytest.approx(min(last, found.average["val"]), rel=1e-5)
    assert found.gradients == STEPS


def test_the_common_average_is_torchs_averaged_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def average(mean: torch.Tensor, new: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        if not new.is_floating_point():
            return new
        return torch.lerp(mean, new, 1 - min(0.98, 1 - 1 / (int(count) + 1)))

    ours = RunningAverage(model)
    twin = torch.optim.swa_utils.AveragedModel(model, avg_fn=average, use_buffers=True)
    twin.update_parameters(model)
    for _ in range(5):
        model(torch.randn(8, 3))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ours.update()
        twin.update_parameters(model)
    with ours.showing():
        shown = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    for name, value in shown.items():
        torch.testing.assert_close(value, twin.module.state_dict()[name])


@pytest.mark.parametrize("method", ["selftune", "default"])
def test_every_run_is_the_same_again(short: Workload, method: str) -> None:
    a, b = (train(short, method, METHODS[method], seed=1) for _ in range(2))
    assert a.own == b.own
    assert a.curve == b.curve


def test_validation_batches_count_as_gradients(short: Workload) -> None:
    """Two batches joined for the first look, at steps 20 and 40, and twice two to judge the end."""
    made = selftune(probe=False, guard=False, every=20, joined=2)
    found = train(short, "", made, seed=0, checkpoints=0)
    calls = (found.gradients - STEPS) / 2
    assert calls == 1 + 2 + 2 * 2


def test_searches_draw_from_four_decades() -> None:
    drawn = [draw(seed) for seed in range(200)]
    assert 1e-5 <= min(c.lr for c in drawn) < 1e-4
    assert 1e-2 < max(c.lr for c in drawn) <= 1e-1
    assert {c.schedule for c in drawn} == {"constant", "linear", "cosine"}
    assert draw(7) == draw(7) != draw(8)


def test_a_search_keeps_its_best_and_pays_for_all(short: Workload) -> None:
    pytest.importorskip("optuna", reason="TPE needs the extra search")
    whole = searches.tpe(short, 0, prune=False, trials=4)
    pruned = searches.tpe(short, 0, prune=True, trials=4)
    assert whole.gradients == 4 * STEPS
    assert STEPS <= pruned.gradients <= 4 * STEPS
    assert whole.own["val"] == min(loss for _, loss in whole.curve)


def test_ranks_count_what_is_better() -> None:
    pool = [0.1, 0.2, 0.3, math.inf]
    assert scoring.rank(0.05, pool) == 0
    assert scoring.rank(0.2, pool) == 25
    assert scoring.rank(math.inf, pool) == 100
    assert scoring.rank(math.nan, pool) == 100


def test_the_profile_is_the_area_counted_by_hand() -> None:
    """At ratios 1, 2 and 5 the areas over [1, 4] are 1, 2/3 and 0."""
    scores = scoring.profile({"a": [1.0, 2.0, 5.0], "b": [3.0, 1.0, 1.0]})
    assert scores["a"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert scores["b"] == pytest.approx((1 / 3 + 1 + 1) / 3)


def test_the_best_of_several_costs_them_all() -> None:
    groups = {"a": [record("a", 2.0, 0), record("a", 1.0, 1)],
              "b": [record("b", 1.5, 0), record("b", 3.0, 1)]}  # fmt: skip
    best = scoring.best_of(groups, "best")
    assert [r.own["val"] for r in best] == [1.5, 1.0]
    assert [r.gradients for r in best] == [2, 2]


def test_a_difference_within_its_noise_is_no_difference() -> None:
    ours = [record("a", v, s) for s, v in enumerate([1.0, 1.1, 0.9])]
    for shift, verdict in ((0.5, "better"), (-0.5, "worse")):
        other = [record("b", r.own["val"] + shift, r.seed) for r in ours]
        assert comparison.versus(ours, other, "val") == verdict
    noisy = [record("b", v, s) for s, v in enumerate([1.2, 0.8, 1.05])]
    assert comparison.versus(ours, noisy, "val") == "same"
    failed = [record("b", math.inf, s) for s in range(3)]
    assert comparison.versus(ours, failed, "val") == "better"
    assert comparison.versus(failed, ours, "val") == "worse"


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    for seed in (0, 1):
        command.keep(replace(record("default", 1.0, seed), workload="digits-short"), tmp_path)
    args = command.parser().parse_args(
        ["--suite", "slice", "--methods", "default", "--records", str(tmp_path)]
    )
    assert list(command.wanted(args)) == [("digits-short", "default", 2)]
    command.forget({"default"}, ["another"], tmp_path)
    assert len(list(command.wanted(args))) == 1
    command.forget({"default"}, command.chosen(args), tmp_path)
    assert len(list(command.wanted(args))) == 3


def test_forgetting_nothing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption lost all runs, whose files were deleted first."""
    command.keep(record("default", 1.0), tmp_path)
    command.keep(record("random", 1.0), tmp_path)
    name = record("default", 1.0).workload
    monkeypatch.setattr(Path, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    command.forget({"tpe"}, [name], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        command.forget({"random"}, [name], tmp_path)
    assert [r.method for r in command.records(tmp_path)] == ["default", "random"]


@pytest.mark.parametrize("option", ["methods", "again", "only"])
def test_unknown_names_are_refused(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run", f"--{option}", "typo", "--report"])
    with pytest.raises(SystemExit):
        command.main()
    assert f"--{option} typo is unknown: use" in capsys.readouterr().err


def test_other_suites_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of each suite, in the folder that the command reads by default."""
    monkeypatch.chdir(tmp_path)
    pages = {}
    monkeypatch.setattr(command, "render", lambda found, path: pages.update({path: list(found)}))
    places = {"digits": "", "siamese": "extended", "digits-short": "slice"}
    for name, folder in places.items():
        command.keep(replace(record("default", 1.0), workload=name), command.FOLDER / folder)
    for suite in ("small", "extended", "slice"):
        monkeypatch.setattr("sys.argv", ["run", "--suite", suite, "--report"])
        command.main()
    kept = {path.name: [r.workload for r in found] for path, found in pages.items()}
    assert kept == {
        "RESULTS.md": ["digits"], "RESULTS-extended.md": ["siamese"],
        "RESULTS-slice.md": ["digits-short"],
    }  # fmt: skip


def test_the_check_fails_where_one_run_is_no_better() -> None:
    others = [record("default", 1.0), record("random", 2.0)]
    command.check([*others, record("selftune", 0.9)])
    with pytest.raises(SystemExit, match=r"test loss 1\.1"):
        command.check([*others, record("selftune", 1.1)])
    with pytest.raises(SystemExit, match="needs runs"):
        command.check(others)


@pytest.mark.parametrize(("rule", "change"), [(r, c) for r in CHANGES for c in CHANGES[r]])
def test_both_drivers_take_every_ablation(short: Workload, rule: str, change: str) -> None:
    """Law: an option that is gone, or out of its range, raises."""
    options = dict(CHANGES[rule][change])
    assert options
    options.pop("joined", None)  # of the loop and the loader, not of a driver
    for make in (drivers.make_optimizer, drivers.make_tuner):
        make(short, short.model(0), rule, **options)


@pytest.mark.parametrize("face", drivers.FACES)
def test_an_ablation_changes_a_run(short: Workload, face: str) -> None:
    shorter = replace(short, steps=100)  # long enough for a sweep
    default, again, *changed = (
        drivers.FACES[face](shorter, "AdamW", 0, **o).val
        for o in ({}, {}, PARTS["no sweep"], PARTS["one pace for all hyperparameters"])
    )
    assert default == again
    assert default not in changed


def test_a_change_is_judged_by_pairs_of_seeds() -> None:
    """Logs of the ratios are 0.1 and 0.3 on one workload, −0.2 on the other: counted by hand."""

    def runs(*vals: float) -> list[drivers.Run]:
        return [drivers.Run("w", "tuner", "SGD", s, v, v, 1.0) for s, v in enumerate(vals)]

    default = runs(1.0, 2.0)
    ratios = {
        "a": paired(runs(math.exp(0.1), 2 * math.exp(0.3)), default),
        "b": paired(runs(math.exp(-0.2), 2 * math.exp(-0.2)), default),
        "c": paired(runs(math.inf, 2.0), default),
    }
    # The standard error of 0.1 and 0.3 is 0.1, of the mean over two workloads half as much.
    assert cells(ratios) == ("+0.0 ± 5.0, not finite: c", "1 of 3")


def test_the_page_is_written_from_records_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra report")
    found = [record("selftune", 1.0, s, [(1.0, 1.0)]) for s in range(3)]
    found += [record("default", 1.5, s, [(1.0, 1.5)]) for s in range(3)]
    found += [record("random", 0.5 + 0.1 * s, s) for s in range(10)]
    again = [Record(**json.loads(json.dumps(asdict(r)))) for r in found]
    rendering.render(again, tmp_path / "RESULTS.md")
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| default | 1 / 0 / 0 | 1 / 0 / 0 |" in page
    assert "50 % (w)" in page  # five of the pool's ten lie below 1.0
    assert (tmp_path / "RESULTS.png").stat().st_size > 1000


def test_runs_that_are_longer_have_a_table_of_their_own(tmp_path: Path) -> None:
    """They do not count in the summary."""
    pytest.importorskip("matplotlib", reason="plots need the extra report")
    short = [record("selftune", 1.0), record("default", 1.5)]
    short += [record("random", 0.95 + 0.1 * s, s) for s in range(10)]
    long = [replace(r, workload="w×5", own={"val": 9 * r.own["val"], "test": 8.0}) for r in short]
    rendering.render([*short, *long], tmp_path / "RESULTS.md")
    page = (tmp_path / "RESULTS.md").read_text()
    assert "10 % (w)" in page
    assert "| w×5 | 10 | 8.55 | 10 | 9 / 8 | 13.5 / 8 | – | – | – |" in page
    assert page.count("w×5") == 1
