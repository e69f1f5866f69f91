"""Time and memory of the drop-in step against torch.optim's, eager, on one thread.

Baseline: ``zero_grad, forward, backward, step`` of ``torch.optim`` on the workload's CNN. Ours:
the same with four hyperparameters tuned and a ``hyper_step`` every 5 steps, its validation
pass included (that pass alone costs a fifth of a step). Blocks of steps of both alternate in
one run and medians are compared, since shared machines drift.

    python -m benchmarks.overhead

Typical output is kept in ``docs/benchmarks-cost.md``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selftune as st
from benchmarks.workloads import small_cnn

Batch = tuple[Tensor, Tensor]
OPTIONS = {
    "SGD": dict(lr=0.01, momentum=0.9, weight_decay=1e-4),
    "AdamW": dict(lr=1e-3, weight_decay=1e-2),
}
TUNED = {
    "SGD": ("lr", "decay", "momentum", "weight_decay"),
    "AdamW": ("lr", "decay", "beta1", "weight_decay"),
}


def plain(name: str, batch: Batch) -> tuple[Callable[[], None], int]:
    """A training step with torch's optimizer, and the bytes of weights and state."""
    model = small_cnn().to(batch[0].device)
    opt = getattr(torch.optim, name)(model.parameters(), **OPTIONS[name])

    def step() -> None:
        opt.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        opt.step()

    step()
    return step, held(model, opt)


def tuned(name: str, batch: Batch, **options: Any) -> tuple[Callable[[], None], int]:
    """The same with four hyperparameters tuned."""
    model = small_cnn().to(batch[0].device)
    make = getattr(st, name)
    opt = make(
        model.parameters(), **OPTIONS[name], tune=TUNED[name], probe=False, decay=1e-5, **options
    )

    def step() -> None:
        opt.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        opt.step()
        opt.hyper_step(lambda: F.cross_entropy(model(batch[0]), batch[1]))

    for _ in range(40):  # the weights of the start are kept no longer
        step()
    return step, held(model, opt)


def held(model: nn.Module, opt: torch.optim.Optimizer) -> int:
    """Bytes of the weights and everything the optimizer keeps for them."""
    tensors = [t for e in opt.state.values() for t in e.values() if isinstance(t, Tensor)]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*tensors, *model.parameters()]
    }
    return sum(storages.values())


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="steps a block")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch = (
        torch.randn(100, 1, 28, 28, device=args.device),
        torch.randint(10, (100,), device=args.device),
    )
    print(
        "| optimizer | torch, ms a step | ours, ms a step | ratio (quartiles) | memory of weights "
        "and state, torch → ours |\n|---|---|---|---|---|"
    )
    for name in OPTIONS:
        (base, base_bytes), (ours, our_bytes) = plain(name, batch), tuned(name, batch)
        times: dict[Callable[[], None], list[float]] = {base: [], ours: []}
        for _ in range(args.rounds):
            for step, taken in times.items():
                start = time.perf_counter()
                for _ in range(args.steps):
                    step()
                synchronize(batch[0].device)
                taken.append(1e3 * (time.perf_counter() - start) / args.steps)
        ratios = [b / a for a, b in zip(times[base], times[ours], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        torch_ms, our_ms = (statistics.median(taken) for taken in times.values())
        memory = f"{base_bytes / 1e6:.2f} MB → {our_bytes / 1e6:.2f} MB"
        print(
            f"| {name} | {torch_ms:.2f} | {our_ms:.2f} | {middle:.2f} ({low:.2f}…{high:.2f}) "
            f"| {memory} ({our_bytes / base_bytes:.1f}×) |"
        )


if __name__ == "__main__":
    main()
