"""A tuned trajectory on a plain torch optimizer."""

import json
import resource
from pathlib import Path

import pytest
import torch

import selftune as st
from selftune.replay import TunedSchedule

VALUES = {
    "lr": [[0, 0.1], [1, 0.09], [2, 0.02]],
    "beta1": [[0, 0.9], [2, 0.8]],
    "weight_decay": [[0, 0.01]],
}
SCHEDULE = TunedSchedule(rule="AdamW", steps=3, values=VALUES)


def adamw(**options: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=1.0, **options)  # type: ignore[arg-type]


def test_groups_follow_step_by_step() -> None:
    opt = adamw()
    opt.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 5.0})
    follow = st.replay(opt, SCHEDULE)
    seen = []
    for _ in range(5):
        seen.append((opt.param_groups[1]["lr"], opt.param_groups[0]["betas"]))
        follow.step()
    assert [lr for lr, _ in seen] == [0.1, 0.09, 0.02, 0.02, 0.02]
    assert seen[1][1] == (0.9, 0.999)
    assert seen[2][1] == (0.8, 0.999)


def test_the_file_is_plain_json_and_reads_back(tmp_path: Path) -> None:
    SCHEDULE.save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["values"]["lr"][2] == [2, 0.02]
    assert TunedSchedule.load(tmp_path / "s.json") == SCHEDULE
    assert st.replay(adamw(), tmp_path / "s.json").last_step == 0


def test_tensor_rates_stay_tensors() -> None:
    rate = torch.tensor(1.0)
    opt = torch.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=rate)
    st.replay(opt, SCHEDULE)
    assert isinstance(opt.param_groups[0]["lr"], torch.Tensor)
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.1)


def test_a_position_is_saved_and_loaded() -> None:
    follow = st.replay(adamw(), SCHEDULE)
    follow.step()
    opt = adamw()
    st.replay(opt, SCHEDULE).load_state_dict(follow.state_dict())
    assert opt.param_groups[0]["lr"] == 0.09


def test_an_optimizer_without_a_tuned_hyperparameter_is_refused() -> None:
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match=r"beta1.*SGD does not have.*ignore"):
        st.replay(opt, SCHEDULE)
    assert opt.param_groups[0]["lr"] == 1.0
    st.replay(opt, SCHEDULE, ignore=("beta1",))
    assert opt.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("content", ["", "{}", '{"rule": 1, "other": 2}', "\x00"])
def test_a_file_that_is_no_schedule_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(ValueError, match=r"s\.json is not a schedule"):
        TunedSchedule.load(tmp_path / "s.json")


def test_a_schedule_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    """A limit on the size of files makes the system refuse a write in the middle."""
    path = tmp_path / "schedule.json"
    before = TunedSchedule(rule="SGD", steps=4, values={"lr": [[0, 0.1]]})
    before.save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"schedule\.json was not written .*free space"):
            TunedSchedule(rule="SGD", steps=4, values={"lr": [[0, 0.1]] * 900}).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert TunedSchedule.load(path) == before
    assert list(tmp_path.iterdir()) == [path]
