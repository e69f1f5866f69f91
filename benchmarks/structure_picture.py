"""Draws docs/img/structure.png: what `examples/structure.py` has chosen, and when.

    python examples/structure.py --log-dir runs/structure
    python -m benchmarks.structure_picture [--log-dir runs/structure]

The run's TensorBoard log is all that is read. Takes two minutes; needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FILE = Path(__file__).parents[1] / "docs" / "img" / "structure.png"
Curve = tuple[NDArray[np.int64], NDArray[np.float64]]
KERNELS = {f"structure/choice/0/{i}": f"kernel {k} × {k}" for i, k in enumerate((3, 5, 7))}
RULES = {f"hyper/mix_{name.lower()}": name for name in ("SGD", "AdamW", "Lion")}
SIZES = {"structure/parameters": "parameters", "structure/multiply_adds": "multiply-adds"}
BATCHES = {"structure/batch_size": "batch size", "structure/noise_scale": "noise scale"}


def read(folder: Path) -> tuple[dict[str, Curve], int]:
    """Steps and values by tag, and the step at which one optimizer is chosen."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        steps, values = zip(*((p.step, p.value) for p in points), strict=True)
        found[tag] = np.array(steps), np.array(values)
    return found, events.Tensors("rule/text_summary")[0].step


def draw(
    axes: Axes, curves: Mapping[str, Curve], names: Mapping[str, str], title: str, end: int
) -> None:
    """Curves as steps up to the end of the run, with a legend."""
    for tag, label in names.items():
        steps, values = curves[tag]
        axes.step(np.append(steps, end), np.append(values, values[-1]), where="post", label=label)
    axes.set_xlim(0, end)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("training step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)


def shares(curves: Mapping[str, Curve], choice: int) -> dict[str, Curve]:
    """Weights of the optimizers, without their sharpening up to the choice; then one is left."""
    steps = curves[next(iter(RULES))][0]
    values = np.stack([curves[tag][1] for tag in RULES])
    weights = values / values.sum(0)
    weights[:, steps >= choice] = (weights == weights.max(0))[:, steps >= choice]
    return {tag: (steps, row) for tag, row in zip(RULES, weights, strict=True)}


def main() -> None:
    """Read and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log-dir", type=Path, default=Path("runs/structure"))
    curves, choice = read(parser.parse_args().log_dir)
    end = int(curves["Loss/val"][0][-1])
    gates = {t: t.removeprefix("structure/open/") for t in curves if t.startswith("structure/open")}
    first = {t: (np.array([0]), np.array([1.0])) for t in SIZES}
    joined = {
        t: tuple(np.concatenate(pair) for pair in zip(first[t], curves[t], strict=True))
        for t in SIZES
    }
    figure, axes = plt.subplots(1, 4, figsize=(13, 3))
    draw(axes[0], joined, SIZES, "size, as a share of the initial one", end)
    draw(axes[1], shares(curves, choice), RULES, "optimizer: weight of each", end)
    draw(axes[2], curves, KERNELS, "kernel size: weight of each", end)
    draw(axes[3], curves, BATCHES, "batch size and noise scale", end)
    axes[0].set_ylim(0, 1.05)
    axes[3].set_yscale("log", base=2)
    figure.tight_layout()
    figure.savefig(FILE, dpi=110)
    print(f"{FILE}: {', '.join(f'{gates[t]} {curves[t][1][-1]:.0f}' for t in gates)} units left")


if __name__ == "__main__":
    main()
