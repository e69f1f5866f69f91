"""Options of the suite."""

import pytest


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
