"""A goal for size against magnitude pruning: parameters, multiply-adds and test accuracy.

A convolutional net, or a residual one (``--net resnet``), that is wider than 5,000 images of
Fashion-MNIST need, trained for as many gradient evaluations in each row:

- *wide*: as it is;
- *goal*: a gate on each unit, and `structure.Goal` of half the parameters and multiply-adds; the
  evaluations of its closings are taken off the steps;
- *goal, late*: the same with closings up to half of the run;
- *gates, λ ≥ …*: `penalties.Gates` with λ tuned on validation data above a lower bound;
- *magnitude*: the wide net for two thirds of the steps, then `torch.nn.utils.prune.ln_structured`
  down to as many units a layer as the goal has left, and fine-tuning for the last third;
- *small*: a net of that size from the start.

Means ± standard deviations over the seeds; "kept" are the shares of the wide net's.

    SELFTUNE_DATA=... python -m benchmarks.structure [--net resnet] [--seeds 0 1 2] [--steps 600]

Typical output (two shared cores, torch 2.13):

    | | test accuracy, % | parameters kept, % | multiply-adds kept, % | units | λ |
    |---|---|---|---|---|---|
    | wide | 88.02 ± 0.12 | 100 ± 0 | 100 ± 0 | 24 / 48 / 96 | – |
    | goal, late | 87.61 ± 0.17 | 43 ± 4 | 49 ± 1 | 20 / 28 / 70 | – |
    | goal | 87.88 ± 0.18 | 38 ± 4 | 49 ± 1 | 22 / 24 / 71 | – |
    | magnitude | 86.73 ± 0.34 | 38 ± 4 | 49 ± 1 | 22 / 24 / 71 | – |
    | small | 87.42 ± 0.12 | 38 ± 4 | 49 ± 1 | 22 / 24 / 71 | – |

The residual network is in ``docs/structure.md``.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import selftune as st
from benchmarks.wide_nets import NETS, Net, norm_of

TRAIN, VAL, BATCH = 5000, 1000, 64
START = 3e-3
"""λ at the start."""


class Data:
    """Images of Fashion-MNIST: a random subset for training and validation, and the test set."""

    def __init__(self, seed: int) -> None:
        file = np.load(Path(os.environ["SELFTUNE_DATA"]) / "fashion_mnist.npz")
        generator = torch.Generator().manual_seed(seed)
        pick = torch.randperm(len(file["x_train"]), generator=generator)[: TRAIN + VAL].numpy()
        self.x, self.y = self._tensors(file["x_train"][pick], file["y_train"][pick])
        self.test = self._tensors(file["x_test"], file["y_test"])
        self._generator = generator

    @staticmethod
    def _tensors(x: Any, y: Any) -> tuple[Tensor, Tensor]:
        return (torch.from_numpy(x).float() / 255 - 0.286)[:, None] / 0.353, torch.from_numpy(
            y
        ).long()

    def batch(self, val: bool = False) -> tuple[Tensor, Tensor]:
        """A random batch."""
        size, start = (VAL, TRAIN) if val else (TRAIN, 0)
        pick = start + torch.randint(
            size, (2 * BATCH if val else BATCH,), generator=self._generator
        )
        return self.x[pick], self.y[pick]


def train(
    opt: st.AdamW, model: nn.Module, data: Data, steps: int,
    aim: st.structure.Goal | None = None,
) -> None:  # fmt: skip
    """A loop of one's own."""

    def closure() -> Tensor:
        x, y = data.batch(val=True)
        return F.cross_entropy(model(x), y)

    for _ in range(steps):
        x, y = data.batch()
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.report(loss)
        opt.hyper_step(closure)
        if aim is not None and aim.step(closure):
            opt.sync(weights=False)


def accuracy(model: nn.Module, data: Data) -> float:
    """On the test set, in percent."""
    model.eval()
    x, y = data.test
    with torch.no_grad():
        right = sum(
            int((model(a).argmax(1) == b).sum())
            for a, b in zip(x.split(1000), y.split(1000), strict=True)
        )
    model.train()
    return 100 * right / len(y)


def wide(net: Net, data: Data, steps: int, widths: tuple[int, ...]) -> tuple[Any, float]:
    """All units, or a net that is smaller from the start."""
    model = net.make(False, widths)
    opt = st.AdamW(model, lr=3e-3, weight_decay=0.01, total_steps=steps)
    train(opt, model, data, steps)
    with opt.averaged():
        return model, accuracy(model, data)


def goal(net: Net, data: Data, steps: int, end: float) -> tuple[nn.Module, float]:
    """The pruned model at half the size, and its accuracy."""
    model, closings, batches = net.make(True, net.widths), 5, 4
    steps -= closings * batches
    groups = st.structure.parameter_groups(model)
    opt = st.AdamW(groups, lr=3e-3, weight_decay=0.01, total_steps=steps, model=model)
    aim = st.structure.Goal(
        model, data.x[:1], 0.5, of=("parameters", "multiply_adds"), total_steps=steps,
        end=end, closings=closings, batches=batches,
    )  # fmt: skip
    train(opt, model, data, steps, aim)
    with opt.averaged():
        pruned = st.structure.prune(model, data.x[:2])
    return pruned, accuracy(pruned, data)


