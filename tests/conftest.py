"""Options of the suite."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

# The nets of the tests are so small that threads would only wait for one another, above all where
# two suites run side by side; read by torch when it is imported, and by processes of a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiled steps are compared with eager ones, not timed: C++ that is not optimised compiles in
# half the time.
os.environ.setdefault("TORCHINDUCTOR_DEBUG_COMPILE", "1")

import pytest
import torch

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

    Tracing, guards and what is written into inputs are ours to test in every kind of run; C++,
    which takes most of the time, is made in a test of each driver of it.
    """
    if request.config.getoption("--inductor"):
        return
    compiler = torch.compile

    def trace(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
        options = settings.pop("options", None) or {}  # all others are the C++ compiler's
        kept = {n: o for n, o in options.items() if n == "guard_filter_fn"}
        return compiler(function, backend="aot_eager", options=kept or None, **settings)

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
