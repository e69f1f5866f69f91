"""Lightning's command line and its configuration files. Truth: the same run in Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import EPOCH, STEPS, equal, loss_of, needs, network, train_loader, tuned, val_loader
from torch import Tensor

pytestmark = [
    needs("lightning"),
    needs("integrations"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Lightning's of jsonargparse
]
try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.cli import LightningCLI

    from selftune.integrations.lightning import SelfTuning
except (ModuleNotFoundError, ImportError):
    LightningModule = object

CONFIG = f"""
trainer:
  max_epochs: {STEPS // EPOCH}
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks: [{{class_path: selftune.integrations.lightning.SelfTuning}}]
optimizer:
  class_path: selftune.AdamW
  init_args: {{lr: 0.01, total_steps: {STEPS}, every: 2, betas: null}}
"""


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def train_dataloader(self) -> Any:
        return train_loader()

    def val_dataloader(self) -> Any:
        return val_loader()


class InPython(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return tuned(self)


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Runs the command ``fit`` with a configuration."""

    def command(config: str) -> Any:
        path = tmp_path / "run.yaml"
        path.write_text(config)
        monkeypatch.setattr("sys.argv", ["run.py", "fit", f"--config={path}"])
        return LightningCLI(Net, save_config_callback=None, seed_everything_default=False)

    return command


def test_the_options_of_tuning_come_from_a_file(fit: Callable[[str], Any]) -> None:
    cli = fit(CONFIG)
    by_hand = InPython()
    Trainer(
        max_epochs=STEPS // EPOCH, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[SelfTuning()],
    ).fit(by_hand)  # fmt: skip
    assert equal(cli.model.state_dict(), by_hand.state_dict())


def test_an_unknown_option_is_refused(
    fit: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fit(CONFIG.replace("total_steps", "total_stps"))
    assert "total_stps" in capsys.readouterr().err
