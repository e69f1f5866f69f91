"""Slopes of the sweep. Truth: all weights of the step, written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selftune.method.slopes import Slopes


def products(grads: list[Tensor], moves: list[Tensor]) -> float:
    return sum(float((g.double() * m).sum()) for g, m in zip(grads, moves, strict=True))


def test_slopes_of_small_tensors_are_exact_and_those_of_large_ones_near() -> None:
    """Twin: sums over all weights; three standard errors where a tenth stands for all."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"small": [(20, 16), (20,), (511,)], "large": [(300, 256)]}
    for kind, shapes in sizes.items():
        grads, later, weights, moves = (
            [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)
        )
        slopes = Slopes()
        assert slopes.along(grads, weights) is None
        found = slopes.along(later, [w + m for w, m in zip(weights, moves, strict=True)])
        assert found is not None
        for got, some in zip(found, (grads, later), strict=True):
            count = sum(w.numel() for w in weights)
            slack = 1e-3 if kind == "small" else 3 * math.sqrt(10 * count)
            assert abs(got - products(some, moves)) < slack
        kept = sum(w.numel() for w in slopes.weights)
        assert kept == count if kind == "small" else kept < 0.12 * count


def test_half_precision_is_summed_in_float32() -> None:
    """Twin: the same in float32; bfloat16 would round a sum of 500 ones to 256."""
    slopes, ones = Slopes(), torch.ones(500, dtype=torch.bfloat16)
    slopes.along([ones], [torch.zeros_like(ones)])
    assert slopes.along([ones], [ones]) == (500.0, 500.0)


def test_other_tensors_begin_anew() -> None:
    """Law: a step between different lists of tensors has no slope."""
    slopes = Slopes()
    slopes.along([torch.ones(3)], [torch.ones(3)])
    assert slopes.along([torch.ones(3)] * 2, [torch.ones(3)] * 2) is None
    slopes.forget()
    assert slopes.along([torch.ones(3)], [torch.ones(3)]) is None


def test_steps_within_the_rounding_of_the_weights_have_no_slope() -> None:
    """Law: float32 keeps 24 bits, so a step of 1e-9 at weights near 1 is left to rounding."""
    generator = torch.Generator().manual_seed(0)
    weights, grads = (torch.randn(100, generator=generator, dtype=torch.float64) for _ in range(2))
    for size, dtype, measured in (
        (1e-9, torch.float32, False), (1e-6, torch.float32, True), (1e-9, torch.float64, True),
        (1e-4, torch.bfloat16, False), (1e-2, torch.bfloat16, True),
    ):  # fmt: skip
        slopes = Slopes()
        slopes.along([grads.to(dtype)], [weights.to(dtype)])
        found = slopes.along([grads.to(dtype)], [(weights - size * grads).to(dtype)])
        assert found is not None
        assert (found[0] < 0, found[1] < 0) == (measured, measured), (size, dtype)
