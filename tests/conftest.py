"""Options of the suite."""

import gc
import logging
import os
from collections.abc import Iterator

# The nets of the tests are so small that threads would only wait for one another, above all where
# two suites run side by side; read by torch when it is imported, and by processes of a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiled steps are compared with eager ones, not timed: C++ that is not optimised compiles in
# half the time.
os.environ.setdefault("TORCHINDUCTOR_DEBUG_COMPILE", "1")

import pytest
import torch

from tests.traced import trace

# Seeding also queues the seed for devices that are missing, each time with the formatted stack: a
# millisecond, in tests that seed every step.
if not torch.accelerator.is_available():
    torch.manual_seed = torch.default_generator.manual_seed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--browser", action="store_true",
        help="load TensorBoard's pages in headless Chromium, which is installed if it is missing",
    )  # fmt: skip
    parser.addoption(
        "--screenshots",
        metavar="RUNS",
        help="with --browser: write docs/img/ anew, from the runs of examples/inspect_runs.py",
    )
    parser.addoption(
        "--inductor", action="store_true",
        help="compile to C++ in all tests of compiled steps; most only trace the graphs",
    )  # fmt: skip


def pytest_collection_finish() -> None:
    """Spare the collector all modules and tests, which live as long as the process."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled functions are traced into graphs, which torch then runs operation by operation.

    Tracing, guards and what is written into inputs may differ between kinds of runs; what C++ does
    with a graph is the subject of a few tests, and with ``--inductor`` of all.
    """
    if not request.config.getoption("--inductor"):
        monkeypatch.setattr(torch, "compile", trace)


@pytest.fixture(autouse=True)
def loggers_kept() -> Iterator[None]:
    """Restores levels, which the commands of benchmarks raise: later tests read messages."""
    logger = logging.getLogger("selftune")
    level, propagate, disabled = logger.level, logger.propagate, logging.root.manager.disable
    yield
    logger.setLevel(level)
    logger.propagate = propagate
    logging.disable(disabled)
