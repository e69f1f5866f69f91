"""The framework matrix: every row holds, or raises an error that says why; none is silent.

A row names its check, or the test that is it. The table is printed in docs/integrations/index.md.
Truth: named by each row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from matrix_checks import (
    annealed_twice,
    checkpointing,
    compiled_step,
    constant_scheduler,
    dcp_round_trip,
    hyper_step_while_accumulating,
    loaded_inside_averaged,
    refused_by_accelerate,
    saved_inside_averaged,
    shown_rate,
    skipped_first_step,
    usable,
    wrapped_by_accelerate,
    wrapped_by_fabric,
    wrapped_by_lightning,
)
from optimizer_checks import (
    inside_selftuning,
    lbfgs,
    lora,
    quantized,
    sparse,
    timm_optimizers,
    torch_optimizers,
)
from tasks import needs

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "integrations" / "index.md"
Check = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A behaviour.

    Attributes:
        what: It, in words.
        truth: Its comparison.
        check: The check; or the name of the test that is it.
        refused: Whether it raises an error that says why.
        slow: Whether it takes seconds.
    """

    what: str
    truth: str
    check: Check | str
    refused: bool = False
    slow: bool = False

    @property
    def state(self) -> str:
        return "refused" if self.refused else "holds"


ROWS = [
    Row(what="Lightning: clipping, accumulation, bf16-mixed", truth="the loop by hand, bit for bit",
        check="test_lightning.py::test_as_the_loop_by_hand"),
    Row(what="Lightning: float16 with a scaler",
        truth="results are finite, and hyperparameters are tuned",
        check="test_lightning.py::test_16_mixed_on_the_cpu"),
    Row(what="Lightning: checkpoint and resume", truth="the uninterrupted run, bit for bit",
        check="test_lightning.py::test_resumed_run_is_the_uninterrupted_one"),
    Row(what="Lightning: score of a checkpoint", truth="the file's weights, scored by hand",
        check="test_lightning.py::test_score_is_that_of_the_weights_in_the_file"),
    Row(what="Lightning: early stopping", truth="the loop by hand with the same number of epochs",
        check="test_lightning.py::test_early_stopping"),
    Row(what="Lightning: DDP, two processes", truth="DDP by hand, bit for bit",
        check="test_lightning.py::test_two_processes"),
    Row(what="HF Trainer: clipping, accumulation, bf16", truth="the loop by hand, bit for bit",
        check="test_transformers.py::test_as_the_loop_by_hand"),
    Row(what="HF Trainer: checkpoint and resume", truth="the uninterrupted run, bit for bit",
        check="test_transformers.py::test_resumed_run_is_the_uninterrupted_one"),
    Row(what="HF Trainer: score of a checkpoint", truth="the file's weights, scored by hand",
        check="test_transformers.py::test_score_is_that_of_the_weights_in_the_file"),
    Row(what="HF Trainer: best model at the end, early stopping", truth="the best file's weights",
        check="test_transformers.py::test_best_model_at_the_end"),
    Row(what="HF Trainer: `learning_rate` in its log", truth="the rate that is applied",
        check="test_transformers.py::test_logs_the_rate_that_is_applied"),
    Row(what="HF Trainer: `optimizer_cls_and_kwargs`", truth="the same groups by hand",
        check="test_transformers.py::test_through_optimizer_cls_and_kwargs"),
    Row(what="Accelerate: clipping, accumulation, bf16", truth="the loop by hand, bit for bit",
        check="test_accelerate.py::test_as_the_loop_by_hand"),
    Row(what="Accelerate: `save_state`, `load_state`", truth="the uninterrupted run, bit for bit",
        check="test_accelerate.py::test_resumed_run_is_the_uninterrupted_one"),
    Row(what="Lightning, HF Trainer, Accelerate: a checkpoint of two ranks, resumed by one process",
        truth="the run on two ranks, to 1e-4",
        check="test_other_ranks.py::test_goes_on_with_another_number_of_ranks"),
    Row(what="skorch: clipping; `fit`, `partial_fit`", truth="the loop by hand, bit for bit",
        check="test_skorch.py::test_as_the_loop_by_hand"),
    Row(what="skorch: score of a checkpoint", truth="the file's weights, scored by hand",
        check="test_skorch.py::test_score_is_that_of_the_weights_in_the_file"),
    Row(what="skorch: checkpoint and resume", truth="the uninterrupted run, bit for bit",
        check="test_skorch.py::test_resumed_run_is_the_uninterrupted_one"),
    Row(what="Ignite", truth="the loop by hand, bit for bit",
        check="test_ignite.py::test_as_the_loop_by_hand"),
    Row(what="Ignite: score of a checkpoint", truth="the file's weights, scored by hand",
        check="test_ignite.py::test_score_is_that_of_the_weights_in_the_file"),
    Row(what="Ignite: checkpoint and resume", truth="the uninterrupted run, bit for bit",
        check="test_ignite.py::test_resumed_run_is_the_uninterrupted_one"),
    *(Row(what=f"{name}: `unwrap(wrapper)`", truth="the optimizer itself",
          check=partial(check, lambda wrapper: None))
      for name, check in (("Lightning's wrapper", wrapped_by_lightning),
                          ("Fabric's wrapper", wrapped_by_fabric),
                          ("Accelerate's wrapper", wrapped_by_accelerate))),
    *(Row(what=f"{name}: `wrapper.hparams`, `.averaged`, `.hyper_step`",
          truth="the optimizer's own", check=partial(check, usable))
      for name, check in (("Lightning's wrapper", wrapped_by_lightning),
                          ("Fabric's wrapper", wrapped_by_fabric))),
    Row(what="Accelerate's wrapper: `wrapper.hparams`",
        truth="Accelerate's `AttributeError`; use `unwrap`",
        check=refused_by_accelerate, refused=True),
    Row(what="`st.SelfTuning`: torch's other optimizers",
        truth="the inner optimizer, bit for bit",
        check=partial(inside_selftuning, torch_optimizers, lambda n: n not in ("Muon", "LBFGS"))),
    Row(what="`st.SelfTuning(torch.optim.Muon)`", truth="the inner optimizer, bit for bit",
        check=partial(inside_selftuning, torch_optimizers, lambda n: n == "Muon")),
    Row(what="`st.SelfTuning(torch.optim.LBFGS)`", truth="a refusal", check=lbfgs, refused=True),
    Row(what="`st.SelfTuning(torch.optim.SparseAdam)`", truth="a refusal", check=sparse,
        refused=True),
    Row(what="`st.SelfTuning`: timm's optimizers, except `adahessian` and those for CUDA only",
        truth="the inner one, bit for bit",
        check=partial(inside_selftuning, timm_optimizers, lambda n: True), slow=True),
    Row(what="`st.SelfTuning`: torchao's Adam in 8 and 4 bits and fp8",
        truth="the inner one, bit for bit",
        check=quantized),
    Row(what="peft: LoRA", truth="the two factors by hand", check=lora),
    Row(what="activation checkpointing, non-reentrant",
        truth="the run without checkpointing, bit for bit",
        check=partial(checkpointing, False)),
    Row(what="activation checkpointing, reentrant",
        truth="the run without checkpointing, or a refusal",
        check=partial(checkpointing, True)),
    Row(what="GradScaler skips the first step", truth="`hyper_step` returns None",
        check=skipped_first_step),
    Row(what="`hyper_step` every batch while accumulating", truth="`hyper_step` returns None",
        check=hyper_step_while_accumulating),
    Row(what="optimizer's state saved inside `averaged()`", truth="the state saved outside",
        check=saved_inside_averaged),
    Row(what="weights loaded inside `averaged()`",
        truth="the loaded weights are kept, or a refusal",
        check=loaded_inside_averaged),
    Row(what="an annealing scheduler together with `total_steps`", truth="a warning",
        check=annealed_twice),
    Row(what="a constant scheduler together with `total_steps`",
        truth="the run without a scheduler, bit for bit",
        check=constant_scheduler),
    Row(what="learning-rate monitors", truth="`param_groups` show the rate that is applied",
        check=shown_rate),
    Row(what="`torch.compile(opt.step)`", truth="it runs, or a refusal", check=compiled_step),
    Row(what="`dcp.save` after `eval()`", truth="the run without evaluation, bit for bit",
        check="../optim/test_distributed_checkpoints.py::test_a_state_of_evaluation_mode"),
    Row(what="`dcp.save`, `dcp.load`, one process", truth="hyperparameters and averages equal",
        check=dcp_round_trip),
    Row(what="FSDP2, two ranks: full optimizer state", truth="the uninterrupted run, bit for bit",
        check="../optim/test_distributed_checkpoints.py::test_shards_go_on_also_on_other_ranks"),
    Row(what="DDP, two ranks: 100 steps", truth="one process on all the data, to 1e-6",
        check="../optim/test_processes.py::test_two_processes"),
    Row(what="DDP: `hyper_step` on one rank only, at first or after loading",
        truth="an error within seconds",
        check="../optim/test_processes.py::test_two_processes"),
    Row(what="DDP: a rank that stops calling `hyper_step`",
        truth="an error within the timeout of the process group",
        check="../optim/test_processes.py::test_a_process_that_stops_tuning_is_named"),
    Row(what="ZeroRedundancyOptimizer", truth="a refusal", refused=True,
        check="../optim/test_processes.py::test_two_processes"),
]  # fmt: skip


def marked(row: Row) -> Any:
    marks = [needs("integrations")]
    if row.slow:
        marks.append(pytest.mark.slow)
    return pytest.param(row, id=re.sub(r"[^\w]+", "-", row.what), marks=marks)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # dcp, of one process
@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.usefixtures("traced")  # timm's Kron compiles its functions
@pytest.mark.parametrize("row", [marked(row) for row in ROWS if callable(row.check)])
def test_row(row: Row, tmp_path: Path) -> None:
    assert callable(row.check)
    row.check(tmp_path)


def test_rows_that_are_tests_elsewhere_exist() -> None:
    """Truth: the files."""
    for row in ROWS:
        if isinstance(row.check, str):
            file, name = row.check.split("::")
            assert f"def {name}(" in (HERE / file).read_text()


def table() -> str:
    lines = ["| behaviour | compared with | result |", "|---|---|---|"]
    return "\n".join(lines + [f"| {r.what} | {r.truth} | {r.state} |" for r in ROWS]) + "\n"


def test_the_page_prints_the_table() -> None:
    """Truth: the rows."""
    assert table() in PAGE.read_text(), f"print this table in {PAGE.name}:\n{table()}"
