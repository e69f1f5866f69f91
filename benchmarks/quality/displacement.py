"""How far weights come at fixed learning rates, against random walks of the same moves.

    SELFTUNE_DATA=... python -m benchmarks.quality.displacement [--only fashion-vit]

Plain AdamW with linear decay on the suite of the proof, β₁ and β₂ as after a learning-rate sweep.
Prints for every rate the validation loss at the end (of the running average) over that of the best
rate and, in brackets, two squared ratios after a third of the run: of the distance from the start
to a random walk of the same segments, and S² of ``selftune.method.displacement``, which forgets the
start.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from benchmarks.proof.training import RunningAverage
from benchmarks.workloads import SUITE, named
from selftune.control import SweepSettings
from selftune.method import Displacement, DisplacementLimit
from selftune.method.step import local_sum
from selftune.rules.adam import fitting_beta2

RATES = "0.001,0.003,0.01,0.03,0.1"

Found = tuple[float, float, float]
"""Validation loss at the end, and the squared ratios from the start and of the library."""


def run(name: str, rate: float, seed: int) -> Found:
    """One run at a rate, in a process of its own."""
    torch.set_num_threads(1)
    logging.getLogger("selftune").setLevel(logging.ERROR)
    workload = named(name)
    model, batches = workload.model(seed), workload.batches("train", seed)
    sweep, limit = SweepSettings(), DisplacementLimit()
    beta1 = 1 - 1 / max(sweep.least_memory, workload.steps / sweep.calm)
    betas = beta1, fitting_beta2(workload.steps)
    opt = torch.optim.AdamW(model.parameters(), rate, betas=betas, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 - t / workload.steps)
    average = RunningAverage(model)

    def weights() -> Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    start = mark = weights()
    displacement = Displacement.begin([start], torch.zeros(1, dtype=torch.int64))
    squares, ratios = 0.0, (1.0, 1.0)
    for step in range(1, workload.steps + 1):
        opt.zero_grad()
        workload.loss(model, next(batches)).backward()
        opt.step()
        schedule.step()
        average.update()
        ended = step - int(displacement.since) >= limit.segment
        if ended and step <= workload.steps // 3:
            after = weights()
            displacement = displacement.update([after], torch.tensor([step]), limit, local_sum)
            squares, mark = squares + float((after - mark).square().sum()), after
            straight = float((after - start).square().sum()) / squares
            ratios = straight, float(displacement.square([after], local_sum))
    with average.showing():
        return workload.evaluate(model, "val"), *ratios


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(SUITE), help="workloads, by commas")
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    rates = [float(r) for r in args.rates.split(",")]
    print(f"| workload | {' | '.join(f'{r:g}' for r in rates)} |\n|{'---|' * (len(rates) + 1)}")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as executor:
        jobs = {
            name: [[executor.submit(run, name, r, s) for s in range(args.seeds)] for r in rates]
            for name in args.only.split(",")
        }
        for name, seeds in jobs.items():
            found = [
                [
                    statistics.median(values)
                    for values in zip(*(j.result() for j in some), strict=True)
                ]
                for some in seeds
            ]
            best = min(loss for loss, _, _ in found)
            cells = [f"{loss / best:.2f} ({a:.2f}, {b:.2f})" for loss, a, b in found]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
