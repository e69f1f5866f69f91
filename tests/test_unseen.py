"""The benchmark on unseen work. Truths: numbers counted by hand, torch's own optimizers."""

import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import unseen
from benchmarks.proof.training import train
from benchmarks.unseen import BASELINES, Outcome, Setup
from benchmarks.workloads import Workload, digits

STEPS = 40


@pytest.fixture
def short() -> Workload:
    return replace(digits(), name="short", steps=STEPS)


def outcome(method: str, seed: int, val: float, lr: float = 1e-3, label: str = "") -> Outcome:
    return Outcome("siamese", method, "AdamW", seed, label, val, 2 * val, 1.0, lr)


def runs() -> list[Outcome]:
    """Two seeds: 1e-3 is the best rate in the mean (3), 3e-3 on the second seed (1)."""
    losses = {r: (9.0, 9.0) for r in BASELINES["AdamW"]} | {1e-3: (2.0, 4.0), 3e-3: (8.0, 1.0)}
    made = [outcome(unseen.cosine(r), s, v[s], r) for r, v in losses.items() for s in (0, 1)]
    return [*made, outcome("optimizer", 0, 1.0, 2e-3), outcome("optimizer", 1, 2.0, 8e-3)]


def test_ratios_are_counted_by_hand() -> None:
    found = unseen.compare(runs(), "siamese", "optimizer", Setup())
    assert found is not None
    assert (found.seeds, found.rate) == (2, 1e-3)
    assert found.means == {"val": (3.0, 1.5, 1.5), "test": (6.0, 3.0, 3.0)}
    # Both seeds are at half of the best rate's loss; of the best runs' they are at 1/2 and 2.
    assert math.exp(found.best["val"].log) == pytest.approx(0.5)
    assert found.best["test"].error == pytest.approx(0.0)
    assert found.chosen["val"].log == pytest.approx(0.0)
    assert found.chosen["val"].error == pytest.approx(math.log(2))
    assert found.climb == pytest.approx(4.0)


def test_a_seed_counts_once_all_its_runs_are_finished() -> None:
    found = [o for o in runs() if (o.method, o.seed) != ("cosine 0.03", 1)]
    compared = unseen.compare(found, "siamese", "optimizer", Setup())
    assert compared is not None
    assert compared.seeds == 1
    assert unseen.compare(found, "siamese", "optimizer", Setup(label="another")) is None
    assert unseen.compare(found, "siamese", "tuner", Setup()) is None


def test_a_rate_that_diverges_is_not_the_best() -> None:
    found = [
        replace(o, val=math.inf, test=math.inf) if o.method == "cosine 0.001" else o for o in runs()
    ]
    compared = unseen.compare(found, "siamese", "optimizer", Setup())
    assert compared is not None
    assert compared.rate == 3e-3


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    lines = [json.dumps(asdict(o)) for o in runs()]
    path.write_text("\n".join([*lines, lines[0][:20]]))  # the last line was cut off by a kill
    done = unseen.load(path)
    assert done == runs() == unseen.load(path)
    ask = partial(unseen.wanted, ["siamese"], ["optimizer"])
    assert list(ask(Setup(), 2, done)) == []
    assert {job[3] for job in ask(Setup(), 3, done)} == {2}
    wider = Setup(rates=(1e-3, 1e-1))
    assert [job[1] for job in ask(wider, 2, done)] == ["cosine 0.1", "cosine 0.1"]
    again = list(ask(Setup(label="another"), 2, done))
    assert again == [("siamese", "optimizer", "AdamW", seed, "another") for seed in (0, 1)]


def test_the_report_takes_the_geometric_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ratios 1/2 and 2."""
    path = tmp_path / "runs.jsonl"
    second = [
        replace(o, workload="burgers", val=4 * o.val if o.method == "optimizer" else o.val)
        for o in runs()
    ]
    path.write_text("".join(json.dumps(asdict(o)) + "\n" for o in [*runs(), *second]))
    unseen.main(["--only", "siamese,burgers,diamonds", "--face", "optimizer", "--seeds", "2",
                 "--records", str(path), "--report"])  # fmt: skip
    printed = capsys.readouterr().out
    cells = next(line for line in printed.splitlines() if "geometric mean" in line).split(" | ")
    assert cells[6].startswith("1.0000 ±")
    assert "Not finished: diamonds." in printed


@pytest.mark.parametrize("rule", BASELINES)
def test_baselines_are_loops_of_torch(short: Workload, rule: str) -> None:
    found = train(short, "", partial(unseen.fixed, rule, 3e-3), seed=3, checkpoints=0)
    model = short.model(3)
    make = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3),
        "SGD": lambda p: torch.optim.SGD(p, lr=3e-3, momentum=0.9),
    }[rule]
    opt = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    batches = short.batches("train", 3)
    for _ in range(STEPS):
        opt.zero_grad()
        short.loss(model, next(batches)).backward()
        opt.step()
        schedule.step()
    last = short.evaluate(model, "val")
    assert found.own["val"] == pytest.approx(min(last, found.average["val"]), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only nothing is unknown: use code-transformer"),
        (["--face", "both"], "--face both is unknown: use optimizer, tuner"),
        (["--rates", "low"], "--rates low is not a list of numbers: use such as 1e-3,1e-2"),
    ],
)
def test_unknown_names_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        unseen.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_both_faces_leave_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    unseen.main(["--only", "few-digits", "--seeds", "1", "--records", str(path)])
    found = unseen.load(path)
    assert [o.method for o in found][-2:] == ["optimizer", "tuner"]
    assert all(math.isfinite(o.val) and o.lr > 0 for o in found)
    assert "| few-digits | 1 |" in capsys.readouterr().out
