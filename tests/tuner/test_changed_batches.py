"""Batches that a pass changes in place. Truths: the same model without changes, resumed runs."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from jobs import Outage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import selftune as st

X = 255 * torch.rand(160, 4, generator=torch.Generator().manual_seed(0))
Y = (X / 255).sum(1, keepdim=True)


class Rows(Dataset[Any]):
    """Examples that are collated anew in every epoch."""

    def __init__(self, *, named: bool) -> None:
        self.named = named

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, at: int) -> Any:
        return {"x": X[at].clone(), "labels": Y[at]} if self.named else (X[at].clone(), Y[at])


class Scaled(nn.Module):
    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.layer, self.in_place = nn.Linear(4, 1), in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.div_(255) if self.in_place else x.div(255))


def popping(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As transformers' ``compute_loss`` does."""
    labels = batch.pop("labels")
    return F.mse_loss(model(batch.pop("x")), labels)


def reading(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["labels"])


def fit(*, in_place: bool, objective: Callable[..., Tensor] | None, **options: Any) -> Any:
    torch.manual_seed(1)
    model = Scaled(in_place=in_place)
    how = {"loss_fn": F.mse_loss} if objective is None else {"objective": objective}
    settings = {"hparams": {"lr": 0.01}, "compile": False, **how}
    settings |= {n: options.pop(n) for n in ("population", "estimator") if n in options}
    rows = Rows(named=objective is not None)
    result = st.Tuner(model, **settings).fit(
        DataLoader(rows, 16), DataLoader(rows, 40), epochs=6, progress=False, **options
    )
    return result, model


CASES: dict[str, dict[str, Any]] = {
    "one run": {},
    "population": {"population": 2},
    "whole steps": {"estimator": st.BestResponse(update=True)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("objective", [None, reading, popping])
def test_passes_get_batches_of_their_own(case: str, objective: Any) -> None:
    calm = reading if objective is popping else objective
    expected, _ = fit(in_place=False, objective=calm, **CASES[case])
    found, model = fit(in_place=True, objective=objective, **CASES[case])
    assert found.best_loss == pytest.approx(expected.best_loss, rel=1e-4)
    for name, values in expected.history.items():
        torch.testing.assert_close(
            torch.as_tensor(found.history[name]),
            torch.as_tensor(values),
            rtol=1e-3,
            atol=1e-6,
            equal_nan=True,
        )
    with torch.no_grad():
        assert float(F.mse_loss(model(X.clone()), Y)) == pytest.approx(found.best_loss, rel=1e-4)


def test_a_resumed_run_copies_them_too(tmp_path: Path) -> None:
    """Truth: the run that was not interrupted, bit for bit."""

    def outage(progress: Any) -> None:
        if progress.step >= 30:
            raise Outage

    expected, _ = fit(in_place=True, objective=None)
    with pytest.raises(Outage):
        fit(in_place=True, objective=None, log_dir=tmp_path, callbacks=[outage])
    found, _ = fit(in_place=True, objective=None, log_dir=tmp_path, resume=True)
    assert found.best_loss == expected.best_loss


class Handled:
    """A batch with a handle that cannot be copied."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.lock = x, y, threading.Lock()

    def to(self, device: torch.device) -> Any:
        return self


def test_batches_that_cannot_be_copied_are_shared() -> None:
    """Truth: the run on the same tensors."""
    plain = list(zip(X.split(16), Y.split(16), strict=True))
    ends = []
    for batches in ([Handled(*batch) for batch in plain], plain):
        torch.manual_seed(1)
        model = Scaled(in_place=False)
        loss = lambda m, b: F.mse_loss(m(b.x), b.y)  # noqa: E731
        how = {"loss_fn": F.mse_loss} if batches is plain else {"objective": loss}
        tuner = st.Tuner(model, compile=False, **how)
        ends.append(tuner.fit(batches[:8], batches[8:], epochs=3, progress=False).best_loss)
    assert ends[0] == pytest.approx(ends[1])


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("in_place", [False, True])
def test_named_tuples_are_copied_only_if_they_are_changed(
    in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, **o: copies.append(t.shape) or clone(t, **o))
    batches = [Pair(x.clone(), y) for x, y in zip(X.split(16), Y.split(16), strict=True)]
    copies.clear()
    loss = lambda m, b: F.mse_loss(m(b.x), b.y)  # noqa: E731
    tuner = st.Tuner(Scaled(in_place=in_place), objective=loss, compile=False)
    tuner.fit(batches[:8], batches[8:], steps=40, progress=False)
    count = sum(shape == (16, 4) for shape in copies)
    assert count > 40 if in_place else count <= 4
