"""The pool one self-tuned run is ranked in: random search with plain torch loops.

Learning rate, 1 − momentum (1 − β₁), weight decay and α of η/(1+αt) are drawn log-uniformly
over four decades. Every run is evaluated at the same running average of weights and buffers
that selftune uses. Finished runs are kept in a JSON file and never trained again.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from benchmarks.workloads import WORKLOADS, Workload

# Four decades each: (lowest, highest).
SPACES = {
    "SGD": dict(lr=(1e-4, 1.0), one_minus=(1e-4, 1.0), weight_decay=(1e-6, 1e-2)),
    "AdamW": dict(lr=(1e-5, 1e-1), one_minus=(1e-4, 1.0), weight_decay=(1e-4, 1.0)),
}
DECAY = (1e-6, 1e-2)
RHO = 0.98


@dataclass(frozen=True)
class Start:
    """One draw from the space."""

    lr: float
    momentum: float
    weight_decay: float
    decay: float

    def make(self, module, optimizer: str, params, **extra):
        """The optimizer of that name from ``module`` (``torch.optim`` or ``selftune``)."""
        if optimizer == "SGD":
            own = dict(momentum=self.momentum)
        else:
            own = dict(betas=(self.momentum, 0.999))
        make = getattr(module, optimizer)
        return make(params, lr=self.lr, weight_decay=self.weight_decay, **own, **extra)


def draw(optimizer: str, seed: int) -> Start:
    """The seed's hyperparameters."""
    generator = torch.Generator().manual_seed(10_000 + seed)

    def log_uniform(low: float, high: float) -> float:
        u = torch.rand((), generator=generator, dtype=torch.float64).item()
        return math.exp(math.log(low) + u * math.log(high / low))

    space = SPACES[optimizer]
    lr, one_minus, decay_rate = (
        log_uniform(*space[k]) for k in ("lr", "one_minus", "weight_decay")
    )
    return Start(lr, 1 - one_minus, decay_rate, log_uniform(*DECAY))


def averaged_model(model: nn.Module) -> AveragedModel:
    """The running average of weights and buffers, ρ = min(0.98, 1 − 1/(t+2))."""

    def average(mean, new, count):
        if not new.is_floating_point():  # BatchNorm counts its batches
            return new
        return torch.lerp(mean, new, 1 - min(RHO, 1 - 1 / (int(count) + 2)))

    return AveragedModel(model, avg_fn=average, use_buffers=True)


def run_plain(workload: Workload, optimizer: str, start: Start, seed: int) -> dict[str, float]:
    """Train once with fixed hyperparameters; losses at the average of the weights."""
    model = workload.model(seed)
    opt = start.make(torch.optim, optimizer, model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + start.decay * t))
    averaged = averaged_model(model)
    averaged.update_parameters(model)
    for _, batch in zip(range(workload.steps), workload.batches("train", seed), strict=False):
        opt.zero_grad()
        loss = workload.loss(model, batch)
        loss.backward()
        opt.step()
        schedule.step()
        averaged.update_parameters(model)
        if not torch.isfinite(loss):
            return dict(val=math.inf, test=math.inf)
    module = copy.deepcopy(averaged.module)
    return {
        split: value if math.isfinite(value := workload.evaluate(module, split)) else math.inf
        for split in ("val", "test")
    }


def pool(name: str, optimizer: str, size: int, folder: Path) -> list[dict[str, float]]:
    """The random-search runs of a workload, from disk where they are finished already."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"pool-{name}-{optimizer}.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    workload = WORKLOADS[name]()
    for seed in range(len(runs), size):
        runs.append(run_plain(workload, optimizer, draw(optimizer, seed), seed))
        path.write_text(json.dumps(runs))
    return runs[:size]


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in WORKLOADS:
        for optimizer in SPACES:
            runs = pool(name, optimizer, args.size, args.folder)
            losses = sorted(run["val"] for run in runs)
            print(
                name,
                optimizer,
                [round(losses[int(q * (len(losses) - 1))], 4) for q in (0, 0.05, 0.15, 0.5)],
            )