def gates(net: Net, data: Data, steps: int, least: float | None) -> tuple[nn.Module, float, float]:
    """The pruned model, its accuracy, and λ at the end."""
    model = net.make(True, net.widths)
    groups = st.structure.parameter_groups(model, lr=3e-2)
    opt = st.AdamW(
        groups, lr=3e-3, weight_decay=0.01, total_steps=steps, model=model,
        penalty=st.penalties.Gates(max(START, least or 0.0)),
        bounds=None if least is None else {"gates": (least, 100.0)},
    )  # fmt: skip
    train(opt, model, data, steps)
    with opt.averaged():
        pruned = st.structure.prune(model, data.x[:2])
    return pruned, accuracy(pruned, data), float(opt.hparams["gates"])


def magnitude(net: Net, data: Data, steps: int, kept: tuple[int, ...]) -> tuple[nn.Module, float]:
    """The wide net, cut to the units of largest norm, and trained on."""
    model, first = net.make(False, net.widths), steps * 2 // 3
    opt = st.AdamW(model, lr=3e-3, weight_decay=0.01, total_steps=first)
    train(opt, model, data, first)
    opt.eval()
    masked: list[tuple[nn.Module, str]] = []
    for group, width, count in zip(net.groups, net.widths, kept, strict=True):
        first_layer, *others = (model.get_submodule(path) for path in group)
        torch_prune.ln_structured(first_layer, "weight", width - count, n=2, dim=0)
        units = first_layer.weight_mask.flatten(1).any(1)  # type: ignore[union-attr,operator]
        masked.append((first_layer, "weight"))
        norms = [norm for path in group if (norm := norm_of(model, path)) is not None]
        rest = [(layer, "weight") for layer in others]
        rest += [(m, n) for m in norms for n in ("weight", "bias")]
        rest += [(m, "bias") for m in (first_layer, *others) if m.bias is not None]
        for module, name in rest:
            axes = [1] * (getattr(module, name).ndim - 1)
            mask = units.float().view(-1, *axes).expand_as(getattr(module, name))
            torch_prune.custom_from_mask(module, name, mask)
        masked += rest
    fine = st.AdamW(model, lr=1e-3, weight_decay=0.01, total_steps=steps - first)
    train(fine, model, data, steps - first)
    with fine.averaged():
        for module, name in masked:
            torch_prune.remove(module, name)
        return copy.deepcopy(model), accuracy(model, data)


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", choices=list(NETS), default="cnn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--least", type=float, default=0.003)
    parser.add_argument(
        "--rows", nargs="+", default=["wide", "goal, late", "goal", "magnitude", "small"]
    )
    args = parser.parse_args()
    steps, least, net = args.steps, args.least, NETS[args.net]
    rows: dict[str, list[tuple[float, tuple[int, ...], float]]] = {}

    def add(name: str, seed: int, run: Callable[[Data], Any]) -> tuple[int, ...]:
        torch.manual_seed(seed)
        model, right, *strength = run(Data(seed))
        left = net.units(model)
        rows.setdefault(name, []).append((right, left, strength[0] if strength else math.nan))
        print(f"seed {seed}: {name}, {right:.2f} %, units {left}, λ {strength}", flush=True)
        return left

    for seed in args.seeds:
        left: tuple[int, ...] = net.widths
        runs: dict[str, Callable[[Data], Any]] = {
            "wide": lambda d: wide(net, d, steps, net.widths),
            "goal, late": lambda d: goal(net, d, steps, 0.5),
            "gates, λ tuned": lambda d: gates(net, d, steps, None),
            f"gates, λ ≥ {least:g}": lambda d: gates(net, d, steps, least),
            "goal": lambda d: goal(net, d, steps, 0.2),
            "magnitude": lambda d: magnitude(net, d, steps, left),  # noqa: B023
            "small": lambda d: wide(net, d, steps, left),  # noqa: B023
        }
        for unknown in sorted({*args.rows} - {*runs}):
            parser.error(f"--rows {unknown!r} is none of {'; '.join(runs)}")
        for name, run in runs.items():
            if name in args.rows:
                left = add(name, seed, run)
    print("\n| | test accuracy, % | − wide, points | parameters kept, % | multiply-adds kept, % "
          "| units | λ |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    whole = net.size(net.widths)
    for name, found in rows.items():
        shares = [[100 * net.size(left)[i] / whole[i] for _, left, _ in found] for i in (0, 1)]
        means = [statistics.mean(k) for k in zip(*(left for _, left, _ in found), strict=True)]
        pairs = zip(found, rows.get("wide", []), strict=False)
        paired = [one[0] - other[0] for one, other in pairs] if name != "wide" else []
        cells = [_spread([right for right, _, _ in found], 2), _difference(paired)]
        cells += [_spread(share, 0) for share in shares]
        cells += [" / ".join(f"{m:.0f}" for m in means)]
        strength = statistics.mean(f[2] for f in found)
        shown = "–" if math.isnan(strength) else f"{strength:.2g}"
        print(f"| {name} | {' | '.join(cells)} | {shown} |")


def _difference(paired: list[float]) -> str:
    """The mean of paired differences and its standard error."""
    if len(paired) < 2:
        return "–"
    error = statistics.stdev(paired) / len(paired) ** 0.5
    return f"{statistics.mean(paired):+.2f} ± {error:.2f}"


def _spread(values: list[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


if __name__ == "__main__":
    main()
