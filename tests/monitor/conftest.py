"""A TensorBoard server, and a browser to look at it."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from boards import run, serving


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of which tunes an l1 penalty too, and a report."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "plain run").report()
    run(folder / "with l1", hparams={"l1": 1e-4})
    return folder


@pytest.fixture(scope="session")
def server(runs: Path) -> Iterator[str]:
    """The address of a server over the two runs."""
    with serving(runs, runs / "told.txt", 2) as address:
        yield address


@pytest.fixture(scope="session")
def browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Headless Chromium."""
    if not request.config.getoption("--browser"):
        pytest.skip("pass --browser to load the pages in Chromium")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the extra 'browser'")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        install = ["apt-get", "install", "-y", "chromium", "chromium-driver"]
        if shutil.which("apt-get") is None:
            pytest.skip("no chromium and chromedriver here, and no apt-get to install them")
        done = subprocess.run(install, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "window-size=1300,900", "hide-scrollbars", f"user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()
