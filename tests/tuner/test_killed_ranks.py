"""Ranks that are killed or interrupted. Truths: exit codes, messages, and the uninterrupted run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import ROUNDING, free_port, net, train

pytestmark = [
    pytest.mark.slow,  # processes that each import torch
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
]

ENDLESS = """
    import logging, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    logging.basicConfig(level="WARNING")
    import ranks
    ranks.STEPS = 10**6
    found = ranks.train(
        ranks.net(), Path(sys.argv[1]), parallel=sys.argv[2], probe=False
    )
    print("ended after", len(found["hparams"]["train_loss"]))
"""


@pytest.fixture
def kind() -> str:
    """The argument ``parallel``."""
    return "ddp"


@pytest.fixture
def endless(tmp_path: Path, kind: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks on a long run that has written a checkpoint."""
    script = textwrap.dedent(ENDLESS.format(tests=str(Path(__file__).parent)))
    known = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    command, pipe = [sys.executable, "-c", script, str(tmp_path), kind], subprocess.PIPE
    places = [{**os.environ, **known, "RANK": str(number)} for number in range(2)]
    ranks = [subprocess.Popen(command, text=True, env=e, stdout=pipe, stderr=pipe) for e in places]
    until = time.monotonic() + 100
    while not (tmp_path / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    yield ranks
    for each in ranks:
        each.kill()
        each.communicate()


@pytest.mark.parametrize(("lost", "kind"), [(0, "ddp"), (1, "ddp"), (1, "fsdp")])
def test_a_killed_rank_ends_the_run_and_leaves_its_checkpoint(
    lost: int, kind: str, endless: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    endless[lost].kill()
    _, errors = endless[1 - lost].communicate(timeout=20)
    assert endless[1 - lost].returncode == 1
    assert f"rank {1 - lost} of 2 ends: another rank has died" in errors
    assert torch.load(tmp_path / "last.pt")["numbers"][0] >= 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("ranks", "kind"), [([0, 1], "ddp"), ([1], "ddp"), ([1], "fsdp")])
def test_ctrl_c_and_torchruns_sigterm_end_all_ranks_after_the_same_step(
    ranks: list[int], kind: str, number: int, endless: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    for each in ranks:
        endless[each].send_signal(number)
    outputs = [each.communicate(timeout=20)[0] for each in endless]
    assert [each.returncode for each in endless] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0] == f"ended after {torch.load(tmp_path / 'last.pt')['numbers'][0]}\n"


RESTARTED = """
    import os, sys, torch
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from ranks import net, train
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    train(net(), folder / "run", parallel="ddp", resume=True, killed=first and rank == 1)
"""


def test_torchrun_starts_a_killed_run_again_from_its_checkpoint(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(RESTARTED.format(tests=str(Path(__file__).parent))))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*launch, f"--master-port={free_port()}", "--max-restarts=1", script, tmp_path]
    subprocess.run([str(part) for part in command], check=True, timeout=300)
    train(net(), tmp_path / "whole")
    found = [torch.load(tmp_path / name / "last.pt")["numbers"] for name in ("run", "whole")]
    assert found[0] == pytest.approx(found[1], rel=ROUNDING["rtol"])
