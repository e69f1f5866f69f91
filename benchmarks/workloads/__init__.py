"""Real training jobs, defined in plain torch and shared by every benchmark.

A workload says what is trained, on what, for how long and how it is judged; it knows nothing of
selftune. Digits come with scikit-learn, Fashion-MNIST from torchvision where ``SELFTUNE_DATA`` is
not set; the others from that folder: ``tinyshakespeare.txt.gz``, ``wikitext2.train.txt.gz`` and
``uci/{concrete,energy,power,wine_red,yacht}.npz`` with ``x``, ``y`` and ``test_mask`` (20 splits).
The extended list also reads ``spoken_digits.npz`` (``x``, ``y``), ``omniglot_small.npz`` (``x``,
``y``) and ``diamonds.npz`` (``numeric``, ``categorical``, ``price``) from it, two photographs that
come with scikit-learn, and the sources of Python's standard library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks.workloads._base import Batch, Workload
from benchmarks.workloads.extended import EXTENDED
from benchmarks.workloads.further import FURTHER
from benchmarks.workloads.images import (
    autoencoder,
    digits,
    fashion,
    fashion_cnn,
    fashion_vit,
    few_digits,
    load_fashion_mnist,
    noisy_fashion,
    small_cnn,
)
from benchmarks.workloads.latest import LATEST
from benchmarks.workloads.tables import SETS, uci
from benchmarks.workloads.text import shakespeare_lstm, shakespeare_transformer, wikitext_lstm

__all__ = [
    "EXTENDED",
    "FURTHER",
    "LATEST",
    "LONG",
    "SLICE",
    "SUITE",
    "SUITES",
    "WORKLOADS",
    "Batch",
    "Workload",
    "digits",
    "fashion",
    "load_fashion_mnist",
    "named",
    "small_cnn",
]

WORKLOADS: dict[str, Callable[[], Workload]] = {"digits": digits, "fashion": fashion}

SUITE: dict[str, Callable[[], Workload]] = {
    "digits": digits,
    "few-digits": few_digits,
    "fashion-cnn": fashion_cnn,
    "fashion-vit": fashion_vit,
    "noisy-fashion": noisy_fashion,
    "autoencoder": autoencoder,
    "shakespeare-transformer": shakespeare_transformer,
    "shakespeare-lstm": shakespeare_lstm,
    "wikitext-lstm": wikitext_lstm,
    **{name: partial(uci, name) for name in SETS},
}
"""The suite of the proof, by name."""


SUITES = {"proof": SUITE, "extended": EXTENDED, "further": FURTHER, "latest": LATEST}


def _five_times(make: Callable[[], Workload]) -> Workload:
    return make().longer(5)


LONG = {
    f"{name}×5": partial(_five_times, SUITE[name])
    for name in ("digits", "fashion-cnn", "fashion-vit", "shakespeare-transformer",
                 "shakespeare-lstm", "wikitext-lstm")
}  # fmt: skip
"""Images and text at five times the length, where a fixed run over-fits."""


def _few_steps() -> Workload:
    return replace(digits(), name="digits-short", steps=400)


SLICE = {"digits-short": _few_steps}
"""Seconds long; needs no data but scikit-learn's."""


def named(name: str) -> Workload:
    """A workload of any list; ``"siamese×25"`` is 25 times as long.

    Raises:
        ValueError: No workload has the name.

    Examples:
        >>> named("digits×5").steps
        10000
    """
    known = {**WORKLOADS, **SLICE, **SUITE, **EXTENDED, **FURTHER, **LATEST}
    plain, sign, times = name.partition("×")
    if plain not in known or (sign and not (times.isdigit() and int(times))):
        raise ValueError(
            f"workload {name} is unknown: use one of {', '.join(known)}, or NAME×TIMES"
        )
    workload = known[plain]()
    return workload.longer(int(times)) if times else workload
