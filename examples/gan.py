"""A GAN that tunes the learning rates of both players and its gradient penalty in one run.

    python examples/gan.py [--steps 3000] [--trials 0]

The data are a ring of eight Gaussians. The metric is the energy distance of samples to held-out
points (0 is perfect), reported on points not used for tuning. ``--trials 8`` searches over width
and latent size.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from selftune import search
from selftune.search.families import GAN, energy_distance


def ring(count: int, seed: int) -> Tensor:
    """Points around eight centres on a circle."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    centre = torch.stack([angle.cos(), angle.sin()], 1)
    return centre + 0.05 * torch.randn(count, 2, generator=generator)


def main() -> None:
    """Train, and evaluate on unused points."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--trials", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, val, test = ring(4000, 0), ring(1000, 1), ring(1000, 2)
    width, latent = 64, 8

    def trial(space: search.Space) -> float:
        torch.manual_seed(0)
        made = GAN(2, space.suggest_categorical("latent", (2, 8)),
                   space.suggest_categorical("width", (32, 64, 128)))  # fmt: skip
        made.fit(train, val, args.steps)
        with torch.no_grad():
            return float(made.energy(val))

    if args.trials:
        found = search.select(trial, trials=args.trials)
        print(found.table())
        width, latent = found.params["width"], found.params["latent"]
    torch.manual_seed(0)
    gan = GAN(2, latent, width).fit(train, val, args.steps)
    noted = len(gan.history.get("energy", []))  # none in the first steps
    for at in sorted({0, noted // 2, noted - 1} & {*range(noted)}):
        print(", ".join(f"{name} {values[at]:.3g}" for name, values in gan.history.items()))
    with torch.no_grad():
        print(f"energy distance on unseen points: {float(gan.energy(test)):.4f}"
              f" (of real points: {float(energy_distance(val, test)):.4f})")  # fmt: skip


if __name__ == "__main__":
    main()
