"""What-if pictures. Truths: what was handed in, as matplotlib holds it; `predict` itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import selftune as st
from selftune.monitor import pictures


def test_curves_show_what_is_predicted() -> None:
    (first,) = pictures.curve("a", [0.1, 0.3, 1.0], [3.0, 1.0, 2.0], 0.5).axes
    assert first.lines[0].get_xydata().tolist() == [[0.1, 3.0], [0.3, 1.0], [1.0, 2.0]]
    assert list(first.lines[1].get_xdata()) == [0.5, 0.5]
    assert (first.get_xlabel(), first.get_ylabel()) == (
        "a (dashed: 0.5, now)", "predicted validation loss"
    )  # fmt: skip
    assert [t.get_text() for t in first.get_xticklabels()] == ["0.1", "0.3", "1"]
    (second,) = pictures.curve("b", [0.0, 1.0], [1.0, 1.0], 0.0).axes
    assert (first.get_xscale(), second.get_xscale()) == ("log", "linear")


def test_labels_are_legible_at_half_the_size() -> None:
    """Law: TensorBoard shows a picture about 300 pixels wide; text must stay above 9 of them."""
    figures = [
        pictures.curve("a", [0.1, 1.0], [3.0, 2.0], 0.5),
        pictures.plane(("a", "b"), ([1, 2], [1, 2]), np.eye(2), ([1, 2], [1, 2])),
    ]
    for figure in figures:
        figure.canvas.draw()
        shrunk = 300 / (figure.get_figwidth() * figure.dpi)
        for axes in figure.axes:
            texts = [axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels()]
            texts += axes.get_yticklabels()
            for text in (t for t in texts if t.get_text()):
                assert text.get_size() * figure.dpi / 72 * shrunk > 9


def test_a_plane_has_the_way() -> None:
    losses = np.arange(6.0).reshape(2, 3)
    figure = pictures.plane(
        ("a", "b"), ([0.1, 0.2], [1.0, 2.0, 3.0]), losses, ([0.1, 0.15], [1.0, 2.0])
    )
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.1, 1.0], [0.15, 2.0]]
    assert figure.axes[0].get_xlim() == (0.1, 0.2)


@pytest.mark.parametrize("name", ["log_every", "pictures_every"])
def test_intervals_that_are_none_are_refused(name: str) -> None:
    tuner = st.Tuner(torch.nn.Linear(4, 1), torch.nn.functional.mse_loss)
    batches = [(torch.ones(2, 4), torch.ones(2, 1))]
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        tuner.fit(batches, batches, steps=5, **{name: 0})


@pytest.mark.parametrize("every", [None, pytest.param(40, marks=pytest.mark.slow)])
def test_they_come_into_the_log_and_change_nothing(every: int | None, tmp_path: Path) -> None:
    """Law: a run with pictures is the run without, bit for bit."""

    def run(pictures_every: int | None, folder: Path | None) -> Any:
        torch.manual_seed(0)
        x = torch.randn(256, 4)
        data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
        loader = torch.utils.data.DataLoader(data, 16, shuffle=True)
        model = torch.nn.Sequential(
            st.nn.Dropout(0.1, "first"), torch.nn.Linear(4, 8), torch.nn.ReLU(),
            st.nn.Dropout(0.1, "second"), torch.nn.Linear(8, 1),
        )  # fmt: skip
        tuner = st.Tuner(model, torch.nn.functional.mse_loss, compile=False)
        return tuner.fit(
            loader, val=0.25, steps=60, progress=False, log_dir=folder,
            pictures_every=pictures_every,
        )  # fmt: skip

    result = run(every, tmp_path)
    images = EventAccumulator(str(tmp_path), {"images": 0}).Reload()
    tags = images.Tags()["images"]
    if every is None:
        assert tags == []
        return
    assert "what-if/first" in tags
    assert any(" and " in tag for tag in tags)
    assert [e.step for e in images.Images("what-if/first")] == [40, 60]
    np.testing.assert_array_equal(run(None, None).history["val_loss"], result.history["val_loss"])


def test_pictures_of_no_response_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batches = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(5)]
    tuner = st.Tuner(torch.nn.Linear(3, 1), torch.nn.MSELoss(), compile=False)
    tuner.fit(
        batches[:4], batches[4:], steps=24, log_dir=tmp_path, pictures_every=10, progress=False
    )
    (told,) = (r.getMessage() for r in caplog.records if "draws nothing" in r.getMessage())
    assert told.startswith("pictures_every=10 draws nothing: the response of the weights")
