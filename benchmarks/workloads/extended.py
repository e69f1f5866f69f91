"""The extended suite: workloads of other kinds, on which no setting of the library was fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from benchmarks.workloads._base import Workload
from benchmarks.workloads.adaptation import low_rank
from benchmarks.workloads.audio import spoken_resnet
from benchmarks.workloads.colour import colour_vit
from benchmarks.workloads.graphs import digit_graph
from benchmarks.workloads.images import autoencoder, fashion_cnn
from benchmarks.workloads.pairs import siamese
from benchmarks.workloads.photographs import denoiser, sine_image
from benchmarks.workloads.physics import burgers
from benchmarks.workloads.programs import code_transformer
from benchmarks.workloads.sets import point_sets
from benchmarks.workloads.tables import diamonds
from benchmarks.workloads.text import wikitext_gru


@cache
def small_batches() -> Workload:
    """The CNN with BatchNorm on 8 images a batch, 2,000 steps."""
    return replace(fashion_cnn(), name="cnn-batch-8", batch_size=8, steps=2000)


@cache
def large_batches() -> Workload:
    """The autoencoder on 1,024 images a batch, 300 steps."""
    return replace(autoencoder(), name="autoencoder-batch-1024", batch_size=1024, steps=300)


EXTENDED: dict[str, Callable[[], Workload]] = {
    "code-transformer": code_transformer,
    "colour-vit": colour_vit,
    "spoken-resnet": spoken_resnet,
    "denoiser": denoiser,
    "point-sets": point_sets,
    "digit-graph": digit_graph,
    "wikitext-gru": wikitext_gru,
    "siamese": siamese,
    "low-rank": low_rank,
    "sine-image": sine_image,
    "burgers": burgers,
    "diamonds": diamonds,
    "cnn-batch-8": small_batches,
    "autoencoder-batch-1024": large_batches,
}
"""The extended suite, by name."""
